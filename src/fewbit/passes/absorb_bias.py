"""High-bias absorption: what a channel never falls below is added behind the next layer instead.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.1.3
(arXiv 1906.04721).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import CalibrationError
from fewbit.model.graph import in_eval_mode, module_of
from fewbit.model.operators import operator
from fewbit.passes._layers import (
    Weighted,
    channels_out,
    is_shared,
    moments,
    set_moments,
    shared_parameters,
    store,
    weighted,
)
from fewbit.passes._paths import Path, calls_once, follow

PRESERVES = (
    "The outputs up to float32 rounding on the batches it was given; without batches, wherever a channel is no "
    "more than three standard deviations below its mean."
)
TOLERANCE = None  # inputs that fall below what was seen are answered differently
READS_DATA = True
SIGMAS = 3.0
WORTH = 1e-3  # of the channel's largest value: less is not worth moving
# What lies between must give x - c for x - c: it is the identity for large x, or averages or selects.
BETWEEN = {"relu", "dropout", "max_pool", "avg_pool", "adaptive_avg_pool", "global_avg_pool", "mean", "max",
           "transpose", "reshape", "leaky_relu", "prelu"}  # fmt: skip

Batches = Iterable[tuple[Tensor, ...]]


def apply(gm: fx.GraphModule, *, batches: Batches | None = None) -> list[str]:
    """Takes c from a layer's bias, per channel, and adds what c would have given to the next layer's, in place.

    Two layers are a pair as for `equalize`, with a ReLU between, and where the second one does not pad: a padded
    zero is no channel's lower end. c is the smallest value of the channel before the ReLU on the batches, if that
    is positive; without batches, mean - 3 standard deviations of the batch norm that was folded into the layer.
    The channel then starts near zero, so that its range holds no numbers that never occur.

    Raises:
        CalibrationError: batches are given and there are none in them.
    """
    paths, notes = _paths(gm)
    least = _least(gm, paths, batches)
    for path in paths:
        pair = f"{path.first.target} -> {path.second.target}"
        if path.first.name not in least:
            notes.append(f"{pair}: nothing absorbed: no batch norm was folded into {path.first.target}")
            continue
        lowest, size = least[path.first.name]
        absorbed = torch.where(lowest > WORTH * size, lowest, 0.0)
        count = int((absorbed > 0).sum())
        if count:
            _move(path, absorbed, gm)
        notes.append(f"{pair}: absorbed from {count} of {len(absorbed)} channels")
    return notes


def _paths(gm: fx.GraphModule) -> tuple[list[Path], list[str]]:
    shared = shared_parameters(gm)
    found: list[Path] = []
    notes: list[str] = []
    for node in gm.graph.nodes:
        if weighted(node, gm) is None or any(reader.op == "output" for reader in node.users):
            continue
        path = follow(node, gm)
        reason = path if isinstance(path, str) else _obstacle(path, gm, shared)
        if isinstance(path, str) or reason is not None:
            notes.append(f"{node.target}: nothing absorbed: {reason}")
        else:
            found.append(path)
    return found, notes


def _obstacle(path: Path, gm: fx.GraphModule, shared: set[int]) -> str | None:
    second = module_of(path.second, gm)
    for node in (path.first, path.second):
        module = module_of(node, gm)
        assert module is not None
        if not calls_once(node, gm):
            return f"{node.target} is called more than once"
        if is_shared(module, shared):
            return f"{node.target} shares a parameter with another layer"
    if not isinstance(second, nn.Linear) and _pads(second):
        return f"{path.second.target} pads its input with zeros"
    names = set()
    node = next(iter(path.first.users))
    while node is not path.second:
        op = operator(node, gm)
        name = op.name if op is not None else ""
        if name not in BETWEEN:
            return f"{node.name!r} does not let a constant pass"
        if name in ("avg_pool", "max_pool") and _padded_pool(node):
            return f"{node.name!r} pads"
        names.add(name)
        node = next(iter(node.users))
    return None if names & {"relu", "leaky_relu", "prelu"} else "no ReLU between: its range has no lower end"


def _pads(layer: Any) -> bool:
    """Whether zeros come in from the side; a transposed convolution does not add all its taps at the edges."""
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return True
    return layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))


def _padded_pool(node: fx.Node) -> bool:
    """Average pooling with padding mixes zeros in; its last window may reach beyond the edge (ceil_mode)."""
    padding: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
    pads = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    ceil: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("ceil_mode", False)
    return "avg" in str(node.target) and (pads or bool(ceil))


def _least(
    gm: fx.GraphModule, paths: list[Path], batches: Batches | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """By node, the lower and the upper end of each first layer's output, float64 [C]."""
    if batches is None:
        known = {path.first.name: moments(path.first) for path in paths}
        return {
            name: (m[0] - SIGMAS * m[1], m[0] + SIGMAS * m[1]) for name, m in known.items() if m is not None
        }
    least: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0
    with torch.no_grad(), in_eval_mode(gm):
        for count, inputs in enumerate(batches, 1):  # noqa: B007
            _Ends(gm, {path.first.name for path in paths}, least).run(*inputs)
    if not count:
        raise CalibrationError("absorb_bias got no batches: give calibration data")
    return least


class _Ends(fx.Interpreter):
    """Runs a graph and widens each chosen layer's ends by what it gives."""

    def __init__(self, gm: fx.GraphModule, names: set[str], ends: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.names, self.ends = names, ends

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            layer = self.fetch_attr(str(n.target))
            axis = result.dim() - 1 - (0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2)
            others = [d for d in range(result.dim()) if d != axis]
            lo, hi = ((f(result, others) if others else result).double() for f in (torch.amin, torch.amax))
            least, most = self.ends.get(n.name, (lo, hi))
            self.ends[n.name] = (torch.minimum(least, lo), torch.maximum(most, hi))
        return result


def _move(path: Path, absorbed: Tensor, gm: fx.GraphModule) -> None:
    first, second = weighted(path.first, gm), weighted(path.second, gm)
    assert first is not None and second is not None
    store(str(path.first.target), first, first.weight.detach().double(), _bias(first) - absorbed)
    taps = 1 if isinstance(second, nn.Linear) else math.prod(second.kernel_size)
    weight = (
        second.weight.detach().double().flatten(1).reshape(channels_out(second), -1, taps).sum(-1)
    )  # [outputs, inputs of a group]
    groups = 1 if isinstance(second, nn.Linear) else second.groups
    inputs = absorbed.repeat_interleave(path.repeat).reshape(groups, 1, -1)
    moved = (weight.reshape(groups, -1, weight.shape[1]) * inputs).sum(-1).flatten()
    store(str(path.second.target), second, second.weight.detach().double(), _bias(second) + moved)
    if (known := moments(path.first)) is not None:
        set_moments(path.first, known[0] - absorbed, known[1])


def _bias(layer: Weighted) -> Tensor:
    if layer.bias is None:
        return torch.zeros(channels_out(layer), dtype=torch.float64)
    return layer.bias.detach().double()
