"""k-means clustering of weights: codebooks with the least squared error.

Han et al., "Deep Compression" (arXiv 1510.00149).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewbit.numerics.clustering import cluster
from fewbit.numerics.codebooks import fit_codebook
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme

STATISTICS: frozenset[str] = frozenset()


def accepts(spec: Format) -> bool:
    """Formats whose values are fitted to the tensor."""
    return spec.learned


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Codes and codebook of a weight; ranges do not matter, because nothing saturates."""
    return fit_codebook(weight, scheme, cluster)
