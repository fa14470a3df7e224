"""Stochastic rounding: to one of the two neighbours, at random, so that the expected value is the weight itself.

Gupta et al., "Deep Learning with Limited Numerical Precision" (arXiv 1502.02551), section 3. The next lower value is
taken with the probability of the distance to the next higher one; what lies outside of the range saturates.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.numerics.qtensor import QTensor, encode
from fewbit.numerics.scheme import Scheme, blocks, unblocks

STATISTICS: frozenset[str] = frozenset()
RANDOM = True
_LAST_PLACE = 2.0**-23


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Codes whose expected value is the weight, where it lies in the range.

    The same weight gets the same codes each time, and another one others: the seed is made from its numbers.

    statistics: optionally "seed", an int that replaces it.
    """
    plain = QTensor.quantize(weight, scheme, lo, hi)
    seed = statistics.get("seed")
    generator = torch.Generator().manual_seed(_seed(weight) if seed is None else int(seed))
    rows, near = (blocks(x.detach().to(torch.float64), scheme) for x in (weight, plain.dequantize()))
    draw = torch.rand(rows.shape, generator=generator, dtype=torch.float64).to(rows.device)
    scale, zero_point = (x.to(torch.float64).unsqueeze(1) for x in (plain.scale, plain.zero_point))
    values = scheme.spec.decode(scheme.spec.codes()).to(rows).unique()
    values = values[(values >= scheme.qmin) & (values <= scheme.qmax)]
    v = (rows / scale + zero_point).clamp(float(values[0]), float(values[-1]))
    above = torch.searchsorted(values, v).clamp(min=1)
    low, high = values[above - 1], values[above]
    chosen = (torch.where(draw * (high - low) < v - low, high, low) - zero_point) * scale
    # A weight that is a value of the format stays one: float32 keeps such products to half a last place.
    chosen = torch.where((rows - near).abs() <= rows.abs() * _LAST_PLACE, near, chosen)
    result = unblocks(chosen.to(torch.float32), weight.shape, scheme)
    return replace(plain, codes=encode(result, plain.scale, plain.zero_point, scheme))


def _seed(weight: Tensor) -> int:
    numbers = weight.detach().to("cpu", torch.float32).contiguous()
    return int.from_bytes(hashlib.blake2b(numbers.numpy().tobytes(), digest_size=7).digest(), "little")
