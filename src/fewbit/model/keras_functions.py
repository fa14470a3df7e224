"""Keras's activation functions, as layers and as arguments, in PyTorch's words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.model.keras_layout import Assembly, Value, channels_second, clean
from fewbit.model.keras_weights import parameters, tensor

Elementwise = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squareplus(x: Tensor) -> Tensor:
    return (x + torch.sqrt(x * x + 4)) / 2


def _sparse_plus(x: Tensor) -> Tensor:
    return torch.where(x <= -1, torch.zeros_like(x), torch.where(x < 1, (x + 1) ** 2 / 4, x))


# Functions of one number, by the name that Keras serializes them under, with Keras's own default settings.
ELEMENTWISE: dict[str, Elementwise] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.2),
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "hard_silu": F.hardswish,
    "hard_swish": F.hardswish,
    "log_sigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "hard_tanh": F.hardtanh,
    "tanh_shrink": F.tanhshrink,
    "hard_shrink": F.hardshrink,
    "soft_shrink": F.softshrink,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "squareplus": _squareplus,
    "sparse_plus": _sparse_plus,
    "exponential": torch.exp,
    "sparse_sigmoid": lambda x: F.hardtanh(0.5 * (x + 1), 0.0, 1.0),
}
ALONG_LAST: dict[str, Callable[..., Tensor]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "glu": F.glu,
}
ACTIVATIONS = frozenset({"linear", *ELEMENTWISE, *ALONG_LAST})


def name_of(function: Any) -> str:
    """The name of a Keras activation function, "" for one that is not Keras's own."""
    from keras import activations

    name = str(getattr(function, "__name__", ""))
    own = name in ACTIVATIONS and str(function.__module__).startswith("keras.")
    return name if own and activations.get(name) is function else ""


def activate(b: Assembly, function: Any, path: str, x: Value) -> Value:
    """``x`` through a layer's ``activation`` argument: a function of Keras, or a layer."""
    if function is None or name_of(function) == "linear":
        return x
    if hasattr(function, "get_config"):  # a layer as an argument
        return b.call(function, f"{path}.{clean(function.name)}", [x], {})[0]
    name = name_of(function)
    if not name:
        raise ModelError(
            f"{path} has the activation {getattr(function, '__name__', type(function).__name__)}, which is not one of "
            "Keras's own functions: expected one of them; write it with layers instead"
        )
    return apply(b, name, f"{path}.{name}", x)


def apply(b: Assembly, name: str, path: str, x: Value) -> Value:
    """``x`` through the function of that name; the axis that some work along is Keras's last."""
    if name in ALONG_LAST:
        return x.same(b.function(path, ALONG_LAST[name], x.node, x.dim(-1)))
    return x.same(b.function(path, ELEMENTWISE[name], x.node))


def activation_layer(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """An Activation layer: its function goes by the layer's own name."""
    name = name_of(layer.activation)
    if name == "linear":
        return x
    return apply(b, name, path, x) if name else activate(b, layer.activation, path, x)


def relu(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """max(x, 0), with a slope below, a bound above, or a threshold that what passes must reach."""
    slope, bound, threshold = float(layer.negative_slope), layer.max_value, float(layer.threshold)
    return x.same(_relu(b, path, x.node, slope, None if bound is None else float(bound), threshold))


def _relu(
    b: Assembly, path: str, node: fx.Node, slope: float, bound: float | None, threshold: float
) -> fx.Node:
    if threshold:
        return b.function(path, _thresholded, node, slope, bound, threshold)
    if slope:
        node = b.function(path, F.leaky_relu, node, slope)
        return node if bound is None else b.function(f"{path}.clamp", torch.clamp, node, max=bound)
    if bound is None:
        return b.function(path, F.relu, node)
    return b.function(path, F.relu6, node) if bound == 6 else b.function(path, F.hardtanh, node, 0.0, bound)


def _thresholded(x: Tensor, slope: float, bound: float | None, threshold: float) -> Tensor:
    passed = x if bound is None else torch.clamp(x, 0.0, bound)
    return torch.where(x > threshold, passed, slope * (x - threshold))


def leaky_relu(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    return x.same(b.function(path, F.leaky_relu, x.node, float(layer.negative_slope)))


def elu(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    return x.same(b.function(path, F.elu, x.node, float(layer.alpha)))


def prelu(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """A slope of its own for each channel, or for each place as well."""
    alpha = tensor(layer.alpha)
    if alpha.numel() == 1:
        return x.same(b.module(path, lambda: parameters(nn.PReLU(1), layer, weight=alpha.reshape(1)), x.node))
    channel = next((axis for axis in range(1, x.rank) if alpha.shape[axis - 1] == alpha.numel()), None)
    if channel is not None:
        x = b.stored_as(x, channels_second(x.rank, channel), path) if x.dim(channel) != 1 else x
        made = nn.PReLU(alpha.numel())
        return x.same(b.module(path, lambda: parameters(made, layer, weight=alpha.reshape(-1)), x.node))
    placed = alpha.unsqueeze(0).permute(x.order)
    return x.same(b.with_constant(path, _slopes, x.node, placed))


def _slopes(x: Tensor, alpha: Tensor) -> Tensor:
    return F.relu(x) - alpha * F.relu(-x)


def softmax(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if len(axes) > 1:
        raise ModelError(f"{path}: softmax over the axes {axes}: expected one; reshape them into one first")
    return x.same(b.function(path, torch.softmax, x.node, x.dim(axes[0])))
