"""Follows a layer's output, through operators that a positive factor per channel can pass, to its reader."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fewbit.model.graph import module_of
from fewbit.model.operators import operator
from fewbit.passes._layers import channels_in, channels_out, weighted

aten = torch.ops.aten
POINTWISE = ("relu", "leaky_relu", "prelu", "dropout")
SPATIAL = ("max_pool", "avg_pool", "adaptive_avg_pool", "global_avg_pool", "interpolate", "pad")
CLAMPS = ("relu6", "hardtanh", "clamp")


@dataclass(frozen=True)
class Channels:
    """Where a layer's output channels lie in a tensor: channel c at `repeat` consecutive places of `axis`."""

    axis: int
    repeat: int = 1


Found = Channels | str


@dataclass(frozen=True)
class Path:
    """A layer, the only layer that reads it, and how many inputs of that one come from one output channel."""

    first: fx.Node
    second: fx.Node
    repeat: int


def follow(first: fx.Node, gm: fx.GraphModule) -> Path | str:
    """The path from `first`, a convolution or linear layer, to the next such layer; or why there is none."""
    layer = weighted(first, gm)
    assert layer is not None
    rank = len(shape_of(first))
    axis = rank - 1 if isinstance(layer, nn.Linear) else rank - layer.weight.dim() + 1
    channels: Channels | str = Channels(axis)
    node = first
    while isinstance(channels, Channels):
        readers = list(node.users)
        if len(readers) != 1:
            return f"the output of {node.name!r} is read by {len(readers)} operators"
        source, node = node, readers[0]
        if weighted(node, gm) is not None:
            repeat = _arrive(source, node, channels, channels_out(layer), gm)
            return repeat if isinstance(repeat, str) else Path(first, node, repeat)
        channels = through(node, source, channels, channels_out(layer), gm)
    return channels


def spread(source: fx.Node, at: Channels, count: int, gm: fx.GraphModule) -> list[tuple[fx.Node, int]] | str:
    """All layers that read the `count` channels of `source`, each with its repeat; or what else reads them."""
    found: list[tuple[fx.Node, int]] = []
    for node in source.users:
        if node.op == "output":
            return f"{source.name!r} is an output of the model"
        if weighted(node, gm) is not None:
            repeat = _arrive(source, node, at, count, gm)
            inner: list[tuple[fx.Node, int]] | str = repeat if isinstance(repeat, str) else [(node, repeat)]
        else:
            passed = through(node, source, at, count, gm)
            inner = passed if isinstance(passed, str) else spread(node, passed, count, gm)
        if isinstance(inner, str):
            return inner
        found += inner
    return found


def _arrive(source: fx.Node, second: fx.Node, at: Channels, count: int, gm: fx.GraphModule) -> int | str:
    """How many inputs of the layer `second` come from one of the `count` channels of `source`."""
    layer = weighted(second, gm)
    assert layer is not None
    rank = len(shape_of(source))
    axis = rank - 1 if isinstance(layer, nn.Linear) else rank - layer.weight.dim() + 1
    if axis != at.axis or channels_in(layer) != count * at.repeat:
        return f"its channels are not the input channels of {second.target}"
    return at.repeat


def through(node: fx.Node, source: fx.Node, at: Channels, count: int, gm: fx.GraphModule) -> Found:
    """Where the channels are after `node`, which reads `source`; the reason when a factor cannot pass."""
    op = operator(node, gm)
    name = op.name if op is not None else ""
    stop = f"{node.name!r} does not let a factor per channel pass"
    if name in CLAMPS:
        return f"{node.name!r} clamps at fixed values, so a factor cannot pass"
    if "shape" not in node.meta:  # an operator with several results
        return stop
    if name in POINTWISE or (name in ("mul", "div") and _by_number(node)):
        return at
    if name in SPATIAL:
        return at if at.axis < len(shape_of(source)) - _spatial_dims(node) and _pads_zeros(node) else stop
    if name in ("mean", "max"):
        return _reduced(node, source, at) or stop
    if name == "transpose":
        return _transposed(node, source, at)
    if name == "reshape":
        return _reshaped(node, source, at, count) or stop
    return stop


def _by_number(node: fx.Node) -> bool:
    return len(node.args) == 2 and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int | float)


def _spatial_dims(node: fx.Node) -> int:
    if node.target is aten.pad.default:
        return len(tuple(node.args[1])) // 2  # type: ignore[arg-type]
    digits = re.search(r"([123])d", str(node.target))
    return int(digits.group(1)) if digits else 3


def _pads_zeros(node: fx.Node) -> bool:
    """Whether a pad puts in zeros or values of the same channel, which scale with it."""
    if node.target is not aten.pad.default:
        return True
    mode = _argument(node, 2, "mode", "constant")
    return mode != "constant" or not _argument(node, 3, "value", None)


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _reduced(node: fx.Node, source: fx.Node, at: Channels) -> Channels | None:
    """After a mean or maximum over other axes."""
    rank = len(shape_of(source))
    over = _argument(node, 1, "dim", None)
    if node.target not in (aten.mean.dim, aten.amax.default) or not over:
        return None
    axes = {axis % rank for axis in over}
    if at.axis in axes:
        return None
    keep = bool(_argument(node, 2, "keepdim", False))
    return Channels(at.axis if keep else at.axis - sum(axis < at.axis for axis in axes), at.repeat)


def _transposed(node: fx.Node, source: fx.Node, at: Channels) -> Channels:
    rank = len(shape_of(source))
    order = list(range(rank))
    if node.target is aten.transpose.int:
        a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = b, a
    else:
        order = [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    return Channels(order.index(at.axis), at.repeat)


def _reshaped(node: fx.Node, source: fx.Node, at: Channels, count: int) -> Channels | None:
    """After a reshape that keeps what is in front of the channel axis apart from it.

    Elements keep their row-major order, so each channel's block stays in one piece: an axis of the new
    shape holds the channels when as many elements are in front of it as were in front of the old one, and its
    size is a multiple of their number.
    """
    old, new = shape_of(source), shape_of(node)
    wanted = list(node.args[1]) if node.target is aten.reshape.default else []  # type: ignore[arg-type]
    if at.axis == 0 or not all(isinstance(size, int) for size in wanted):
        return None
    for axis in range(1, len(new)):
        in_front = math.prod(new[:axis]) == math.prod(old[: at.axis])
        # A free size may only be in front: behind, equal products could be an accident of the example.
        if in_front and new[axis] % count == 0 and new[axis] > 1 and -1 not in wanted[axis:]:
            return Channels(axis, new[axis] // count)
    return None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    shape = node.meta.get("shape")
    return tuple(node.meta["val"].shape if shape is None else shape)


def calls_once(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether no other node calls the same layer."""
    module = module_of(node, gm)
    return sum(n.op == "call_module" and module_of(n, gm) is module for n in gm.graph.nodes) == 1
