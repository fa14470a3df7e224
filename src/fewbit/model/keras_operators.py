"""Keras's plain operators inside Functional models (``x + y``, ``x[:, 1:]``, ``keras.ops.mean``), as one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.errors import ModelError
from fewbit.model.keras_functions import ELEMENTWISE
from fewbit.model.keras_layout import Assembly, Value, identity
from fewbit.model.keras_merging import alike, joined
from fewbit.model.keras_shapes import reshaped, transposed
from fewbit.model.keras_weights import tensor

Rule = Callable[..., Any]


def _unary(function: Callable[..., Any], *settings: str) -> Rule:
    """A function of one number; ``settings`` are the operator's own attributes."""

    def build(b: Assembly, op: Any, path: str, x: Value) -> Value:
        return x.same(b.function(path, function, x.node, *(getattr(op, name) for name in settings)))

    return build


def _binary(function: Callable[..., Any]) -> Rule:
    """A function of two, either of which may be a number or an array."""

    def build(b: Assembly, op: Any, path: str, x1: Any, x2: Any) -> Value:
        if isinstance(x1, Value) and isinstance(x2, Value):
            first, second = (
                alike(b, path, [x1, x2]) if x1.rank == x2.rank else (b.as_keras(x, path) for x in (x1, x2))
            )
            node = b.function(path, function, first.node, second.node)
            return (first if first.rank >= second.rank else second).same(node)
        x, other = (x1, x2) if isinstance(x1, Value) else (x2, x1)
        ordered = function if isinstance(x1, Value) else _exchanged(function)
        constant = torch.as_tensor(other) if isinstance(other, int | float) else tensor(other)
        if constant.numel() == 1 and constant.dim() <= x.rank:
            number = constant.item() if isinstance(other, int | float) else float(constant)
            return x.same(b.function(path, _with_number(ordered), x.node, number))
        if constant.dim() > x.rank:
            raise ModelError(
                f"{path} has a constant of {constant.dim()} dimensions: expected at most {x.rank}"
            )
        placed = constant.reshape((1,) * (x.rank - constant.dim()) + tuple(constant.shape)).permute(x.order)
        return x.same(b.with_constant(path, ordered, x.node, placed))

    return build


def _exchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, other: function(other, x)


