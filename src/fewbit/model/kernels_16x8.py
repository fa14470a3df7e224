"""Integer kernels of 16-bit activations and 8-bit weights where they are not those of 8 bits: LiteRT's, bit for bit.

Measured on ai-edge-litert 2.3.0 (``BUILTIN_REF``). Accumulators have 64 bits. All other kernels are those of
``kernels_q31``, which measure the same.
"""

import torch
from torch import Tensor

from fewbit.model.kernels import accumulate, dequantize, exact_matmul, limits
from fewbit.model.program import Coding, Op
from fewbit.numerics.requantize import f64_away, q31_constants

ADD_SHIFT = 15  # both operands of a sum are scaled up by this before they are brought to a common scale
LARGEST_SUM = 2**47 - 1  # of products: times a multiplier of 16 bits it still fits 64 bits
LARGEST_RESULT = 2**31 - 1  # of a scaled sum: the runtime casts it to 32 bits before it clamps


def wide(coding: Coding) -> bool:
    """Whether codes have 16 bits."""
    return coding.scheme.spec.bits > 8


def _f64(scale: float) -> float:
    return float(torch.tensor(scale, dtype=torch.float32).double())


def q15_single(acc: Tensor, scale: Tensor) -> Tensor:
    """acc * scale (float64, positive) by a multiplier cut to 16 bits, rounded once, half up: int64."""
    multiplier, shift = q31_constants(scale)
    reduced = ((multiplier + (1 << 15)) >> 16).clamp(max=0x7FFF)
    places = 15 - shift
    return (acc * reduced + (torch.ones_like(places) << (places - 1))) >> places


def weighted(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    """A convolution, by a multiplier of 16 bits; or a linear layer, whose sums are scaled in float64."""
    acc = accumulate(op, xs[0], codings[0])
    weight_scale = op.constants["weight_scale"].to(torch.float32).double()
    scale = _f64(codings[0].scale) * weight_scale / _f64(out.scale)
    if op.kind == "linear":
        return f64_away(acc, scale, 0, *limits(op, out))
    codes = q15_single(acc, scale.reshape(-1, *[1] * (acc.dim() - 2)))
    return codes.clamp(*limits(op, out)).to(torch.int32)


def matmul(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    a, b = (torch.tensor(c.scale, dtype=torch.float32) for c in codings)
    scale = (a * b).double() / _f64(out.scale)  # the product of the two scales is rounded to float32
    return q15_single(exact_matmul(xs, codings), scale).clamp(*limits(op, out)).to(torch.int32)


def softmax(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    """In float, over the last axis: no runtime's integer kernel is meant."""
    values = torch.softmax(dequantize(xs[0], codings[0]), -1)
    return f64_away(values, 1 / _f64(out.scale), 0, *limits(op, out))
