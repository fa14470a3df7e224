"""Integer kernels under the rule ``q31_double``: LiteRT's reference kernels, operator by operator, bit for bit.

Measured on ai-edge-litert 2.3.0 (``BUILTIN_REF``). Scales enter as products and quotients of their float32 values in
float64, as the runtime's preparation does; everything after that is integer, but for the step from float and the
linear layer, which scales its sums in float64.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fewbit.model import kernels_16x8
from fewbit.model.fixed_point import hard_swish_codes, quantized_beta, softmax_codes
from fewbit.model.kernels import KERNELS as COMMON
from fewbit.model.kernels import Kernel, accumulate, exact_matmul, limits
from fewbit.model.program import Coding, Op
from fewbit.numerics.requantize import f64_away, q31_constants, q31_double, scale_q31

_ADD_SHIFT = 20  # both operands of a sum are scaled up by this before they are brought to a common scale


def _f64(scale: float) -> np.float64:
    return np.float64(np.float32(scale))


def _weighted(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    if kernels_16x8.wide(codings[0]):
        return kernels_16x8.weighted(op, xs, codings, out)
    acc = accumulate(op, xs[0], codings[0])
    scale = float(_f64(codings[0].scale)) * op.constants["weight_scale"].to(torch.float32).double()
    scale = scale / float(_f64(out.scale))
    if op.kind == "linear":
        return f64_away(acc, scale, out.zero_point, *limits(op, out))
    if scale.numel() > 1:
        scale = scale.reshape(-1, *[1] * (acc.dim() - 2))
    return q31_double(acc, scale, out.zero_point, *limits(op, out))


def _product(codings: list[Coding]) -> np.float32:
    """The product of two scales, which the runtime rounds to float32."""
    return np.float32(codings[0].scale) * np.float32(codings[1].scale)


def _matmul(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    if kernels_16x8.wide(codings[0]):
        return kernels_16x8.matmul(op, xs, codings, out)
    acc = exact_matmul(xs, codings)
    scale = float(np.float64(_product(codings)) / _f64(out.scale))
    return q31_double(acc, scale, out.zero_point, *limits(op, out))


def _mul(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    a, b = (x.to(torch.int64) - c.zero_point for x, c in zip(xs, codings, strict=True))
    scale = float(_product(codings) / np.float32(out.scale))  # all in float32
    return q31_double(a * b, scale, out.zero_point, *limits(op, out))


def _add(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    shift = kernels_16x8.ADD_SHIFT if kernels_16x8.wide(out) else _ADD_SHIFT
    twice = 2 * max(_f64(c.scale) for c in codings)
    scaled = []
    for x, coding in zip(xs, codings, strict=True):
        centred = (x.to(torch.int64) - coding.zero_point) << shift
        scaled.append(scale_q31(centred, *q31_constants(float(_f64(coding.scale) / twice))))
    back = float(twice / ((1 << shift) * _f64(out.scale)))
    return q31_double(scaled[0] + scaled[1], back, out.zero_point, *limits(op, out))


def _requantize(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    scale = float(_f64(codings[0].scale) / _f64(out.scale))
    return q31_double(xs[0].to(torch.int64) - codings[0].zero_point, scale, out.zero_point, *limits(op, out))


def _leaky_relu(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    x = xs[0].to(torch.int64) - codings[0].zero_point
    given, alpha, wanted = (np.float32(v) for v in (codings[0].scale, op.attrs["alpha"], out.scale))
    scales = float(given / wanted), float(given * alpha / wanted)  # here all in float32
    above, below = (q31_double(x, s, out.zero_point, *limits(op, out)) for s in scales)
    return torch.where(x >= 0, above, below)


def _hard_swish(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    x = xs[0].numpy().astype(np.int64) - codings[0].zero_point
    codes = hard_swish_codes(x, codings[0].scale, out.scale) + out.zero_point
    return torch.from_numpy(np.clip(codes, *limits(op, out)).astype(np.int32))


def _avg_pool(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    """The mean of the codes themselves, half away from zero: input and output share one coding."""
    kernel, stride = op.attrs["kernel"], op.attrs["stride"]
    if len(kernel) == 1:
        row = dataclasses.replace(op, attrs=op.attrs | {"kernel": [1, *kernel], "stride": [1, *stride]})
        return _avg_pool(row, [xs[0].unsqueeze(2)], codings, out).squeeze(2)
    n = int(np.prod(kernel))
    sums = torch.nn.functional.avg_pool2d(xs[0].double(), kernel, stride, divisor_override=1)
    total = sums.to(torch.int64)
    magnitude = torch.div(total.abs() + n // 2, n, rounding_mode="floor")
    return (torch.sign(total) * magnitude).clamp(*limits(op, out)).to(torch.int32)


def _global_avg_pool(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    """A MEAN over all places: the division by their number is folded into the multiplier, which is cut, not rounded."""
    x = xs[0].to(torch.int64) - codings[0].zero_point
    n = x[0, 0].numel()
    multiplier, shift = (int(v) for v in q31_constants(float(_f64(codings[0].scale) / _f64(out.scale))))
    places = min(n.bit_length() - 1, 32, 31 + shift)
    acc = x.flatten(2).sum(-1)
    scaled = scale_q31(acc, (multiplier << places) // n, shift - places)
    codes = (scaled + out.zero_point).clamp(*limits(op, out)).to(torch.int32)
    return codes if op.attrs.get("squeeze") else codes.reshape(*codes.shape, *[1] * (x.dim() - 2))


def _softmax(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    """In fixed point, over the last axis; the output is in 256ths."""
    if kernels_16x8.wide(codings[0]):
        return kernels_16x8.softmax(op, xs, codings, out)
    codes = softmax_codes(xs[0].numpy().astype(np.int64), *quantized_beta(codings[0].scale)) + out.zero_point
    return torch.from_numpy(np.clip(codes, *limits(op, out)).astype(np.int32))


def _concat(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    parts = [x if c == out else _requantize(op, [x], [c], out) for x, c in zip(xs, codings, strict=True)]
    return torch.cat(parts, op.attrs["axis"])


KERNELS: dict[str, Kernel] = COMMON | {
    "conv": _weighted,
    "linear": _weighted,
    "matmul": _matmul,
    "add": _add,
    "mul": _mul,
    "avg_pool": _avg_pool,
    "global_avg_pool": _global_avg_pool,
    "concat": _concat,
    "softmax": _softmax,
    "requantize": _requantize,
    "leaky_relu": _leaky_relu,
    "hard_swish": _hard_swish,
}


def quantize(x: Tensor, coding: Coding) -> Tensor:
    """Codes (int32) of a float32 tensor under ``coding``: the quotient in float32, halves away from zero."""
    values = (x.to(torch.float32).numpy() / np.float32(coding.scale)).astype(np.float64)
    codes = np.sign(values) * np.floor(np.abs(values) + 0.5) + coding.zero_point
    return torch.from_numpy(np.clip(codes, coding.scheme.qmin, coding.scheme.qmax).astype(np.int32))
