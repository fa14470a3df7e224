"""Keras layers that move, repeat, pad or select numbers, and those that do nothing at inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.errors import ModelError
from fewbit.model.keras_convolutions import channel_axis, crop
from fewbit.model.keras_layout import Assembly, Value, channels_second, identity, moves_nothing
from fewbit.model.keras_weights import parameters


def flatten(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """One axis behind the batch, channels last whatever the data format."""
    if x.rank == 1:
        return Value(b.function(path, torch.unsqueeze, x.node, 1), (0, 1))
    axes = identity(x.rank)
    if layer.data_format == "channels_first" and x.rank > 2:
        axes = (0, *range(2, x.rank), 1)
    if not moves_nothing(x.stored, [x.dim(axis) for axis in axes]):
        x = b.stored_as(x, axes, path)
    return Value(b.function(path, torch.flatten, x.node, 1), (0, 1)) if x.rank > 2 else x


def reshape(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    return reshaped(b, path, x, list(layer.target_shape))


def reshaped(b: Assembly, path: str, x: Value, target: list[int]) -> Value:
    """``x`` with these sizes behind the batch; a picture of one point comes out as convolutions want it."""
    if not moves_nothing(x.stored, [x.dim(axis) for axis in range(x.rank)]):
        x = b.as_keras(x, path)
    if b.free_sizes and -1 in target:
        node = b.function(f"{path}.flatten", torch.flatten, x.node, 1) if x.rank > 2 else x.node
        return Value(b.function(path, torch.unflatten, node, 1, tuple(target)), identity(len(target) + 1))
    if -1 in target:
        rest = x.node.meta["val"].numel() // x.stored[0]
        known = 1
        for size in target:
            known *= size if size != -1 else 1
        target[target.index(-1)] = rest // known
    order = identity(len(target) + 1)
    if len(target) > 1 and all(size == 1 for size in target[:-1]):
        order = channels_second(len(order))
    sizes = [(0, *target)[axis] for axis in order]
    return Value(b.function(path, torch.reshape, x.node, (-1, *sizes[1:])), order)


def permute(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Other names for the same axes: nothing moves until somebody needs it to."""
    return transposed(x, (0, *layer.dims))


def transposed(x: Value, axes: Sequence[int]) -> Value:
    """The value whose axis ``i`` is the axis ``axes[i]`` of ``x``."""
    axes = [axis % x.rank for axis in axes]
    return Value(x.node, tuple(axes.index(axis) for axis in x.order))


def repeat_vector(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    return Value(b.function(path, _repeated, x.node, layer.n), (0, 1, 2))


def _repeated(x: Tensor, count: int) -> Tensor:
    return x.unsqueeze(1).expand(-1, count, -1)


def zero_padding(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    pairs = _pairs(layer.padding, x.rank - 2)
    sides: dict[int, tuple[int, int]] = dict(zip(_places(layer, x), pairs, strict=True))
    pads = [side for dim in range(x.rank - 1, -1, -1) for side in sides.get(dim, (0, 0))]
    while pads and not any(pads[-2:]):
        del pads[-2:]
    return x.same(b.function(path, F.pad, x.node, pads)) if pads else x


def cropping(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    node = x.node
    for dim, (start, end) in zip(_places(layer, x), _pairs(layer.cropping, x.rank - 2), strict=True):
        if start or end:
            node = b.function(path, crop, node, dim, start, end)
    return x.same(node)


def _pairs(value: Any, dims: int) -> list[tuple[int, int]]:
    """What Keras takes for both ends of each dimension: numbers, or pairs of them."""
    if dims == 1 and not isinstance(value[0], list | tuple):
        return [(int(value[0]), int(value[1]))]
    return [(int(start), int(end)) for start, end in value]


def _places(layer: Any, x: Value) -> list[int]:
    """Where the axes of a picture are stored."""
    channel = channel_axis(layer) % x.rank if hasattr(layer, "data_format") else x.rank - 1
    return [x.dim(axis) for axis in range(1, x.rank) if axis != channel]


def up_sampling(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Rows and columns repeated, or interpolated."""
    mode = getattr(layer, "interpolation", "nearest")
    if mode not in ("nearest", "bilinear"):
        raise ModelError(
            f"{path} interpolates by {mode!r}: expected 'nearest' or 'bilinear'; choose one of them"
        )
    size = layer.size if isinstance(layer.size, list | tuple) else (layer.size,)
    scale = [float(factor) for factor in size]
    x = b.channels_second(x, path, channel_axis(layer) if hasattr(layer, "data_format") else -1)
    if mode == "nearest":
        return x.same(b.function(path, F.interpolate, x.node, scale_factor=scale, mode="nearest"))
    return x.same(b.function(path, F.interpolate, x.node, scale_factor=scale, mode=mode, align_corners=False))


def resizing(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Another height and width, interpolated."""
    x = b.channels_second(x, path, channel_axis(layer))
    size = (int(layer.height), int(layer.width))
    return x.same(b.function(path, F.interpolate, x.node, size=size, mode="bilinear", align_corners=False))


def dropout(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Nothing at inference; kept, so that training the graph drops as training in Keras does."""
    return x.same(b.module(path, lambda: nn.Dropout(float(layer.rate)), x.node)) if layer.rate else x


def spatial_dropout(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Whole channels are dropped."""
    if not layer.rate:
        return x
    x = b.channels_second(x, path, channel_axis(layer) if hasattr(layer, "data_format") else -1)
    made = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[x.rank - 3]
    return x.same(b.module(path, lambda: made(float(layer.rate)), x.node))


def alpha_dropout(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    return x.same(b.module(path, lambda: nn.AlphaDropout(float(layer.rate)), x.node)) if layer.rate else x


def nothing(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """A layer that acts in training only, and that PyTorch has no counterpart of."""
    if type(layer).__name__ != "Identity":
        b.notes.append(f"{path}: {type(layer).__name__} acts in training only and was not kept")
    return x


def embedding(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Rows of a table."""
    x = b.as_keras(x, path)
    node = x.node
    if node.meta["val"].is_floating_point():
        node = b.function(f"{path}.to", torch.Tensor.to, node, torch.int32)
    made = nn.Embedding(layer.input_dim, layer.output_dim)
    node = b.module(path, lambda: parameters(made, layer, weight=layer.embeddings), node)
    return Value(node, identity(x.rank + 1))
