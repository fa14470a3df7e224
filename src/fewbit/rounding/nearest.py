"""Round to nearest, ties to even: each weight on its own, no data needed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme

STATISTICS: frozenset[str] = frozenset()


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Nearest codes of a weight for the range lo, hi [C] of each block; values outside it saturate."""
    return QTensor.quantize(weight, scheme, lo, hi)
