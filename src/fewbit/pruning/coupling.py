"""Which channels belong together, found by following every index of every tensor through the graph.

Each axis of each parameter gets a label for each index; an operator unites the labels of the indices that it combines
one to one, and freezes those that it mixes in a way that no smaller operator could repeat. Two indices with one label
leave together. The idea of grouping by dependency is that of DepGraph (arXiv 2301.12900); labels of single indices
make concatenations, splits, heads and shared weights no special cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.model.graph import constant_of, module_of
from fewbit.model.operators import operator
from fewbit.pruning.labels import Axes, Axis, Labels

Regrouping = tuple[tuple[int, ...], tuple[int, ...]]  # sizes of axes before and after
Rule = Callable[["Coupling", fx.Node], Any]  # gives the axes of the node's output, or a list of such
RULES: dict[str, Rule] = {}  # by the operator's name


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Says that a function knows these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass
class Slot:
    """A parameter or buffer: all names that it has, and the labels of its axes.

    ``makes``: the dimension of a layer's weight along what the layer gives, None for what is no such weight.
    ``factors``: whether these are the factors of a norm.
    """

    tensor: Tensor
    names: list[str]
    axes: Axes
    makes: int | None = None
    factors: bool = False


@dataclass(frozen=True)
class Contraction:
    """A node that adds products along an axis of an argument: ``axis`` is dimension ``dim`` of ``source``."""

    node: fx.Node
    source: fx.Node
    dim: int
    axis: Axis


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of a node on the example, and the axes that they are proportional to."""

    node: fx.Node
    macs: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Size:
    """An integer argument of a node that counts the indices of an axis: ``node.args[argument][position]``.

    ``inferred``: another node computes it; PyTorch can tell it from the other sizes, written as -1.
    """

    node: fx.Node
    argument: int
    position: int | None
    axis: Axis
    inferred: bool = False


@dataclass
class Coupling:
    """What `couple` finds in a graph. All nodes are those of the graph that was given.

    ``choices``: which of several new axes gets the labels where an axis becomes several; ``open_choices``: which may.
    ``states``: recurrent weights whose columns read hidden units.
    """

    gm: fx.GraphModule
    choices: dict[Regrouping, int] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    slots: dict[int, Slot] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    open_choices: dict[Regrouping, list[int]] = field(default_factory=dict)
    states: list[tuple[str, Axis]] = field(default_factory=list)

    def run(self) -> Coupling:
        """Follow all indices through the graph."""
        for node in self.gm.graph.nodes:
            self.values[node] = self._value(node)
        return self

    def axes(self, node: Any) -> Axes:
        """The labels of a node's output."""
        found = self.values[node]
        return found if isinstance(found, tuple) else (None,) * len(shape_of(node))

    def weight(self, path: str, makes: int = 0) -> Axes:
        """The labels of a layer's weight, by its dotted path."""
        axes = self.parameter(path, 2)
        self.slot(path).makes = makes
        return axes

    def slot(self, path: str) -> Slot:
        """What is known of a parameter, by its dotted path."""
        owner, _, name = path.rpartition(".")
        return self.slots[id(getattr(self.gm.get_submodule(owner), name))]

    def parameter(self, path: str, channels: int | None = None) -> Axes:
        """The labels of a parameter or buffer, by its dotted path; a layer's have ``channels`` first, then taps."""
        owner, _, name = path.rpartition(".")
        tensor: Tensor = getattr(self.gm.get_submodule(owner), name)
        slot = self.slots.get(id(tensor))
        if slot is None:
            free = tensor.shape[:channels]
            labels = (self.labels.fresh(size) if size > 1 else None for size in free)
            axes = (*labels, *(None for _ in tensor.shape[len(free) :]))
            slot = self.slots[id(tensor)] = Slot(tensor, [], axes)
        if path not in slot.names:
            slot.names.append(path)
        return slot.axes

    def freeze(self, axes: Axes, reason: str) -> None:
        for axis in axes:
            self.labels.freeze(axis, reason)

    def unite(self, first: Axis, second: Axis, node: fx.Node) -> Axis:
        """The two axes of a node's operands, index by index."""
        return self.labels.unite_axes(first, second, f"{name_of(node)} combines them with what has to stay")

    def contract(self, node: fx.Node, source: fx.Node, dim: int, axis: Axis) -> None:
        self.contractions.append(Contraction(node, source, dim, axis))

    def size(self, node: fx.Node, argument: int, position: int | None, axis: Axis) -> None:
        """Remember that an argument of a node is the number of an axis's indices."""
        if axis is not None:
            self.sizes.append(Size(node, argument, position, axis))

    def _value(self, node: fx.Node) -> Any:
        """Axes of a tensor, a list of such for several, None for what is no tensor."""
        if node.op == "get_attr":
            return (
                self.parameter(str(node.target)) if isinstance(constant_of(node, self.gm), Tensor) else None
            )
        if node.op == "output":
            for source in node.all_input_nodes:
                self.freeze_all(self.values[source], "the model returns them")
            return None
        if node.op == "placeholder":
            return (None,) * len(shape_of(node))
        known = operator(node, self.gm)
        found = RULES.get(known.name) if known else None
        if found is not None:
            return found(self, node)
        return self.mixed(node, f"{name_of(node)} is not known to keep channels apart")

    def mixed(self, node: fx.Node, reason: str) -> Any:
        """What reads indices in an unknown way: all of them stay."""
        for source in node.all_input_nodes:
            self.freeze_all(self.values[source], reason)
        layer = module_of(node, self.gm)
        for name, _ in layer.named_parameters() if isinstance(layer, nn.Module) else ():
            self.freeze(self.parameter(f"{node.target}.{name}"), reason)
        return (None,) * len(shape_of(node)) if "shape" in node.meta else None

    def freeze_all(self, value: Any, reason: str) -> None:
        """Freeze the axes of a tensor, or of all tensors of a list."""
        if isinstance(value, list):
            for part in value:
                self.freeze_all(part, reason)
        elif value is not None:
            self.freeze(value, reason)


def shape_of(node: Any) -> tuple[int, ...]:
    """The sizes of a node's output on the example. Raises ModelError where they are not known."""
    found = node.meta.get("shape") if isinstance(node, fx.Node) else None
    if found is None:
        raise ModelError(
            f"{getattr(node, 'name', node)}: the graph has no shapes; read the model with fewbit first"
        )
    return tuple(int(size) for size in found)


def name_of(node: fx.Node) -> str:
    """What people call a node."""
    return str(node.target) if node.op == "call_module" else node.name
