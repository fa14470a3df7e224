"""Turns an exported program into the standard form: one walk, layers and rewrites looked up in tables."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_unflatten

from fewbit.errors import ModelError
from fewbit.model.torch_build import Builder, Constant, module_path
from fewbit.model.torch_export import Traced
from fewbit.model.torch_views import SPLITS, Views, is_inplace, write

aten = torch.ops.aten
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.mT.default, aten.numpy_T.default, aten.permute.default)
Bound = dict[str, Any]
Rule = Callable[["Converter", fx.Node, Bound], Any]


@dataclass(frozen=True)
class Tables:
    """What becomes of an operator: a layer, another functional operator, or nothing at all."""

    layers: dict[Any, Rule]
    rewrites: dict[Any, Rule]
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


class Converter(Builder):
    """Walks one exported program; `values` maps its nodes to ours, to constants or to lists of these."""

    def __init__(self, traced: Traced, tables: Tables) -> None:
        super().__init__(traced.module)
        self.program = traced.program
        self.notes = traced.notes
        self.tables = tables
        self.values: dict[fx.Node, Any] = {}
        self.views = Views()
        self._transposed: dict[Any, Constant] = {}

    def convert(self) -> fx.GraphModule:
        """The whole program as a GraphModule in eval mode; the caller checks it against the source."""
        self._inputs()
        self._walk(self.program.graph_module)
        gm = fx.GraphModule(self.root, self.graph, class_name=type(self.source).__name__)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        gm.graph.lint()
        gm.recompile()
        gm.meta["notes"] = self.notes
        return gm.eval()

    # values

    def get(self, old: Any) -> Any:
        """Our value for a node of the exported program, with every in-place write so far."""
        root = self.views.root(old)
        if root in self.views.stale:
            self.views.stale.discard(root)
            source: Any = root.args[0]
            if source.target in SPLITS:
                self.values[source] = self.call(source)
            self.values[root] = self.call(root)
        return self.values[root]

    def constant(self, old: Any) -> Constant | None:
        """The constant behind an argument, or None when it depends on the inputs."""
        value = self.get(old) if isinstance(old, fx.Node) else None
        return value if isinstance(value, Constant) else None

    def number(self, old: Any) -> Any:
        """Like `arg`, but an unnamed scalar tensor (`torch.tensor(2.0)` in forward) is its number."""
        constant = self.constant(old)
        unnamed = constant is not None and not constant.trained and constant.name is None
        if constant and unnamed and isinstance(constant.value, Tensor) and constant.value.dim() == 0:
            return constant.value.item()
        return self.arg(old)

    def arg(self, old: Any) -> Any:
        """An argument of the exported program as one of ours; constants become get_attr nodes or numbers."""
        return fx.map_arg(old, lambda node: self.materialise(self.get(node)))

    def materialise(self, value: Any) -> Any:
        """A value that can be an argument: constants become get_attr nodes, operators on parameters, or
        numbers.
        """
        if not isinstance(value, Constant):
            return value
        if not isinstance(value.value, Tensor):
            return value.value
        if value.computed and value.trained and not self.frozen(value):
            node = value.node
            return self.emit(node.target, self.arg(node.args), node, self.arg(node.kwargs))
        return self.attribute(value)

    def frozen(self, constant: Constant) -> bool:
        """Whether a computed constant is a mere view of one parameter that nothing else reads."""
        node, steps = constant.node, 0
        while node.op == "call_function" and len(node.users) == 1 and node in self.views.parent:
            node, steps = node.args[0], steps + 1  # type: ignore[assignment]
        return node.op == "placeholder" and len(node.users) == 1 and steps > 0

    def transposed(self, weight: Constant) -> Constant:
        """A matrix the other way round; the user's own parameter where the model itself transposes it."""
        source = self.constant(weight.node.args[0]) if weight.computed and weight.node.args else None
        if source is not None and weight.node.target in TRANSPOSES and source.value.dim() == 2:
            return source
        key = id(weight.value) if weight.name else weight
        if key not in self._transposed:
            value = weight.value.detach().t().contiguous()
            self._transposed[key] = Constant(value, None, weight.origin, weight.node, True, computed=True)
        return self._transposed[key]

    # nodes

    def _inputs(self) -> None:
        tensors = {**self.program.constants, **self.program.state_dict}
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                self.values[node] = self.placeholder(node)
            elif spec.target in tensors:
                # torch.tensor(...) written in forward has a name that export made up
                name = None if str(spec.target).startswith("lifted_tensor") else spec.target
                trained = spec.kind is InputKind.PARAMETER
                self.values[node] = Constant(tensors[spec.target], name, name, node, trained)
            else:
                raise ModelError(
                    f"{spec.arg.name!r} is a {spec.kind.name.lower()} of the exported program: "
                    "expected tensors, "
                    "parameters and buffers only; pass such objects when the model is built"
                )

    def _walk(self, gm: fx.GraphModule) -> Any:
        """Convert one graph after its placeholders have values; the value of the inner graph's output."""
        for node in gm.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._region(gm, node) if _is_region(node) else self._step(node)
            elif node.op == "output" and gm is self.program.graph_module:
                self.graph.output(self._output(node))
            elif node.op == "output":
                return [self.get(value) for value in node.args[0]]
        return None

    def _region(self, gm: fx.GraphModule, node: fx.Node) -> Any:
        """A block under torch.no_grad() or a disabled autocast: its operators, in place."""
        at = 1 if "set_grad" in str(node.target) else 4
        if at == 4 and node.args[2]:
            raise ModelError(
                f"{module_path(node) or type(self.source).__name__} runs under torch.autocast inside "
                "forward: "
                "expected float32; move the autocast block out of the model"
            )
        body = getattr(gm, str(node.args[at].target))  # type: ignore[union-attr]
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        for placeholder, outer in zip(inner, node.args[at + 1 :], strict=True):
            self.values[placeholder] = self.get(outer)
        return self._walk(body)

    def _step(self, node: fx.Node) -> Any:
        if is_inplace(node.target):
            constant = self.constant(node.args[0])
            if constant and constant.name:
                self.notes.append(
                    f"forward writes to {constant.name!r}: the graph uses its value from when it was read"
                )
            return write(self, node)
        value = self.call(node)
        self.views.record(node)
        return value

    def call_as(self, target: Any, node: fx.Node) -> Any:
        """`call` with another operator in the place of the node's own."""
        node.target = target
        return self.call(node)

    def call(self, node: fx.Node) -> Any:
        """Our value for one operator: folded, a layer, a canonical form, or the operator as it is."""
        if node.target in self.tables.dropped:
            return None
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ModelError(
                f"{module_path(node) or type(self.source).__name__} uses {node.target}, which has no "
                "standard form: "
                "expected plain operators; replace the control flow, or quantize the parts around it"
            )
        if (folded := self._fold(node)) is not None:
            return folded
        if node.target is operator.getitem and isinstance(self.get(node.args[0]), list):
            return self.get(node.args[0])[node.args[1]]
        for table in (self.tables.layers, self.tables.rewrites):
            if node.target in table and (result := table[node.target](self, node, bind(node))) is not None:
                return result
        return self.emit(node.target, self.arg(node.args), node, self.arg(node.kwargs))

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
        origin = next((s.origin for s in sources if s.trained), None)
        return Constant(value, None, origin, node, any(s.trained for s in sources), computed=True)

    def _output(self, node: fx.Node) -> Any:
        flat = [self.arg(value) for value in node.args[0]]  # type: ignore[union-attr]
        spec = self.program.call_spec.out_spec
        result = tree_unflatten(flat, spec) if spec is not None else tuple(flat)
        try:
            return fx.node.map_aggregate(_plain(result), lambda value: value)
        except TypeError:
            self.notes.append(
                f"the output is a plain tuple: {type(result).__name__} is no tuple, list or dict"
            )
            return tuple(flat)


def _is_region(node: fx.Node) -> bool:
    return str(node.target) in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _plain(value: Any) -> Any:
    """The same structure, if it is made of tuples, lists and dicts with string keys; TypeError otherwise."""
    if type(value) in (tuple, list):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, dict) and type(value).__name__ in ("dict", "OrderedDict"):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, fx.Node | int | float | bool | str):
        return value
    raise TypeError(type(value).__name__)
