"""SmoothQuant: the difficulty of activations with a few large channels moves into the weights that read them.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import CalibrationError, RecipeError
from fewbit.model.graph import in_eval_mode, module_of
from fewbit.passes._layers import (
    Weighted,
    by_input,
    channels_out,
    is_shared,
    moments,
    scale_inputs,
    scale_outputs,
    set_moments,
    shared_parameters,
    store,
    weighted,
)
from fewbit.passes._paths import Channels, calls_once, shape_of, spread

PRESERVES = (
    "The outputs up to float32 rounding, and every layer's name; weights and biases move between layers."
)
TOLERANCE = 1e-4
READS_DATA = True
NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
CONVERGED = 1e-9  # largest change of a factor's logarithm in one sweep
WORTH = 1e-3  # factors whose logarithms are all smaller change nothing worth a change of the weights
SWEEPS = 200
DEAD = 1e-5  # of the largest channel's maximum: a smaller one is not blown up

Batches = Iterable[tuple[Tensor, ...]]


@dataclass
class Group:
    """A layer or norm that gives channels, and all layers that read them (q, k and v behind one norm)."""

    source: fx.Node
    readers: list[tuple[fx.Node, int]]
    count: int
    largest: Tensor = field(default_factory=lambda: torch.zeros(0))  # of |x| per channel, float64 [C]


def apply(gm: fx.GraphModule, *, batches: Batches, alpha: float = 0.5) -> list[str]:
    """Divides channel j by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) and multiplies the weights that read it.

    The factor goes into what gives the channel: a norm with a gain, a convolution or a linear layer, through
    operators that a positive factor per channel can pass. All layers that read one norm share its factors, and
    max|w_j| is over all of them. Chains of layers are swept until nothing changes. Channels that are next to zero on
    the data, or that no weight reads, stay.

    Args:
        gm: float graph, changed in place.
        batches: calibration inputs, read once; maxima per channel are all that is kept.
        alpha: how much of the difficulty moves, from 0 (none of the activations') to 1 (all of it).

    Raises:
        RecipeError: alpha is not between 0 and 1.
        CalibrationError: no batches, or activations that are not finite.
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"smooth_quant: alpha is {alpha:g}, expected a number from 0 to 1; 0.5 is usual")
    groups, notes = _groups(gm)
    if not groups:
        return notes
    _measure(gm, groups, batches)
    layers = {str(node.target): _layer(node, gm) for group in groups for node, _ in group.readers}
    layers |= {str(g.source.target): _layer(g.source, gm) for g in groups if weighted(g.source, gm)}
    weights = {name: layer.weight.detach().double() for name, layer in layers.items()}
    factors = _sweep(groups, layers, weights, alpha)
    for group in groups:
        factor = factors[group.source]
        name = str(group.source.target)
        readers = ", ".join(str(node.target) for node, _ in group.readers)
        if float(factor.log().abs().max()) <= WORTH:
            notes.append(f"{name} -> {readers}: smooth already")
            continue
        _divide(group, factor, gm)
        for node, repeat in group.readers:
            layer = layers[str(node.target)]
            weight = scale_inputs(layer, layer.weight.detach().double(), factor.repeat_interleave(repeat))
            store(str(node.target), layer, weight, _bias(layer))
        notes.append(f"{name} -> {readers}: smoothed, factors {factor.min():.3g} to {factor.max():.3g}")
    return notes


def _groups(gm: fx.GraphModule) -> tuple[list[Group], list[str]]:
    shared = shared_parameters(gm)
    groups: list[Group] = []
    notes: list[str] = []
    for node in gm.graph.nodes:
        place = _channels(node, gm)
        if place is None:
            continue
        at, count = place
        readers = spread(node, at, count, gm)
        reason = (
            readers if isinstance(readers, str) else _obstacle([node, *(r for r, _ in readers)], gm, shared)
        )
        if isinstance(readers, str) or reason is not None:
            notes.append(f"{node.target} not smoothed: {reason}")
        elif readers:
            groups.append(Group(node, readers, count, torch.zeros(count, dtype=torch.float64)))
    return groups, notes


