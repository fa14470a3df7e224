"""The mean of each layer's input, told by batch norms and carried through a graph without running it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.model.graph import module_of
from fewbit.model.operators import operator
from fewbit.model.sites import clamp_bounds
from fewbit.passes._layers import channels_in, moments, weighted
from fewbit.passes._paths import Channels, shape_of, through

aten = torch.ops.aten
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Known:
    """What is known of a value: where its channels are, their means, and their variances unless these are lost."""

    at: Channels
    mean: Tensor
    var: Tensor | None


def expected_inputs(gm: fx.GraphModule) -> dict[str, Tensor]:
    """By layer, the mean of each input channel, float64 [inputs], wherever batch norms tell it.

    Values are taken for Gaussian before a clamp and for independent before an addition. A layer that is called
    several times has the mean over its calls.
    """
    known: dict[fx.Node, Known] = {}
    found: dict[str, list[Tensor | None]] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "call_function"):
            continue
        if weighted(node, gm) is not None:
            found.setdefault(str(node.target), []).append(_arrived(node, known, gm))
        value = _value(node, known, gm)
        if value is not None:
            known[node] = value
    return {
        name: torch.stack(means).mean(0)  # type: ignore[arg-type]
        for name, means in found.items()
        if all(mean is not None for mean in means)
    }


def _arrived(node: fx.Node, known: dict[fx.Node, Known], gm: fx.GraphModule) -> Tensor | None:
    layer = weighted(node, gm)
    source = node.args[0]
    assert layer is not None
    if not isinstance(source, fx.Node) or source not in known:
        return None
    value = known[source]
    rank = len(shape_of(source))
    axis = rank - 1 if isinstance(layer, nn.Linear) else rank - layer.weight.dim() + 1
    mean = value.mean.repeat_interleave(value.at.repeat)
    return mean if axis == value.at.axis and len(mean) == channels_in(layer) else None


def _value(node: fx.Node, known: dict[fx.Node, Known], gm: fx.GraphModule) -> Known | None:
    """What is known of a node's output."""
    module = module_of(node, gm)
    if (layer := weighted(node, gm)) is not None:
        noted = moments(node)
        rank = len(shape_of(node))
        axis = rank - 1 if isinstance(layer, nn.Linear) else rank - layer.weight.dim() + 1
        return None if noted is None else Known(Channels(axis), noted[0], noted[1].square())
    if isinstance(module, BATCH_NORM) and module.running_mean is not None:
        ones = torch.ones(module.num_features, dtype=torch.float64)
        gain = ones if module.weight is None else module.weight.detach().double()
        mean = 0 * ones if module.bias is None else module.bias.detach().double()
        return Known(Channels(1), mean, gain.square())
    sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if not sources or any(source not in known for source in sources) or "shape" not in node.meta:
        return None
    if len(sources) == 2:
        return _added(node, known[sources[0]], known[sources[1]], gm)
    return _passed(node, sources[0], known[sources[0]], gm) if len(sources) == 1 else None


def _added(node: fx.Node, a: Known, b: Known, gm: fx.GraphModule) -> Known | None:
    op = operator(node, gm)
    if op is None or op.name != "add" or a.at != b.at or len(a.mean) != len(b.mean) or node.kwargs:
        return None
    var = None if a.var is None or b.var is None else a.var + b.var
    return Known(a.at, a.mean + b.mean, var)


def _passed(node: fx.Node, source: fx.Node, value: Known, gm: fx.GraphModule) -> Known | None:
    op = operator(node, gm)
    name = op.name if op is not None else ""
    bounds = clamp_bounds(node, gm)
    if bounds is not None:
        return None if value.var is None else Known(value.at, *clipped(value.mean, value.var, *bounds))
    if name == "slice" and _keeps_channels(node, source, value.at):
        return value
    if name == "pad":
        return _padded(node, source, value)
    if name in (
        "max_pool",
        "max",
        "leaky_relu",
        "prelu",
        "mul",
        "div",
    ):  # the mean changes, and not by a rule
        return None
    at = through(node, source, value.at, len(value.mean), gm)
    if isinstance(at, str):
        return None
    averaged = name in ("avg_pool", "adaptive_avg_pool", "global_avg_pool", "mean")
    return Known(at, value.mean, None if averaged else value.var)


def _keeps_channels(node: fx.Node, source: fx.Node, at: Channels) -> bool:
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return node.target is aten.slice.Tensor and axis % len(shape_of(source)) != at.axis


def _padded(node: fx.Node, source: fx.Node, value: Known) -> Known | None:
    """Channels that are padded with zeros are zero; zeros around a picture are overlooked."""
    pads: Any = node.args[1]
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    fill = node.args[3] if len(node.args) > 3 else node.kwargs.get("value", None)
    if mode != "constant" or fill or value.at.repeat != 1:
        return None
    index = 2 * (len(shape_of(source)) - 1 - value.at.axis)
    low, high = pads[index : index + 2] if index < len(pads) else (0, 0)
    if not (isinstance(low, int) and isinstance(high, int)) or min(low, high) < 0:
        return None
    mean, var = (None if v is None else nn.functional.pad(v, (low, high)) for v in (value.mean, value.var))
    assert mean is not None
    return Known(value.at, mean, var)


def clipped(mean: Tensor, var: Tensor, lo: float, hi: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of Gaussians after a clamp to [lo, hi]: float64 [C] each."""
    std = var.sqrt().clamp_min(1e-30)
    a, b = (lo - mean) / std, (hi - mean) / std
    below, above = _cdf(a), _cdf(-b)
    inside = 1 - below - above
    da, db = _density(a), _density(b)
    first = mean * inside + std * (da - db)
    second = (mean.square() + var) * inside + std * (_times(lo + mean, da) - _times(hi + mean, db))
    first = first + _times(lo, below) + _times(hi, above)
    second = second + _times(lo**2, below) + _times(hi**2, above)
    return first, (second - first.square()).clamp_min(0.0)


def _times(value: Any, weight: Tensor) -> Tensor:
    """Their product, zero where the weight is: an infinite bound is never reached."""
    return torch.where(weight == 0, torch.zeros_like(weight), value * weight)


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
