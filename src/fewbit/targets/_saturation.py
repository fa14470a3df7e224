"""Weights that no x86 CPU can saturate: what ``reduce_range`` is for, at a smaller price.

Without VNNI, a CPU multiplies unsigned activations by signed weights with ``vpmaddubsw``, which adds two neighbouring
products in 16 bits: 255 * (w1 + w2) must stay within 32767, or the sum saturates and the answer is silently another
(onnxruntime#5849, #14642). Seven-bit weights avoid it. Here a channel keeps eight bits, and its scale is only
enlarged until its two largest codes of the same sign add up to at most 128, whichever two the kernel pairs.
"""

import torch
from torch import Tensor

from fewbit.numerics.scheme import Scheme, blocks

PAIR = 127.0  # of two codes before rounding: rounding adds at most one, and 255 * 128 < 32767


def portable_bounds(weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The range of each block, widened where two products could saturate 16 bits.

    ``weight``: [out, ...]; ``lo``, ``hi``: [C] as an observer gave them; numbers beyond count as they are, since a
    wider range no longer clips them. Only symmetric 8-bit schemes can saturate; all others are returned as they came.
    """
    if not (scheme.spec.integer and scheme.symmetric and scheme.spec.bits == 8):
        return lo, hi
    span = torch.maximum(-lo, hi).double()
    rows = weight.detach().double().flatten(1)
    if scheme.granularity == "group":
        rows = blocks(weight.detach().double(), scheme)
    pairs = torch.maximum(_two_largest(rows), _two_largest(-rows))
    if scheme.granularity == "tensor":
        pairs = pairs.max().reshape(1)
    bound = torch.maximum(span, pairs * (scheme.qmax / PAIR)).to(torch.float32)
    return -bound, bound


def _two_largest(rows: Tensor) -> Tensor:
    """Sum of the two largest non-negative numbers of each row [C, n] -> [C]."""
    return rows.clamp(min=0).topk(min(2, rows.shape[1]), dim=1).values.sum(dim=1)


def can_saturate(codes: Tensor, widest_activation: int = 255) -> bool:
    """Whether two codes of one output channel [out, ...] could saturate 16 bits without VNNI."""
    rows = codes.to(torch.float64).flatten(1)
    pair = torch.maximum(_two_largest(rows) * widest_activation, _two_largest(-rows) * widest_activation - 1)
    return bool((pair > 32767).any())
