"""Turns an exported program into the standard form: one walk over its nodes, layers and rewrites looked up in tables."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from fewbit.errors import ModelError
from fewbit.model.torch_export import Traced

aten = torch.ops.aten
Bound = dict[str, Any]


@dataclass(eq=False)
class Constant:
    """A value that does not depend on the inputs: the user's tensor (`name`) or one computed from such tensors."""

    value: Any
    name: str | None
    node: fx.Node
    trained: bool


@dataclass(frozen=True)
class Tables:
    """What becomes of an operator: a layer, another functional operator, or nothing at all."""

    layers: dict[Any, Callable[[Converter, fx.Node, Bound], Any]]
    rewrites: dict[Any, Callable[[Converter, fx.Node, Bound], Any]]
    identities: frozenset[Any]
    dropped: frozenset[Any]


def bind(node: fx.Node) -> Bound:
    """The node's arguments by the operator's own parameter names, defaults filled in."""
    bound: Bound = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def module_path(node: fx.Node) -> str:
    """The user's dotted name of the innermost module that ran this operator, "" for the outermost."""
    paths = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values() if isinstance(entry, tuple)]
    return str(paths[-1]).split("@")[0] if paths else ""


class Converter:
    """Builds the standard graph of one exported program; `values` maps its nodes to ours or to constants."""

    def __init__(self, traced: Traced, tables: Tables) -> None:
        self.source = traced.module
        self.program = traced.program
        self.notes = traced.notes
        self.tables = tables
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[fx.Node, Any] = {}
        self.layers: dict[Any, str] = {}
        self.attributes: dict[Any, fx.Node] = {}
        self.taken: set[str] = set()
        self.sizes: dict[Any, tuple[fx.Node, int]] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        self.same: dict[fx.Node, fx.Node] = {}  # the node whose tensor an in-place operator returned

    def convert(self) -> fx.GraphModule:
        """The whole program as a GraphModule; the caller checks it against the source."""
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.set_value(node, self._call(node))
            elif node.op == "output":
                self._output(node)
        gm = fx.GraphModule(self.root, self.graph, class_name=type(self.source).__name__)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        gm.graph.lint()
        gm.recompile()
        gm.meta["notes"] = list(dict.fromkeys(self.notes))
        return gm

    # values -------------------------------------------------------------------------------------------------

    def get(self, old: Any) -> Any:
        """Our value for a node of the exported program: a node, a Constant, or a list of them."""
        return self.values[self.same.get(old, old)]

    def set_value(self, old: fx.Node, value: Any) -> None:
        self.values[self.same.get(old, old)] = value

    def constant(self, old: Any) -> Constant | None:
        """The constant behind an argument, or None when it depends on the inputs."""
        value = self.get(old) if isinstance(old, fx.Node) else None
        return value if isinstance(value, Constant) else None

    def arg(self, old: Any) -> Any:
        """An argument of the exported program as an argument of ours (constants become get_attr nodes or literals)."""
        return fx.map_arg(old, lambda node: self.materialise(self.get(node), node))

    def materialise(self, value: Any, like: fx.Node) -> Any:
        if isinstance(value, Constant):
            return self._attribute(value)
        return value

    def _attribute(self, constant: Constant) -> Any:
        if not isinstance(constant.value, Tensor):
            return constant.value
        key = id(constant.value) if constant.name else constant
        if key not in self.attributes:
            if constant.trained and constant.name is None:
                return self.emit(constant.node.target, self.arg(constant.node.args), constant.node,
                                 self.arg(constant.node.kwargs))  # fmt: skip
            name = self.unique(constant.name or constant.node.name)
            self._attach(name, self._own(constant.value))
            attribute = self.graph.get_attr(name)
            self._describe(attribute, constant.node, constant.node.meta.get("val"))
            self.attributes[key] = attribute
        return self.attributes[key]

    def _own(self, tensor: Tensor) -> Tensor:
        """The parameter itself (of the private copy, so that ties stay ties), or a copy of a buffer."""
        if not isinstance(tensor, nn.Parameter):
            return tensor.detach().clone()
        return self.parameters.setdefault(id(tensor), tensor)

    # building -----------------------------------------------------------------------------------------------

    def emit(self, target: Any, args: Any, like: fx.Node, kwargs: Any = None, *, final: bool = True) -> fx.Node:
        """Append a functional operator that stands for `like` (or, not `final`, for a step towards it)."""
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs or {}), self._name(target, like))
        if final:
            self._describe(node, like, like.meta.get("val"))
        else:
            fakes = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            self._describe(node, like, target(*fakes[0], **fakes[1]))
        return node

    def layer(self, like: fx.Node, cls: type[nn.Module], weights: dict[str, Constant | None], inputs: Any,
              buffers: dict[str, Constant | None] | None = None, **settings: Any) -> fx.Node:  # fmt: skip
        """Append a call of an `nn` layer that holds these weights; the same weights and settings are the same layer."""
        present = {k: c for k, c in (weights | (buffers or {})).items() if c is not None}
        identity = tuple((k, id(c.value) if c.name else id(c)) for k, c in present.items())
        key = (cls, identity, repr(sorted(settings.items())), module_path(like) if not present else "")
        if key not in self.layers:
            module = cls(**settings, **({} if not present else {"device": "meta"}))
            for name, constant in present.items():
                value = self._own(constant.value)
                trainable = name in weights and not isinstance(value, nn.Parameter)
                setattr(module, name, nn.Parameter(value) if trainable else value)
            name = self.unique(self.layer_name(like, cls, weights))
            self._attach(name, module)
            self.layers[key] = name
        node = self.graph.call_module(self.layers[key], tuple(inputs))
        self._describe(node, like, like.meta.get("val"))
        node.meta["layer"] = self.layers[key]
        return node

    def layer_name(self, like: fx.Node, cls: type[nn.Module], weights: dict[str, Constant | None]) -> str:
        """The user's name for a layer: the module that ran it, or the parameter that it owns."""
        path = module_path(like)
        here = self.source.get_submodule(path) if path else self.source
        values = {id(c.value) for c in weights.values() if c is not None and c.name}
        own = {id(p) for p in here.parameters(recurse=False)}
        if path and (isinstance(here, cls) or (values and values <= own and "weight" in here._parameters)):
            return path
        named = next((name for c in weights.values() if c and (name := self._root_name(c))), None)
        if named is None:
            return f"{path}.{cls.__name__.lower()}" if path else cls.__name__.lower()
        owner, _, attribute = named.split(".parametrizations.")[0].rpartition(".")
        if attribute == "weight" and owner:
            return owner
        stem = attribute.removesuffix("_weight") or attribute
        return f"{owner}.{stem}" if owner else stem

    def _root_name(self, constant: Constant) -> str | None:
        if constant.name:
            return constant.name
        parents = (self.constant(n) for n in constant.node.all_input_nodes)
        return next((name for c in parents if c and c.trained and (name := self._root_name(c))), None)

    def unique(self, name: str) -> str:
        """`name`, or `name_1`, `name_2`, ... if it is taken."""
        candidate, count = name, 0
        while candidate in self.taken:
            count += 1
            candidate = f"{name}_{count}"
        self.taken.add(candidate)
        return candidate

    def _attach(self, name: str, value: Any) -> None:
        *path, leaf = name.split(".")
        owner = self.root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(value, nn.Module):
            for child, module in (owner._modules.get(leaf) or nn.Module()).named_children():
                value.add_module(child, module)
            owner.add_module(leaf, value)
        elif isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)

    def _name(self, target: Any, like: fx.Node) -> str:
        operation = getattr(getattr(target, "_schema", None), "name", getattr(target, "__name__", "op")).split("::")[-1]
        path = module_path(like)
        leaf = path.rsplit(".", 1)[-1].rstrip("0123456789_").lower()
        stem = path if leaf and leaf in operation else f"{path}.{operation}" if path else operation
        return stem.replace(".", "_")

    def _describe(self, node: fx.Node, like: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        node.meta["layer"] = module_path(like)
        if isinstance(value, Tensor):
            node.meta["dtype"] = value.dtype

    # nodes --------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        tensors = {**self.program.constants, **self.program.state_dict}
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                ours = self.graph.placeholder(node.name)
                self._describe(ours, node, node.meta["val"])
                self.values[node] = ours
                for dim, size in enumerate(getattr(node.meta["val"], "shape", ())):
                    if not isinstance(size, int):
                        self.sizes.setdefault(str(size), (ours, dim))
            elif spec.target in tensors:
                value = tensors[spec.target]
                self.values[node] = Constant(value, spec.target, node, spec.kind is InputKind.PARAMETER)
            else:
                raise ModelError(f"input {spec.arg.name!r} of the exported program is a {spec.kind.name}: "
                                 "expected tensors, parameters and buffers only")  # fmt: skip

    def _call(self, node: fx.Node) -> Any:
        if node.target in self.tables.dropped:
            return None
        if (folded := self._fold(node)) is not None:
            return folded
        if node.target is operator.getitem and isinstance(self.get(node.args[0]), list | tuple):
            return self.get(node.args[0])[node.args[1]]
        if node.target in self.tables.identities and self._keeps_dtype(node):
            return self.get(node.args[0])
        for table in (self.tables.layers, self.tables.rewrites):
            if node.target in table:
                result = table[node.target](self, node, bind(node))
                if result is not None:
                    return result
        return self.emit(node.target, self.arg(node.args), node, self.arg(node.kwargs))

    def _keeps_dtype(self, node: fx.Node) -> bool:
        return bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)  # type: ignore[union-attr]

    def _fold(self, node: fx.Node) -> Constant | None:
        """The value of an operator all of whose inputs are constants."""
        sources = [self.get(n) for n in node.all_input_nodes]
        if not all(isinstance(s, Constant) for s in sources):
            return None
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.get(n).value)
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        return Constant(value, None, node, any(s.trained for s in sources))

    def _output(self, node: fx.Node) -> None:
        flat = [self.arg(value) for value in node.args[0]]  # type: ignore[union-attr]
        spec = self.program.call_spec.out_spec
        result = torch.utils._pytree.tree_unflatten(flat, spec) if spec is not None else tuple(flat)
        self.graph.output(result)
