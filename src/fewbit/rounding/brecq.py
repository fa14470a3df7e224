"""BRECQ: weights begin at their nearest codes, and each block then learns which of them round the other way.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (arXiv 2102.05426). The
learning needs the network: `fewbit.quantize` does it on calibration data, in `fewbit.reconstruct`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.rounding import Reconstruction

STATISTICS: frozenset[str] = frozenset()
RECONSTRUCTION = Reconstruction(drop=False)


def accepts(spec: Format) -> bool:
    """Up or down are the choices between integers."""
    return spec.integer


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """The nearest codes of a weight for the range lo, hi [C] of each block."""
    return QTensor.quantize(weight, scheme, lo, hi)
