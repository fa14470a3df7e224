"""Keras's normalizations, and the two preprocessing layers that are plain arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import ModelError
from fewbit.model.keras_layout import Assembly, Value, channels_second
from fewbit.model.keras_weights import parameters, tensor

BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def batch_normalization(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Keras's momentum is what is kept, PyTorch's what is new; the channels go behind the batch."""
    axis = int(layer.axis) % x.rank
    if x.dim(axis) != 1:
        x = b.stored_as(x, channels_second(x.rank, axis), path)
    if x.rank not in BATCH_NORMS:
        raise ModelError(f"{path} normalizes {x.rank} dimensions: expected 2 to 5; reshape in front of it")

    def make() -> nn.Module:
        channels = int(layer.moving_mean.shape[0])
        made = BATCH_NORMS[x.rank](channels, eps=layer.epsilon, momentum=1 - layer.momentum)
        made.running_mean, made.running_var = tensor(layer.moving_mean), tensor(layer.moving_variance)
        return _scaled(made, layer)

    return x.same(b.module(path, make, x.node))


def _scaled(made: nn.Module, layer: Any) -> nn.Module:
    """The layer's own scale and shift; where it has none, ones and zeros that no training changes."""
    parameters(
        made, layer, weight=layer.gamma if layer.scale else None, bias=layer.beta if layer.center else None
    )
    for name, there in (("weight", layer.scale), ("bias", layer.center)):
        if not there and getattr(made, name) is not None:
            getattr(made, name).requires_grad_(False)
    return made


def layer_normalization(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Over the axes that Keras names, which go to the end."""
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    axes = sorted(axis % x.rank for axis in axes)
    rest = tuple(axis for axis in range(x.rank) if axis not in axes)
    x = b.stored_as(x, (*rest, *axes), path)
    shape = tuple(x.shape[axis] for axis in axes)
    if getattr(layer, "rms_scaling", False):
        return x.same(b.module(path, lambda: parameters(nn.RMSNorm(shape, layer.epsilon), layer,
                                                        weight=layer.gamma), x.node))  # fmt: skip
    return x.same(b.module(path, lambda: _scaled(nn.LayerNorm(shape, layer.epsilon), layer), x.node))


def rms_normalization(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    if layer.axis not in (-1, x.rank - 1, [-1], (-1,)):
        raise ModelError(f"{path} normalizes axis {layer.axis}: expected the last; permute in front of it")
    x = b.as_keras(x, path)
    made = nn.RMSNorm(x.shape[-1], layer.epsilon)
    return x.same(b.module(path, lambda: parameters(made, layer, weight=layer.scale), x.node))


def group_normalization(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    channel = int(layer.axis) % x.rank
    x = b.stored_as(x, channels_second(x.rank, channel), path)
    channels = x.stored[1]
    groups = channels if layer.groups == -1 else layer.groups
    return x.same(
        b.module(path, lambda: _scaled(nn.GroupNorm(groups, channels, layer.epsilon), layer), x.node)
    )


def layer_scale(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """A factor for each channel, as in the ConvNeXt models that come with Keras."""
    return _arithmetic(b, path, torch.mul, x, tensor(layer.gamma))


def rescaling(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """x * scale + offset."""
    y = _arithmetic(b, path, torch.mul, x, layer.scale)
    return y if _is_number(layer.offset, 0) else _arithmetic(b, path, torch.add, y, layer.offset)


def normalization(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """(x - mean) / deviation, or back with ``invert``."""
    from keras import config

    mean, deviation = tensor(layer.mean), tensor(layer.variance).sqrt().clamp(min=config.epsilon())
    if layer.invert:
        return _arithmetic(b, path, torch.add, _arithmetic(b, path, torch.mul, x, deviation), mean)
    return _arithmetic(b, path, torch.mul, _arithmetic(b, path, torch.sub, x, mean), 1 / deviation)


def _arithmetic(b: Assembly, path: str, function: Any, x: Value, other: Any) -> Value:
    """``function`` of x and a number, or of x and an array that runs along Keras's last axes."""
    other = other if isinstance(other, Tensor) else torch.as_tensor(other, dtype=torch.float32)
    if other.numel() == 1:
        return x.same(b.function(path, function, x.node, float(other)))
    if other.dim() > x.rank:
        raise ModelError(
            f"{path} has constants of {other.dim()} dimensions for an input of {x.rank}: expected fewer"
        )
    placed = other.reshape((1,) * (x.rank - other.dim()) + tuple(other.shape)).permute(x.order)
    return x.same(b.with_constant(path, function, x.node, placed))


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and value == number
