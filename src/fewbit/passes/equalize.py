"""Cross-layer equalization of weights.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.1
(arXiv 1906.04721).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fewbit.errors import ModelError
from fewbit.passes._layers import (
    Weighted,
    by_input,
    by_output,
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
from fewbit.passes._paths import Path, calls_once, follow

PRESERVES = (
    "The outputs up to float32 rounding, and every layer's name; weights and biases move between layers."
)
TOLERANCE = 1e-4
CONVERGED = 1e-6  # largest change of a factor's logarithm in one sweep
SWEEPS = 200
CONSTANT = 1e4  # a bias this many times larger than all weights of its channel


@dataclass
class Values:
    """A layer's weight and bias in float64 while factors move through it."""

    layer: Weighted
    weight: Tensor
    bias: Tensor | None


def apply(gm: fx.GraphModule) -> list[str]:
    """Gives each channel between two layers the same largest weight on both sides, in place.

    Two layers (convolution, transposed convolution, linear; grouped and depthwise too) are a pair when the
    first is read by nothing but the second, through operators that a positive factor per channel can pass:
    relu, leaky relu, pooling, mean over other axes, flatten, zero padding. With r1 and r2 the largest
    magnitudes of channel i in the first layer's outputs and the second's inputs, output i and its bias are
    divided by sqrt(r1 / r2) and input i is multiplied by it, after which both are sqrt(r1 * r2). Chains of
    pairs are swept until nothing changes. Channels whose weights are zero on one side, or next to nothing
    beside their bias, stay as they are and are reported.

    Raises:
        ModelError: a weight is not finite.
    """
    paths, notes = _paths(gm)
    values: dict[str, Values] = {}
    for path in paths:
        for node in (path.first, path.second):
            values.setdefault(str(node.target), _values(node, gm))
    moved = _sweep(paths, values)
    touched = {str(node.target) for path in moved for node in (path.first, path.second)}
    for name in touched:
        store(name, values[name].layer, values[name].weight, values[name].bias)
    for path, factor in moved.items():
        if (known := moments(path.first)) is not None:
            set_moments(path.first, known[0] / factor, known[1] / factor)
    return [*(_note(path, values, moved.get(path)) for path in paths), *notes]


def _paths(gm: fx.GraphModule) -> tuple[list[Path], list[str]]:
    shared = shared_parameters(gm)
    paths: list[Path] = []
    notes: list[str] = []
    for node in gm.graph.nodes:
        layer = weighted(node, gm)
        if layer is None:
            continue
        found = _usable(node, gm, shared) or follow(node, gm)
        if isinstance(found, Path):
            found = _usable(found.second, gm, shared) or found
        if isinstance(found, Path):
            paths.append(found)
        elif not any(reader.op == "output" for reader in node.users):
            notes.append(f"{node.target} not equalized with a later layer: {found}")
    return paths, notes


def _usable(node: fx.Node, gm: fx.GraphModule, shared: set[int]) -> str | None:
    layer = weighted(node, gm)
    assert layer is not None
    if not calls_once(node, gm):
        return f"{node.target} is called more than once"
    if is_shared(layer, shared):
        return f"{node.target} shares a parameter with another layer"
    return None


def _values(node: fx.Node, gm: fx.GraphModule) -> Values:
    layer = weighted(node, gm)
    assert layer is not None
    weight = layer.weight.detach().double()
    if not bool(torch.isfinite(weight).all()):
        index = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise ModelError(
            f"layer {str(node.target)!r}: weight is {weight[tuple(index)].item()} at {index}: expected "
            "finite numbers; repair or retrain the layer first"
        )
    return Values(layer, weight, None if layer.bias is None else layer.bias.detach().double())


def _ranges(path: Path, values: dict[str, Values]) -> tuple[Tensor, Tensor]:
    """Largest magnitudes per channel, float64 [C]: over the first layer's outputs and the second's inputs."""
    first, second = values[str(path.first.target)], values[str(path.second.target)]
    count = channels_out(first.layer)
    r1 = by_output(first.layer, first.weight).reshape(count, -1).abs().amax(1)
    r2 = by_input(second.layer, second.weight).reshape(count, -1).abs().amax(1)
    return r1, r2


def _sweep(paths: list[Path], values: dict[str, Values]) -> dict[Path, Tensor]:
    """Equalize pair after pair until no factor changes; returns each moved pair's factors."""
    total: dict[Path, Tensor] = {}
    active = list(paths)
    for _ in range(SWEEPS):
        changed: set[str] = set()
        for path in active:
            r1, r2 = _ranges(path, values)
            factor = torch.where(_left(path, values, r1, r2), 1.0, (r1 / r2).sqrt())
            if float(factor.log().abs().max()) <= CONVERGED:
                continue
            _move(path, values, factor)
            total[path] = total.get(path, torch.ones_like(factor)) * factor
            changed |= {str(path.first.target), str(path.second.target)}
        # A pair needs another look only when a neighbour changed one of its layers.
        active = [p for p in paths if {str(p.first.target), str(p.second.target)} & changed]
        if not changed:
            break
    return total


def _left(path: Path, values: dict[str, Values], r1: Tensor, r2: Tensor) -> Tensor:
    """Which channels no factor is for, bool [C]: one side is zero, or the channel is constant but for rounding.

    A channel that a small gain switched off has tiny weights and a bias. To equalize it would blow the bias up,
    and the range of the whole tensor with it. The ratio that tells does not depend on the factor.
    """
    bias = values[str(path.first.target)].bias
    left = (r1 == 0) | (r2 == 0)
    return left if bias is None else left | (bias.abs() > CONSTANT * r1)


def _move(path: Path, values: dict[str, Values], factor: Tensor) -> None:
    first, second = values[str(path.first.target)], values[str(path.second.target)]
    first.weight = scale_outputs(first.layer, first.weight, 1 / factor)
    if first.bias is not None:
        first.bias = first.bias / factor
    second.weight = scale_inputs(second.layer, second.weight, factor.repeat_interleave(path.repeat))


def _note(path: Path, values: dict[str, Values], factor: Tensor | None) -> str:
    r1, r2 = _ranges(path, values)
    left = _left(path, values, r1, r2).nonzero().flatten().tolist()
    pair = f"{path.first.target} -> {path.second.target}"
    done = "already equal"
    if factor is not None:
        done = f"equalized, factors up to {float(factor.log().abs().max().exp()):.3g}"
    return f"{pair}: {done}" + (f"; channels {left} are dead or constant and stay" if left else "")
