"""What each integer operation computes: codes in, codes out, exactly, under the rule ``f32_even``.

Every sum of products is a sum of integers, carried in floating-point registers: in float32 only where no partial sum
can reach 2**24, otherwise in float64, where none can reach 2**53. Each partial sum is then an exactly represented
integer in whatever order it is added, so nothing is ever rounded; the tests hold every kernel against a twin in
Python's integers. The float32 steps that remain are the requantization rules
themselves, as measured on ONNX Runtime 1.31 (x86): they are part of the semantics, not an approximation.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.model.program import Coding, Op
from fewbit.numerics.requantize import f32_even

Kernel = Callable[[Op, list[Tensor], list[Coding], Coding], Tensor]
Accumulate = Callable[[Op, Tensor, Coding], Tensor]
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _f32(value: float) -> np.float32:
    return np.float32(value)


def limits(op: Op, out: Coding) -> tuple[int, int]:
    """Smallest and largest code of the output, a fused clamp included."""
    lo, hi = op.attrs.get("clamp") or (out.scheme.qmin, out.scheme.qmax)
    return int(lo), int(hi)


def multiplier(op: Op, x: Coding, out: Coding) -> Tensor:
    """float32(s_x * s_w / s_y), one per output channel, multiplied before divided as ONNX Runtime does."""
    scale = op.constants["weight_scale"].to(torch.float32)
    return (torch.tensor(x.scale, dtype=torch.float32) * scale) / torch.tensor(out.scale, dtype=torch.float32)


def _widest(coding: Coding) -> int:
    """The largest magnitude of a code after its zero point is subtracted."""
    return int(max(coding.scheme.qmax - coding.zero_point, coding.zero_point - coding.scheme.qmin))


def _carrier(reach: int) -> torch.dtype:
    """A floating-point type that represents every integer up to ``reach`` exactly."""
    return torch.float32 if reach < 2**24 else torch.float64


def _exact(acc: Tensor) -> Tensor:
    """Accumulators as int64. A backend that does not simply multiply and add (Winograd) would show here."""
    codes = acc.to(torch.int64)
    if not torch.equal(codes.to(acc.dtype), acc):
        raise ArithmeticError("this build of torch does not add integers exactly; please report it to fewbit")
    return codes


def accumulate(op: Op, x: Tensor, coding: Coding) -> Tensor:
    """The int64 accumulators of a convolution or linear layer, bias included; channels on axis 1 (linear: the last)."""
    carrier = _carrier(
        int(op.constants["weight"].to(torch.int64).abs().flatten(1).sum(1).max()) * _widest(coding)
    )
    centred = x.to(carrier) - coding.zero_point
    weight = op.constants["weight"].to(carrier)
    bias = op.constants.get("bias")
    if op.kind == "linear":
        acc = F.linear(centred, weight)
        return _exact(acc) if bias is None else _exact(acc) + bias.to(torch.int64)
    a = op.attrs
    if a.get("pad"):
        centred = F.pad(centred, a["pad"])
    acc = _CONVOLUTIONS[weight.dim() - 2](centred, weight, None, a["stride"], 0, a["dilation"], a["groups"])
    acc = _exact(acc)
    return acc if bias is None else acc + bias.to(torch.int64).reshape(-1, *[1] * (weight.dim() - 2))


def weighted(
    op: Op, xs: list[Tensor], codings: list[Coding], out: Coding, sums: Accumulate = accumulate
) -> Tensor:
    """A convolution or linear layer, its accumulators computed by ``sums``."""
    acc = sums(op, xs[0], codings[0])
    scale = multiplier(op, codings[0], out)
    if op.kind == "conv" and scale.numel() > 1:
        scale = scale.reshape(-1, *[1] * (acc.dim() - 2))
    return f32_even(acc, scale, out.zero_point, *limits(op, out))


def exact_matmul(xs: list[Tensor], codings: list[Coding]) -> Tensor:
    """The int64 accumulators of a product of two coded tensors."""
    carrier = _carrier(xs[0].shape[-1] * _widest(codings[0]) * _widest(codings[1]))
    a, b = (x.to(carrier) - c.zero_point for x, c in zip(xs, codings, strict=True))
    return _exact(torch.matmul(a, b))


def _matmul(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    acc = exact_matmul(xs, codings)
    multiplier = torch.tensor(_f32(codings[0].scale) * _f32(codings[1].scale) / _f32(out.scale))
    return f32_even(acc, multiplier, out.zero_point, *limits(op, out))


def _round(values: np.ndarray, op: Op, out: Coding) -> Tensor:
    lo, hi = limits(op, out)
    return torch.from_numpy(np.clip(np.rint(values), lo, hi).astype(np.int32))


def _fma(a: Any, b: np.float32, c: Any) -> Any:
    """float32(a * b + c) with one rounding: the product is exact in float64."""
    return (np.asarray(a, np.float64) * np.float64(b) + np.asarray(c, np.float64)).astype(np.float32)


def _add(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    a, b = (x.numpy().astype(np.float32) for x in xs)
    (ra, za), (rb, zb) = ((_f32(c.scale) / _f32(out.scale), _f32(c.zero_point)) for c in codings)
    constant = _f32(out.zero_point) - _fma(za, ra, rb * zb)
    return _round(_fma(a, ra, _fma(b, rb, constant)), op, out)


def _mul(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    a, b = (x.numpy().astype(np.int32) - np.int32(c.zero_point) for x, c in zip(xs, codings, strict=True))
    ratio = _f32(codings[0].scale) * _f32(codings[1].scale) / _f32(out.scale)
    return _round((a * b).astype(np.float32) * ratio + _f32(out.zero_point), op, out)


def _dequantized(x: Tensor, coding: Coding) -> np.ndarray:
    return (x.numpy().astype(np.int32) - np.int32(coding.zero_point)).astype(np.float32) * _f32(coding.scale)


def _avg_pool(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    x = _dequantized(xs[0], codings[0])
    kernel, stride = op.attrs["kernel"], op.attrs["stride"]
    counts = [(size - k) // s + 1 for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    total = np.zeros((*x.shape[:2], *counts), np.float32)
    for offset in np.ndindex(*kernel):  # row order, one float32 addition at a time: the runtime's own order
        window = [slice(o, o + s * (n - 1) + 1, s) for o, s, n in zip(offset, stride, counts, strict=True)]
        total = total + x[(slice(None), slice(None), *window)]
    mean = total / _f32(np.prod(kernel))
    return _round(mean / _f32(out.scale) + _f32(out.zero_point), op, out)


def _global_avg_pool(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    x = xs[0].numpy().astype(np.int64) - codings[0].zero_point
    acc = x.reshape(*x.shape[:2], -1).sum(-1).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    count = x[0, 0].size
    scale = _f32(codings[0].scale) / (_f32(out.scale) * _f32(count))
    codes = _round(acc.astype(np.float32) * scale, _shifted(op, out), out) + out.zero_point
    return codes.flatten(1) if op.attrs.get("squeeze") else codes


def _shifted(op: Op, out: Coding) -> Op:
    """The same operation with limits for codes before the zero point is added."""
    lo, hi = limits(op, out)
    return Op(
        op.kind, op.domain, op.layer, op.node, [], "", {"clamp": (lo - out.zero_point, hi - out.zero_point)}
    )


def _concat(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    parts = [_dequantized(x, c) / _f32(out.scale) for x, c in zip(xs, codings, strict=True)]
    return _round(np.concatenate(parts, axis=op.attrs["axis"]), _shifted(op, out), out) + out.zero_point


def _softmax(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    """A table of exponentials in fixed point, as in ONNX Runtime's QLinearSoftmax; over the last axis."""
    x = xs[0].numpy().astype(np.int64)
    n = x.shape[-1]
    unit = min((2**32 - 1) / n, float(0x7FFFFF))
    steps = np.arange(-255, 1, dtype=np.float64) * np.float64(_f32(codings[0].scale))
    table = np.floor(unit * np.exp(steps) + 0.5).astype(np.int64)
    powers = table[x + 255 - x.max(-1, keepdims=True)]
    total = powers.sum(-1, keepdims=True).astype(np.float32)
    steps_in_one = np.int64(
        _f32(1) / _f32(out.scale)
    )  # the runtime cuts the reciprocal of the scale to an integer
    return _round((powers * steps_in_one).astype(np.float32) / total, _shifted(op, out), out) + out.zero_point


