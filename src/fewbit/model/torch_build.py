"""Builds a graph in standard form: appends layers and operators under the user's names, and owns their
tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten


@dataclass(eq=False)
class Constant:
    """A value that does not depend on the inputs: the user's tensor (`name`), or one computed from such
    tensors.

    `origin` is the parameter that it comes from, `node` the exported node that it is the value of.
    """

    value: Any
    name: str | None
    origin: str | None
    node: fx.Node
    trained: bool
    computed: bool = False


def module_path(node: fx.Node) -> str:
    """The user's dotted name of the innermost module that ran this operator, "" for the outermost."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    paths = [entry[0] for entry in stack if isinstance(entry, tuple)]
    return str(paths[-1]).split("@")[0] if paths else ""


def sizes(value: Any) -> list[Any]:
    """A traced tensor's sizes: numbers where they are known, symbols where they are free."""
    return [size if isinstance(size, int) else _known(size) for size in getattr(value, "shape", ())]


def _known(size: torch.SymInt) -> Any:
    number = size.node.maybe_as_int()
    return size if number is None else number


class Builder:
    """A growing graph, its tensors and layers. `source` is the private copy whose parameters the layers
    take over.
    """

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._layers: dict[Any, str] = {}
        self._attributes: dict[Any, fx.Node] = {}
        self._names: set[str] = set()
        self._sizes: dict[str, Any] = {}  # a symbolic size -> the (input, dimension) or node that holds it

    def placeholder(self, like: fx.Node) -> fx.Node:
        """Append an input of the model."""
        node = self.graph.placeholder(like.name)
        describe(node, like, like.meta["val"])
        for dim, size in enumerate(sizes(like.meta["val"])):
            if not isinstance(size, int):
                self._sizes.setdefault(str(size), (node, dim))
        return node

    def emit(
        self, target: Any, args: Any, like: fx.Node, kwargs: Any = None, *, final: bool = True
    ) -> fx.Node:
        """Append a functional operator that stands for `like` (or, not `final`, for a step towards it)."""
        name = _node_name(target, like)
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs or {}), name)
        value = like.meta.get("val")
        if not final:
            fakes = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            value = target(*fakes[0], **fakes[1])
        describe(node, like, value)
        if isinstance(value, torch.SymInt):
            self._sizes.setdefault(str(value), node)
        return node

    def size(self, value: torch.SymInt, like: fx.Node) -> fx.Node | None:
        """The node that holds a symbolic size: an input's where it is one; None if there is none."""
        found = self._sizes.get(str(value))
        if isinstance(found, tuple):
            node = self.graph.call_function(aten.sym_size.int, found)
            describe(node, like, value)
            node.meta["layer"] = ""
            self._sizes[str(value)] = found = node
        return found

    def reshaped(self, x: fx.Node, like: fx.Node) -> fx.Node | None:
        """Append a reshape of `x` to the shape of `like`, -1 where one size is free; None if a size is
        unknown.
        """
        shape = sizes(like.meta["val"])
        free = [index for index, size in enumerate(shape) if not isinstance(size, int)]
        for index in free:
            shape[index] = -1 if len(free) == 1 else self.size(shape[index], like)
        if shape.count(None) > 1:
            return None
        return self.emit(aten.reshape.default, (x, [-1 if s is None else s for s in shape]), like)

    def attribute(self, constant: Constant) -> fx.Node:
        """A get_attr node for a constant: the user's parameter or buffer, or a buffer of its own."""
        key = id(constant.value) if constant.name else constant
        if key not in self._attributes:
            name = self._unique(constant.name or constant.origin or f"constant_{constant.node.name}")
            value = constant.value
            if constant.trained and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value.clone())
            self._attach(name, value if constant.trained else value.detach().clone())
            node = self.graph.get_attr(name)
            describe(node, constant.node, constant.node.meta.get("val"))
            node.meta["layer"] = ""
            self._attributes[key] = node
        return self._attributes[key]

    def layer(
        self,
        like: fx.Node,
        cls: type[nn.Module],
        weights: dict[str, Constant | None],
        inputs: Any,
        buffers: dict[str, Constant | None] | None = None,
        **settings: Any,
    ) -> fx.Node:
        """Append a call of an `nn` layer that holds these tensors; the same tensors and settings are the
        same layer.
        """
        present = {k: c for k, c in (weights | (buffers or {})).items() if c is not None}
        held = tuple((k, id(c.value) if c.name else id(c)) for k, c in present.items())
        key = (cls, held, repr(sorted(settings.items())), "" if present else module_path(like))
        if key not in self._layers:
            module = cls(**settings, device="meta") if present else cls(**settings)
            for attribute, constant in present.items():
                value = constant.value
                if attribute not in weights:
                    value = value.detach().clone()
                elif not isinstance(value, nn.Parameter):
                    value = nn.Parameter(value.detach().clone())
                setattr(module, attribute, value)
            for attribute, buffer in module.named_buffers():
                if buffer.is_meta:  # a counter that the model does not have
                    setattr(module, attribute, torch.zeros_like(buffer, device="cpu"))
            self._layers[key] = self._unique(self._layer_name(like, cls, weights))
            self._attach(self._layers[key], module)
        node = self.graph.call_module(self._layers[key], tuple(inputs))
        describe(node, like, like.meta.get("val"))
        node.meta["layer"] = self._layers[key]
        return node

    def _layer_name(self, like: fx.Node, cls: type[nn.Module], weights: dict[str, Constant | None]) -> str:
        """The user's name for a layer: the module that ran it, or the parameter that it owns."""
        path = module_path(like)
        here = self.source.get_submodule(path) if path else self.source
        values = {id(c.value) for c in weights.values() if c is not None and c.name}
        own = {id(p) for p in here.parameters(recurse=False)}
        if path and (isinstance(here, cls) or (values and values <= own and "weight" in here._parameters)):
            return path
        origin = next((c.origin for c in weights.values() if c is not None and c.origin), None)
        if origin is None:
            return f"{path}.{cls.__name__.lower()}" if path else cls.__name__.lower()
        owner, _, attribute = origin.split(".parametrizations.")[0].rpartition(".")
        if attribute == "weight" and owner:
            return owner
        stem = attribute.removesuffix("_weight") or attribute
        return f"{owner}.{stem}" if owner else stem

    def _unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
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


def describe(node: fx.Node, like: fx.Node, value: Any) -> None:
    """Fill in a node's `meta`: symbolic value, dtype and the user's module that it comes from."""
    node.meta["val"] = value
    node.meta["layer"] = module_path(like)
    if isinstance(value, Tensor):
        node.meta["dtype"] = value.dtype


def _node_name(target: Any, like: fx.Node) -> str:
    schema = getattr(target, "_schema", None)
    operation = str(schema.name if schema else target.__name__).split("::")[-1]
    path = module_path(like)
    leaf = path.rsplit(".", 1)[-1].rstrip("0123456789_").lower()
    stem = path if leaf and leaf in operation else f"{path}.{operation}" if path else operation
    return stem.replace(".", "_")
