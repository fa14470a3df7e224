"""The range of a weight that minimises the squared error of what the layer computes, inputs taken as independent.

Each weight's squared error counts as much as the second moment of the input that it is multiplied by: the diagonal of
the layer's Hessian, as in llama.cpp's importance matrices and in Choi et al., "Towards the Limit of Network
Quantization" (arXiv 1612.01543).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics.clipping import search_clipping
from fewbit.numerics.ranges import extremes
from fewbit.numerics.scheme import blocks
from fewbit.observers._squared_error import SquaredErrorObserver, squared_error


class Observer(SquaredErrorObserver):
    """Saturating range of a weight: least sum of importance * (w - Q(w))**2, over the weights themselves.

    Of numbers that come in batches, whose importance nobody knows, it is the range of least squared error.
    """

    STATISTICS = frozenset({"importance"})

    def bounds_of(self, x: Tensor, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The range of each block. statistics: "importance", float, in x's shape, not negative."""
        importance = statistics["importance"]
        if importance.shape != x.shape:
            found, expected = tuple(importance.shape), tuple(x.shape)
            raise CalibrationError(
                f"an importance of shape {found} does not belong to a tensor of shape {expected}"
            )
        self._widen(*extremes(x, self.scheme))
        rows = blocks(x.detach().to(torch.float32), self.scheme)
        loss = squared_error(rows, blocks(importance, self.scheme), self.scheme)
        least, most = self.observed()
        found = search_clipping(loss, least.clamp(max=0), most.clamp(min=0), self.scheme.symmetric)
        return self._limited(*found)
