"""Percentiles of what was observed, from a histogram: the outermost fraction on each side saturates.

McKinstry et al., "Discovering Low-Precision Networks Close to Full-Precision Networks for Efficient Embedded
Inference" (arXiv 1809.04191), who keep 99.99 %.
"""

import torch
from torch import Tensor

from fewbit.observers import HistogramObserver


class Observer(HistogramObserver):
    """Saturating range: percentile P of |x| if symmetric, else percentiles 100 - P and P of x.

    Exact to one bin. Values within a bin count as evenly spread.
    """

    PERCENTILE = 99.99

    def _estimate(self) -> tuple[Tensor, Tensor]:
        edges, counts = self.histogram.edges(), self.histogram.counts.to(torch.float64)
        fraction = self.PERCENTILE / 100
        if not self.scheme.symmetric:
            return _quantile(edges, counts, 1 - fraction), _quantile(edges, counts, fraction)
        # Bin [a, b) of negative numbers is bin (-b, -a] of their magnitudes: both signs in one list, sorted.
        lower = torch.minimum(edges[:, :-1].abs(), edges[:, 1:].abs())
        order = lower.argsort(dim=1, stable=True)
        width = edges[:, 1:2] - edges[:, 0:1]
        limit = _place(lower.gather(1, order), width, counts.gather(1, order), fraction)
        return -limit, limit


def _quantile(edges: Tensor, counts: Tensor, fraction: float) -> Tensor:
    return _place(edges[:, :-1], edges[:, 1:2] - edges[:, 0:1], counts, fraction)


def _place(lower: Tensor, width: Tensor, counts: Tensor, fraction: float) -> Tensor:
    """Where the cumulated counts [C, bins] of bins that begin at `lower` reach a fraction: float64 [C]."""
    cumulated = counts.cumsum(dim=1)
    target = cumulated[:, -1:] * fraction
    place = torch.searchsorted(cumulated, target).clamp(max=counts.shape[1] - 1)
    inside = counts.gather(1, place)
    share = (target - (cumulated.gather(1, place) - inside)) / inside.clamp(min=1)
    return (lower.gather(1, place) + share.clamp(0, 1) * width).squeeze(1)
