"""QDrop: as `brecq`, while at random half of the activations stay float, so that blocks learn for flatter losses.

Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (arXiv
2203.05740). The learning needs the network: `fewbit.quantize` does it on calibration data, in `fewbit.reconstruct`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.rounding import Reconstruction

STATISTICS: frozenset[str] = frozenset()
RECONSTRUCTION = Reconstruction(drop=True)


def accepts(spec: Format) -> bool:
    """Up or down are the choices between integers."""
    return spec.integer


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """The nearest codes of a weight for the range lo, hi [C] of each block."""
    return QTensor.quantize(weight, scheme, lo, hi)
