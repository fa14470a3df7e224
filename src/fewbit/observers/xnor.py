"""The mean of |x|: the scale with which signs alone approximate a tensor best.

Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks" (arXiv 1603.05279).
"""

from typing import Self

import torch
from torch import Tensor

from fewbit.numerics.scheme import Scheme
from fewbit.observers import RangeObserver


class Observer(RangeObserver):
    """Saturating range: minus to plus the mean magnitude of each block, zeros included."""

    SATURATES = True
    ORDER_INDEPENDENT = False  # sums of floats

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self._sum: Tensor | None = None  # of |x|: float64 [C]
        self._count = 0  # numbers in each block

    def _observe(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        self._add(rows.abs().sum(dim=1, dtype=torch.float64), rows.shape[1])

    def _absorb(self, other: Self) -> None:
        if other._sum is not None:
            self._add(other._sum, other._count)

    def _add(self, total: Tensor, count: int) -> None:
        self._sum = total if self._sum is None else self._sum + total
        self._count += count

    def _estimate(self) -> tuple[Tensor, Tensor]:
        if self._sum is None:
            return self.observed()
        mean = self._sum / self._count
        return -mean, mean
