"""Takes units out of a graph: smaller layers under the same names, or the same layers with what they gave masked."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.model.graph import copy_graph, module_of, refresh
from fewbit.pruning.coupling import Contraction, Coupling
from fewbit.pruning.groups import count_kept
from fewbit.pruning.labels import Axes, Axis

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def without(c: Coupling, gone: set[int], example: tuple[Tensor, ...]) -> fx.GraphModule:
    """A copy of the graph without the units of these labels; names of layers and parameters stay."""
    twin = copy_graph(c.gm)
    nodes = dict(zip(c.gm.graph.nodes, twin.graph.nodes, strict=True))
    for slot in c.slots.values():
        smaller = slot.tensor.detach()
        for dim, axis in enumerate(slot.axes):
            indices = kept(c, axis, gone)
            if indices is not None:
                smaller = smaller.index_select(dim, indices)
        if smaller.shape != slot.tensor.shape:
            _put(twin, slot.names, smaller.clone(), slot.tensor)
    done: set[str] = set()
    for old, new in nodes.items():
        layer: Any = module_of(new, twin)
        if layer is not None and str(new.target) not in done:
            done.add(str(new.target))
            _resize(layer, c, old, gone)
    for size in c.sizes:
        count, node = -1 if size.inferred else count_kept(c, size.axis, gone), nodes[size.node]
        if size.position is None:
            node.update_arg(size.argument, count)
        else:
            sizes: list[Any] = list(node.args[size.argument])
            sizes[size.position] = count
            node.update_arg(size.argument, sizes)
    for old, new in nodes.items():
        if isinstance(new.meta.get("val"), Tensor) and isinstance(c.values[old], tuple):
            new.meta["val"] = _smaller(c, new.meta["val"], c.values[old], gone)
    twin.graph.lint()
    twin.recompile()
    refresh(twin, example)
    return twin


def _smaller(c: Coupling, value: Tensor, axes: Axes, gone: set[int]) -> Tensor:
    """A tensor without data: its free sizes stay free, those of channels shrink."""
    pairs = zip(value.shape, axes, strict=True)
    return value.new_empty([s if a is None else s * count_kept(c, a, gone) // len(a) for s, a in pairs])


def kept(c: Coupling, axis: Axis, gone: set[int]) -> Tensor | None:
    """The indices of an axis that stay when these labels leave; None where all do, for an axis without labels."""
    if axis is None:
        return None
    return torch.tensor([i for i, label in enumerate(axis) if c.labels.find(label) not in gone])


def _removed(c: Coupling, axis: Axis, gone: set[int]) -> Tensor:
    return torch.tensor(
        [i for i, label in enumerate(axis or ()) if c.labels.find(label) in gone], dtype=torch.int64
    )


def _put(gm: fx.GraphModule, names: list[str], tensor: Tensor, old: Tensor) -> None:
    """Under all its names, so that what was shared stays shared."""
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for path in names:
        owner, _, name = path.rpartition(".")
        setattr(gm.get_submodule(owner), name, new)


def _resize(layer: Any, c: Coupling, node: fx.Node, gone: set[int]) -> None:
    """Let a layer's own sizes say what its parameters have become."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _CONVS):
        if 1 < layer.groups == layer.in_channels:
            layer.groups = layer.groups * layer.weight.shape[0] // layer.out_channels
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, _TRANSPOSED):
        if 1 < layer.groups == layer.in_channels:
            layer.groups = layer.weight.shape[0]
        layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.numel()
    elif isinstance(layer, nn.RNNBase):
        inputs, states = layer.get_parameter("weight_ih_l0"), layer.get_parameter("weight_hh_l0")
        layer.input_size, layer.hidden_size = inputs.shape[1], states.shape[1]
    elif isinstance(layer, nn.GroupNorm) and (axis := c.axes(node)[1]) is not None:
        groups, channels = layer.num_groups, count_kept(c, axis, gone)
        layer.num_groups, layer.num_channels = groups * channels // layer.num_channels, channels
    elif isinstance(layer, _NORMS) and (axis := c.axes(node)[1]) is not None:
        layer.num_features = count_kept(c, axis, gone)


class _Masking(fx.Interpreter):
    """Runs a graph with zeros in place of what these labels give, wherever it is multiplied and added up."""

    def __init__(self, gm: fx.GraphModule, c: Coupling, gone: set[int]) -> None:
        super().__init__(gm)
        nodes = dict(zip(c.gm.graph.nodes, gm.graph.nodes, strict=True))
        self.found: dict[fx.Node, list[tuple[Contraction, Tensor]]] = defaultdict(list)
        for each in c.contractions:
            removed = _removed(c, each.axis, gone)
            if len(removed):
                self.found[nodes[each.node]].append((each, removed))
        self.nodes = nodes

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        masks = self.found.get(n, [])

        def value(source: fx.Node) -> Any:
            result = self.env[source]
            for each, removed in masks:
                if self.nodes[each.source] is source:
                    result = result.index_fill(each.dim, removed, 0.0)
            return result

        return fx.map_arg(n.args, value), fx.map_arg(n.kwargs, value)


def masked(c: Coupling, gone: set[int], inputs: tuple[Tensor, ...]) -> Any:
    """What the whole graph gives when nothing reads the units of these labels: the definition of their removal."""
    twin = copy_graph(c.gm)
    with torch.no_grad():
        for path, axis in c.states:
            twin.get_parameter(path).index_fill_(1, _removed(c, axis, gone), 0.0)
        return _Masking(twin, c, gone).run(*inputs)