def _requantize(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    scale = torch.tensor(_f32(codings[0].scale) / _f32(out.scale))
    return f32_even(xs[0] - codings[0].zero_point, scale, out.zero_point, *limits(op, out))


def _table(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    return op.constants["table"].to(torch.int32)[xs[0].long() - int(codings[0].scheme.qmin)]


def _clip(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    return xs[0].clamp(*limits(op, out))


def _pad(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    return F.pad(xs[0], op.attrs["pad"], value=op.attrs.get("value", out.zero_point))


KERNELS: dict[str, Kernel] = {
    "conv": weighted,
    "linear": weighted,
    "matmul": _matmul,
    "add": _add,
    "mul": _mul,
    "avg_pool": _avg_pool,
    "global_avg_pool": _global_avg_pool,
    "concat": _concat,
    "softmax": _softmax,
    "table": _table,
    "clip": _clip,
    "pad": _pad,
    "requantize": _requantize,
}


def quantize(x: Tensor, coding: Coding) -> Tensor:
    """Codes (int32) of a float32 tensor under ``coding``: what QuantizeLinear answers."""
    values = np.rint(x.to(torch.float32).numpy() / _f32(coding.scale)) + coding.zero_point
    return torch.from_numpy(np.clip(values, coding.scheme.qmin, coding.scheme.qmax).astype(np.int32))


def dequantize(codes: Tensor, coding: Coding) -> Tensor:
    """float32 values of codes: what DequantizeLinear answers."""
    return torch.from_numpy(_dequantized(codes, coding))


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Any]:
    """uint8 codes with this tensor's own range (ONNX DynamicQuantizeLinear): (codes int32, (scale, zero point))."""
    values = x.to(torch.float32).numpy()
    lo, hi = min(_f32(0), values.min()), max(_f32(0), values.max())
    scale = (hi - lo) / _f32(255) if hi > lo else _f32(1)
    zero_point = np.clip(np.rint(_f32(0) - lo / scale), 0, 255).astype(np.int32)
    codes = np.clip(np.rint(values / scale) + zero_point, 0, 255).astype(np.int32)
    return torch.from_numpy(codes), (scale, int(zero_point))


def dynamic_quantize_rows(x: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """The same for each part of a tensor by itself: codes less their zero points, and scales.

    Numbers along the last ``axes`` axes share a range: 1 for the rows of a linear layer, 3 for the images of a batch.
    """
    values = x.to(torch.float32).numpy()
    along = tuple(range(-axes, 0))
    lo = np.minimum(values.min(along, keepdims=True), _f32(0))
    hi = np.maximum(values.max(along, keepdims=True), _f32(0))
    scale = np.where(hi > lo, (hi - lo) / _f32(255), _f32(1)).astype(np.float32)
    zero_point = np.clip(np.rint(_f32(0) - lo / scale), 0, 255)
    codes = np.clip(np.rint(values / scale) + zero_point, 0, 255) - zero_point
    return torch.from_numpy(codes.astype(np.int32)), torch.from_numpy(scale)
