"""The scale of ternary weights: the mean of |x| over the numbers beyond 0.7 times the mean of |x|.

Li et al., "Ternary Weight Networks" (arXiv 1605.04711). Rounding to nearest then puts the threshold at half the scale,
which for this scale costs no more than the paper's threshold; the rounding `twn` follows the paper to the letter.
"""

import torch
from torch import Tensor

from fewbit.observers import HistogramObserver

_THRESHOLD = 0.7


class Observer(HistogramObserver):
    """Saturating range: minus to plus the scale, exact to one bin of the histogram."""

    def _estimate(self) -> tuple[Tensor, Tensor]:
        edges, counts = self.histogram.edges(), self.histogram.counts.to(torch.float64)
        inner = torch.minimum(edges[:, :-1].abs(), edges[:, 1:].abs())
        width = edges[:, 1:2] - edges[:, 0:1]
        largest = torch.maximum(-self.histogram.lo, self.histogram.hi).double().unsqueeze(1)
        middle = torch.minimum(inner + width / 2, largest)  # for a constant block, the bin is far too wide
        nonzero = self.histogram.nonzero_counts().to(torch.float64)
        threshold = _THRESHOLD * (nonzero * middle).sum(1, keepdim=True) / counts.sum(1, keepdim=True)
        share = ((inner + width - threshold) / width).clamp(0, 1)  # of a bin, beyond the threshold
        beyond = nonzero * share
        centre = torch.minimum(inner + width * (1 - share / 2), largest)
        scale = (beyond * centre).sum(1) / beyond.sum(1).clamp(min=1e-300)
        return -scale, scale