def _channels(node: fx.Node, gm: fx.GraphModule) -> tuple[Channels, int] | None:
    """Where a node's output has the channels that its own gain scales, and how many; None where it has none."""
    module = module_of(node, gm)
    if (layer := weighted(node, gm)) is not None:
        rank = len(shape_of(node))
        axis = rank - 1 if isinstance(layer, nn.Linear) else rank - layer.weight.dim() + 1
        return Channels(axis), channels_out(layer)
    if not isinstance(module, NORMS) or module.weight is None:
        return None
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return Channels(1), len(module.weight)
    if len(module.normalized_shape) != 1:
        return None
    return Channels(len(shape_of(node)) - 1), len(module.weight)


def _obstacle(nodes: list[fx.Node], gm: fx.GraphModule, shared: set[int]) -> str | None:
    for node in nodes:
        module = module_of(node, gm)
        assert module is not None
        if not calls_once(node, gm):
            return f"{node.target} is called more than once"
        if is_shared(module, shared):
            return f"{node.target} shares a parameter with another layer"
    return None


def _measure(gm: fx.GraphModule, groups: list[Group], batches: Batches) -> None:
    readers = {node.name: (group, repeat) for group in groups for node, repeat in group.readers}
    count = 0
    with torch.no_grad(), in_eval_mode(gm):
        for count, inputs in enumerate(batches, 1):  # noqa: B007
            _Maxima(gm, readers).run(*inputs)
    if not count:
        raise CalibrationError("smooth_quant got no batches: give calibration data")
    for group in groups:
        if not bool(torch.isfinite(group.largest).all()):
            raise CalibrationError(
                f"smooth_quant: the inputs of {str(group.readers[0][0].target)!r} are not finite on the calibration "
                "data; look for NaN or infinite values in the data or the weights"
            )


class _Maxima(fx.Interpreter):
    """Runs a graph and widens each group's maxima by what its readers get."""

    def __init__(self, gm: fx.GraphModule, readers: dict[str, tuple[Group, int]]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.readers = readers

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.readers:
            group, repeat = self.readers[n.name]
            x = self.env[n.all_input_nodes[0]].abs()
            layer = self.fetch_attr(str(n.target))
            axis = x.dim() - 1 - (0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2)
            others = [d for d in range(x.dim()) if d != axis]
            largest = (x.amax(others) if others else x).double().reshape(group.count, repeat).amax(1)
            group.largest = torch.maximum(group.largest, largest.cpu())
        return super().run_node(n)


def _sweep(
    groups: list[Group], layers: dict[str, Weighted], weights: dict[str, Tensor], alpha: float
) -> dict[fx.Node, Tensor]:
    """Each group's factors: what one group does to a layer's weights, the group behind it must see."""
    total = {group.source: torch.ones(group.count, dtype=torch.float64) for group in groups}
    for _ in range(SWEEPS):
        changed = 0.0
        for group in groups:
            parts = [
                by_input(layers[name], weights[name]).reshape(group.count, -1).abs().amax(1)
                for name in (str(node.target) for node, _ in group.readers)
            ]
            reading = torch.stack(parts).amax(0)
            dead = (group.largest <= DEAD * group.largest.max()) | (reading == 0)
            found = group.largest.pow(alpha) / reading.pow(1 - alpha)
            factor = torch.where(dead, 1.0, found)
            changed = max(changed, float(factor.log().abs().max()))
            group.largest = group.largest / factor
            total[group.source] = total[group.source] * factor
            for node, repeat in group.readers:
                name = str(node.target)
                weights[name] = scale_inputs(layers[name], weights[name], factor.repeat_interleave(repeat))
            name = str(group.source.target)
            if name in weights:
                weights[name] = scale_outputs(layers[name], weights[name], 1 / factor)
        if changed <= CONVERGED:
            break
    return total


def _divide(group: Group, factor: Tensor, gm: fx.GraphModule) -> None:
    """What gives the channels gives them divided by the factor."""
    name, module = str(group.source.target), module_of(group.source, gm)
    layer = weighted(group.source, gm)
    assert module is not None
    bias = getattr(module, "bias", None)  # RMSNorm has none
    bias = None if bias is None else bias.detach().double() / factor
    if layer is not None:
        store(name, layer, scale_outputs(layer, layer.weight.detach().double(), 1 / factor), bias)
        if (known := moments(group.source)) is not None:
            set_moments(group.source, known[0] / factor, known[1] / factor)
    else:
        store(name, module, module.get_parameter("weight").detach().double() / factor, bias)


def _layer(node: fx.Node, gm: fx.GraphModule) -> Weighted:
    layer = weighted(node, gm)
    assert layer is not None
    return layer


def _bias(layer: Weighted) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().double()
