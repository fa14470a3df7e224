"""Builds the PyTorch twin of a Keras model step by step, and keeps track of how each value's axes lie in memory."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewbit.errors import ModelError
from fewbit.model.torch_export import first_line

Order = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A tensor of the twin. ``order[i]`` is the Keras axis that is stored as dimension ``i``."""

    node: fx.Node
    order: Order

    @property
    def rank(self) -> int:
        return len(self.order)

    @property
    def stored(self) -> tuple[int, ...]:
        """The sizes as they lie in memory."""
        return tuple(int(size) for size in self.node.meta["val"].shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes in Keras's order."""
        return tuple(self.stored[self.dim(axis)] for axis in range(self.rank))

    @property
    def as_keras(self) -> bool:
        return self.order == identity(self.rank)

    def dim(self, axis: int) -> int:
        """Where a Keras axis is stored."""
        return self.order.index(axis % self.rank)

    def same(self, node: fx.Node) -> Value:
        """Another tensor with the same axes."""
        return Value(node, self.order)


def identity(rank: int) -> Order:
    return tuple(range(rank))


def channels_second(rank: int, channel: int = -1) -> Order:
    """The order with the channel axis behind the batch, as PyTorch's convolutions want it."""
    channel %= rank
    return (0, channel, *(axis for axis in range(1, rank) if axis != channel))


class Function(nn.Module):
    """A function with its settings as a module, so that what it does carries a name; tensors are buffers."""

    def __init__(self, function: Callable[..., Any], *settings: Any, **named: Any) -> None:
        super().__init__()
        self.function, self.settings, self.named = function, settings, named

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.settings, *self.buffers(recurse=False), **self.named)


@dataclass
class Assembly:
    """A growing ``fx.Graph`` whose every node calls a module of ``root``; sizes are known at once, numbers never."""

    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    notes: list[str] = field(default_factory=list)
    free_sizes: bool = False  # whether the model leaves more than the batch size open
    backend: str = "torch"  # the one that Keras itself runs on
    reserved: set[str] = field(default_factory=set)  # the names of layers, whenever their turn comes
    call: Callable[..., list[Value]] = field(init=False)  # builds a layer inside another one
    _paths: dict[int, str] = field(default_factory=dict)
    _layers: dict[str, Any] = field(default_factory=dict)
    _converted: dict[tuple[fx.Node, Order], fx.Node] = field(default_factory=dict)
    _fake: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def path(self, layer: Any, prefix: str) -> str:
        """The dotted name of a layer in the twin: its own name in Keras, if no other layer has that already."""
        if id(layer) not in self._paths:
            stem, taken, count = clean(layer.name), set(self._paths.values()), 0
            path = f"{prefix}{stem}"
            while path in taken:
                count += 1
                path = f"{prefix}{stem}_{count}"
            self._paths[id(layer)] = path
        return self._paths[id(layer)]

    def input(self, name: str, example: Tensor) -> Value:
        node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta["val"] = self._fake.from_tensor(example)
        return Value(node, identity(example.dim()))

    def module(self, path: str, make: Callable[[], nn.Module], *inputs: Any) -> fx.Node:
        """Call the layer at ``path``, which is made by its first call; a layer that is called again is the same."""
        if path not in self._layers:
            self._layers[path] = self._attach(path, make())
        return self._call(self._layers[path], inputs)

    def function(self, path: str, function: Callable[..., Any], *inputs: Any, **named: Any) -> fx.Node:
        """Call a function under the name of a layer. Nodes among ``inputs`` come first, settings after them."""
        nodes = [value for value in inputs if isinstance(value, fx.Node)]
        return self._call(self._attach(path, Function(function, *inputs[len(nodes) :], **named)), nodes)

    def with_constant(
        self, path: str, function: Callable[..., Any], node: fx.Node, constant: Tensor
    ) -> fx.Node:
        """``function(node, constant)``, the constant a buffer."""
        module = Function(function)
        module.register_buffer("other", constant.detach().clone())
        return self._call(self._attach(path, module), [node])

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        found = self.graph.call_function(operator.getitem, (node, index))
        found.meta["val"] = node.meta["val"][index]
        return found

    def stored_as(self, value: Value, order: Order, path: str) -> Value:
        """The value with its axes in another order: a permutation, or a reshape where no number moves."""
        if value.order == order:
            return value
        dims = tuple(value.dim(axis) for axis in order)
        key = (value.node, dims)
        if key not in self._converted:
            if not self.free_sizes and moves_nothing(value.stored, dims):
                node = self.reshape(path, value.node, tuple(value.stored[d] for d in dims))
            else:
                node = self.function(f"{path}.permute", torch.permute, value.node, dims)
            self._converted[key] = node
        return Value(self._converted[key], order)

    def as_keras(self, value: Value, path: str) -> Value:
        """The value with its axes where Keras has them."""
        return self.stored_as(value, identity(value.rank), path)

    def channels_second(self, value: Value, path: str, channel: int = -1) -> Value:
        """The value as PyTorch's convolutions want it, where Keras has its channels on ``channel``."""
        return self.stored_as(value, channels_second(value.rank, channel), path)

    def reshape(self, path: str, node: fx.Node, sizes: Sequence[int]) -> fx.Node:
        """Other sizes behind the batch; the first entry of ``sizes`` stands for the batch and is not read."""
        return self.function(f"{path}.reshape", torch.reshape, node, (-1, *sizes[1:]))

    def _call(self, target: str, inputs: Sequence[Any]) -> fx.Node:
        node = self.graph.call_module(target, tuple(inputs))
        values = fx.map_arg(tuple(inputs), lambda n: n.meta["val"])
        try:
            with self._fake, torch.no_grad():
                node.meta["val"] = self.root.get_submodule(target)(*values)
        except Exception as error:
            raise ModelError(
                f"{target!r} does not run on its inputs ({first_line(error)}): expected what Keras computes there; "
                "this is a fault of the reader: save the model in another form, or leave that layer out"
            ) from error
        return node

    def _attach(self, path: str, module: nn.Module) -> str:
        """Put a module into the tree under a name that PyTorch allows and nobody has; returns the name."""
        owner, names = self.root, [clean(part) for part in path.split(".")]
        for name in names[:-1]:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        leaf, count = names[-1], 0
        while not _is_free(owner, leaf) or (count and ".".join([*names[:-1], leaf]) in self.reserved):
            count += 1
            leaf = f"{names[-1]}_{count}"
        for child, part in (owner._modules.get(leaf) or nn.Module()).named_children():
            module.add_module(child, part)
        owner.add_module(leaf, module.eval())
        return ".".join([*names[:-1], leaf])


def _is_free(owner: nn.Module, name: str) -> bool:
    """Whether nothing has that name yet, or only a holder of the functions in front of the layer."""
    return not hasattr(owner, name) or type(owner._modules.get(name)) is nn.Module


def clean(name: str) -> str:
    """A Keras name as the name of a PyTorch module: letters, digits and underscores, and none of PyTorch's own."""
    word = re.sub(r"\W", "_", name) or "_"
    return f"{word}_" if hasattr(fx.GraphModule, word) else word


def moves_nothing(stored: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether a permutation moves sizes of one only, so that the numbers stay where they are."""
    kept = [d for d in dims if stored[d] != 1]
    return kept == sorted(kept) and dims[0] == 0