def _with_number(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maximum and minimum take tensors only."""
    if function is torch.maximum:
        return lambda x, number: torch.clamp(x, min=number)
    if function is torch.minimum:
        return lambda x, number: torch.clamp(x, max=number)
    return function


def _power(x: Any, exponent: Any) -> Tensor:
    return torch.pow(x, exponent)


def _reduction(function: Callable[..., Any]) -> Rule:
    def build(b: Assembly, op: Any, path: str, x: Value) -> Value:
        axes = [op.axis] if isinstance(op.axis, int) else list(op.axis) if op.axis is not None else [0]
        axes = [axis % x.rank for axis in axes]
        if 0 in axes:
            raise ModelError(f"{path} reduces the batch: expected axes behind it; name them with axis=")
        dims = sorted(x.dim(axis) for axis in axes)
        node = b.function(path, function, x.node, dims, keepdim=bool(op.keepdims))
        if op.keepdims:
            return x.same(node)
        left = [axis for axis in x.order if axis not in axes]
        names = sorted(left)
        return Value(node, tuple(names.index(axis) for axis in left))

    return build


def _along(function: Callable[..., Any]) -> Rule:
    """A function along one axis that keeps the sizes."""

    def build(b: Assembly, op: Any, path: str, x: Value) -> Value:
        return x.same(b.function(path, function, x.node, x.dim(op.axis)))

    return build


def _reshape(b: Assembly, op: Any, path: str, x: Value) -> Value:
    shape = list(op.newshape)
    rest = math.prod(shape[1:])
    if len(shape) < 2 or shape[0] not in (-1, None) or (rest > 0 and rest != math.prod(x.shape[1:])):
        raise ModelError(
            f"{path} reshapes to {shape}: expected -1 for the batch in front, and the rest of each sample"
        )
    return reshaped(b, path, x, shape[1:])


def _transpose(b: Assembly, op: Any, path: str, x: Value) -> Value:
    return _axes_kept(path, x, list(op.axes) if op.axes else list(range(x.rank))[::-1])


def _swapaxes(b: Assembly, op: Any, path: str, x: Value) -> Value:
    axes = list(range(x.rank))
    axes[op.axis1], axes[op.axis2] = axes[op.axis2], axes[op.axis1]
    return _axes_kept(path, x, axes)


def _axes_kept(path: str, x: Value, axes: list[int]) -> Value:
    if axes[0] % x.rank != 0:
        raise ModelError(f"{path} moves the batch away from the front: expected it to stay there")
    return transposed(x, axes)


def _expand_dims(b: Assembly, op: Any, path: str, x: Value) -> Value:
    x = b.as_keras(x, path)
    [axis] = [op.axis] if isinstance(op.axis, int) else list(op.axis)
    node = b.function(path, torch.unsqueeze, x.node, axis)
    return Value(node, identity(x.rank + 1))


def _squeeze(b: Assembly, op: Any, path: str, x: Value) -> Value:
    x = b.as_keras(x, path)
    axes = (
        [op.axis]
        if isinstance(op.axis, int)
        else list(op.axis or [a for a in range(1, x.rank) if x.shape[a] == 1])
    )
    node = b.function(path, torch.squeeze, x.node, axes)
    return Value(node, identity(x.rank - len(axes)))


def _concatenate(b: Assembly, op: Any, path: str, xs: Sequence[Value]) -> Value:
    return joined(b, path, xs, op.axis)


def _stack(b: Assembly, op: Any, path: str, xs: Sequence[Value]) -> Value:
    values = [b.as_keras(x, path) for x in xs]
    node = b.function(path, _stacked, *(v.node for v in values), dim=op.axis)
    return Value(node, identity(values[0].rank + 1))


def _stacked(*parts: Tensor, dim: int) -> Tensor:
    return torch.stack(parts, dim)


def _split(b: Assembly, op: Any, path: str, x: Value) -> list[Value]:
    dim = x.dim(op.axis)
    size, at = x.stored[dim], op.indices_or_sections
    places = [size // at * i for i in range(1, at)] if isinstance(at, int) else list(at)
    sizes = [end - start for start, end in zip([0, *places], [*places, size], strict=True)]
    node = b.function(path, torch.split, x.node, sizes, dim)
    return [x.same(b.item(node, i)) for i in range(len(sizes))]


def _get_item(b: Assembly, op: Any, path: str, x: Value, key: Any) -> Value:
    keys = list(key) if isinstance(key, list | tuple) else [key]
    if any(k is not None and k is not Ellipsis and not isinstance(k, int | slice) for k in keys):
        raise ModelError(f"{path} selects by {key}: expected numbers, slices, None and ... only")
    if keys[0] is not Ellipsis and keys[0] != slice(None):
        raise ModelError(f"{path} selects from the batch by {keys[0]}: expected ':' in front")
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (x.rank + 1 - len([k for k in keys if k is not None]))
    if all(isinstance(k, slice) for k in keys):
        keys += [slice(None)] * (x.rank - len(keys))
        return x.same(b.function(path, _selected, x.node, tuple(keys[axis] for axis in x.order)))
    x = b.as_keras(x, path)
    node = b.function(path, _selected, x.node, tuple(keys))
    return Value(node, identity(node.meta["val"].dim()))


def _selected(x: Tensor, key: tuple[Any, ...]) -> Tensor:
    return x[key]


def _clip(b: Assembly, op: Any, path: str, x: Value) -> Value:
    return x.same(b.function(path, torch.clamp, x.node, op.x_min, op.x_max))


def _pad(b: Assembly, op: Any, path: str, x: Value, constant_values: Any = None) -> Value:
    pairs = list(op.pad_width) * (x.rank if len(op.pad_width) == 1 else 1)
    if op.mode != "constant" or any(pairs[0]):
        raise ModelError(
            f"{path} pads by {op.mode!r}, {pairs[0]} on the batch: expected 'constant', and (0, 0) there"
        )
    sides = [side for axis in reversed(x.order) for side in pairs[axis]]
    return x.same(b.function(path, F.pad, x.node, sides, value=float(constant_values or 0)))


def _matmul(b: Assembly, op: Any, path: str, x1: Any, x2: Any) -> Value:
    if isinstance(x1, Value) and isinstance(x2, Value):
        first, second = b.as_keras(x1, path), b.as_keras(x2, path)
        node = b.function(path, torch.matmul, first.node, second.node)
    elif isinstance(x1, Value):
        node = b.with_constant(path, torch.matmul, b.as_keras(x1, path).node, tensor(x2))
    else:
        raise ModelError(
            f"{path} multiplies a constant by the input: expected the input first; transpose both"
        )
    return Value(node, identity(node.meta["val"].dim()))


def _gelu(b: Assembly, op: Any, path: str, x: Value) -> Value:
    return x.same(b.function(path, F.gelu, x.node, approximate="tanh" if op.approximate else "none"))


def _cast(b: Assembly, op: Any, path: str, x: Value) -> Value:
    if x.node.meta["val"].is_floating_point() and "float" in str(op.dtype):
        return x
    return x.same(b.function(path, torch.Tensor.to, x.node, getattr(torch, str(op.dtype))))


# The operators that only carry masks along; where a mask matters, the layer that uses it is refused.
MASKS = frozenset({"NotEqual", "Any", "LogicalOr", "LogicalAnd", "ZerosLike", "OnesLike"})

_NAMED = {  # operators of one number, under the names of activation functions
    "Relu": "relu", "Relu6": "relu6", "Sigmoid": "sigmoid", "SparseSigmoid": "sparse_sigmoid", "Softplus": "softplus",
    "Softsign": "softsign", "SparsePlus": "sparse_plus", "Silu": "silu", "LogSigmoid": "log_sigmoid",
    "HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu", "Selu": "selu", "TanhShrink": "tanh_shrink",
    "HardTanh": "hard_tanh", "Tanh": "tanh", "Exp": "exponential",
}  # fmt: skip

OPERATORS: dict[str, Rule] = {
    **{name: _unary(ELEMENTWISE[function]) for name, function in _NAMED.items()},
    **{name: _unary(getattr(torch, name.lower())) for name in (
        "Abs", "Absolute", "Negative", "Square", "Sqrt", "Rsqrt", "Log", "Log1p", "Log2", "Expm1", "Sin", "Cos", "Erf",
        "Sign", "Floor", "Ceil", "Round", "Reciprocal")},
    "Add": _binary(torch.add),
    "Subtract": _binary(torch.sub),
    "Multiply": _binary(torch.mul),
    **dict.fromkeys(["Divide", "TrueDivide"], _binary(torch.div)),
    "Power": _binary(_power),
    "Maximum": _binary(torch.maximum),
    "Minimum": _binary(torch.minimum),
    "Matmul": _matmul,
    "Mean": _reduction(torch.mean),
    "Sum": _reduction(torch.sum),
    **dict.fromkeys(["Max", "Amax"], _reduction(torch.amax)),
    **dict.fromkeys(["Min", "Amin"], _reduction(torch.amin)),
    "Softmax": _along(torch.softmax),
    "LogSoftmax": _along(torch.log_softmax),
    "Flip": _along(lambda x, dim: torch.flip(x, [dim])),
    "LeakyRelu": _unary(F.leaky_relu, "negative_slope"),
    "Elu": _unary(F.elu, "alpha"),
    "Celu": _unary(F.celu, "alpha"),
    "HardShrink": _unary(F.hardshrink, "threshold"),
    "SoftShrink": _unary(F.softshrink, "threshold"),
    "Gelu": _gelu,
    "Clip": _clip,
    "Cast": _cast,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Swapaxes": _swapaxes,
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "Concatenate": _concatenate,
    "Stack": _stack,
    "Split": _split,
    "GetItem": _get_item,
    "Pad": _pad,
}  # fmt: skip
