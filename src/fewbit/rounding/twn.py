"""Ternary weights by a threshold: numbers beyond 0.7 times the mean magnitude become plus or minus the mean of these.

Li et al., "Ternary Weight Networks" (arXiv 1605.04711), section 2.3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, blocks, qparams, unblocks

STATISTICS: frozenset[str] = frozenset()

_THRESHOLD = 0.7


def accepts(spec: Format) -> bool:
    """Ternary weights with a scale."""
    return spec.name == "ternary"


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Ternary codes with the paper's threshold and scale of each block; the range lo, hi does not matter."""
    rows = blocks(weight.detach().to(torch.float32), scheme)
    size = rows.abs().to(torch.float64)
    beyond = size > _THRESHOLD * size.mean(dim=1, keepdim=True)
    scale = (size * beyond).sum(dim=1) / beyond.sum(dim=1).clamp(min=1)
    scales, zero_point = qparams(-scale, scale, scheme)
    codes = torch.sign(rows) * beyond
    return QTensor.from_codes(unblocks(codes, weight.shape, scheme), scales, zero_point, scheme)
