"""Exponential moving average of each batch's minimum and maximum, corrected for its start from nothing.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(arXiv 1712.05877), section 3.1; the correction is the one of Adam (arXiv 1412.6980), section 3.
"""

from typing import Self

import torch
from torch import Tensor

from fewbit.numerics.scheme import Scheme
from fewbit.observers import RangeObserver


class Observer(RangeObserver):
    """Saturating range: the weighted mean of the batches' extremes, where the latest batches weigh most.

    Without the correction, the first batch would outweigh the next fifty. Merging is exact: it gives what one
    observer that saw first these batches, then the other's, would have.
    """

    SATURATES = True
    ORDER_INDEPENDENT = False
    WEIGHT = 0.01  # of the latest batch

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self._sum: Tensor | None = None  # float64 [2, C]: weighted sums of the minima and of the maxima
        self._weight = 0.0  # the sum of those weights
        self._updates = 0

    def _observe(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        self._append(torch.stack((lo, hi)).to(torch.float64) * self.WEIGHT, self.WEIGHT, 1)

    def _absorb(self, other: Self) -> None:
        if other._sum is not None:
            self._append(other._sum, other._weight, other._updates)

    def _append(self, total: Tensor, weight: float, updates: int) -> None:
        fade = (1.0 - self.WEIGHT) ** updates
        self._sum = total if self._sum is None else self._sum * fade + total
        self._weight = self._weight * fade + weight
        self._updates += updates

    def _estimate(self) -> tuple[Tensor, Tensor]:
        if self._sum is None:
            return self.observed()
        mean = self._sum / self._weight
        return mean[0], mean[1]
