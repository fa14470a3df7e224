"""Half-quadratic quantization: scale and zero point of each block are fitted to the weights alone, outliers aside.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023). The loss is the
sum of |w - Q(w)|**0.7, which outliers hardly move. The paper fits a real zero point; here it is a whole number, as in
every scheme, so that zero stays zero and kernels stay integer, and the scale is fitted with it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, blocks, unblocks

STATISTICS: frozenset[str] = frozenset()
FITS_SCALES = True
_POWER = 0.7
_ROUNDS = 20
_SHARPNESS = 4.0  # beta of the paper, for errors in steps; it grows from round to round
_GROWTH = 1.1
_WIDE = (
    8  # bits from which scales stay: nothing to gain, and integer kernels count on the range they asked for
)


def accepts(spec: Format) -> bool:
    """Integers."""
    return spec.integer


def loss(error: Tensor) -> Tensor:
    """What is minimised, for each number."""
    return error.abs().pow(_POWER)


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Codes, scales and zero points with the least loss of each block that is found; no worse than the nearest codes.

    The range lo, hi is where the search starts. Where it is wider than the weights, it was widened for an integer
    kernel, and stays.
    """
    plain = QTensor.quantize(weight, scheme, lo, hi)
    if scheme.spec.bits >= _WIDE:
        return plain
    rows = blocks(weight.detach().to(torch.float32), scheme)
    free = ((lo >= rows.amin(dim=1)) | (hi <= rows.amax(dim=1))).unsqueeze(1)
    start = plain.scale.unsqueeze(1), plain.zero_point.to(torch.float32).unsqueeze(1)
    best, least = start, loss(rows - _values(rows, *start, scheme)).sum(dim=1, dtype=torch.float64)
    scale, zero_point = start
    sharpness = _SHARPNESS
    for _ in range(_ROUNDS):
        scale, zero_point = _step(rows, scale, zero_point, scheme, sharpness)
        scale, zero_point = torch.where(free, scale, start[0]), torch.where(free, zero_point, start[1])
        found = loss(rows - _values(rows, scale, zero_point, scheme)).sum(dim=1, dtype=torch.float64)
        better = (found < least).unsqueeze(1)
        best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
        least = torch.minimum(found, least)
        sharpness *= _GROWTH
    codes = unblocks(_codes(rows, *best, scheme).to(scheme.spec.code_dtype), weight.shape, scheme)
    return replace(
        plain, codes=codes, scale=best[0].squeeze(1), zero_point=best[1].squeeze(1).to(torch.int32)
    )


def _codes(rows: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    return (torch.round(rows / scale) + zero_point).clamp_(scheme.qmin, scheme.qmax)


def _values(rows: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    return (_codes(rows, scale, zero_point, scheme) - zero_point) * scale


def _step(
    rows: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, sharpness: float
) -> tuple[Tensor, Tensor]:
    """Errors that are no outliers shrink to zero; scale and zero point are fitted to the weights without the rest."""
    codes = _codes(rows, scale, zero_point, scheme)
    error = rows / scale - (codes - zero_point)
    size = error.abs()
    kept = torch.sign(error) * (size - size.clamp(min=1e-6).pow(_POWER - 1) / sharpness).clamp(min=0)
    goal = rows - kept * scale
    if not scheme.symmetric:
        zero_point = torch.round((codes - goal / scale).mean(dim=1, keepdim=True))
        zero_point = zero_point.clamp(scheme.qmin, scheme.qmax)
    level = codes - zero_point
    power = level.square().sum(dim=1, keepdim=True)
    fitted = (level * goal).sum(dim=1, keepdim=True) / power
    return torch.where((power > 0) & (fitted > 0.5 * scale), fitted, scale), zero_point
