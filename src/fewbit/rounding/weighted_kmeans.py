"""k-means of weights that counts each weight's error as much as its input is large: less error of the layer's output.

Choi et al., "Towards the Limit of Network Quantization" (arXiv 1612.01543), with the second moments of the inputs for
the diagonal of the Hessian.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewbit.numerics.clustering import cluster
from fewbit.numerics.codebooks import fit_codebook
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme

STATISTICS = frozenset({"importance"})


def accepts(spec: Format) -> bool:
    """Formats whose values are fitted to the tensor."""
    return spec.learned


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Codes and codebook of a weight; ranges do not matter. statistics: "importance", float, in the weight's shape."""
    return fit_codebook(weight, scheme, cluster, statistics["importance"])
