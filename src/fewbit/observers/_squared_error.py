"""The search for the range of least squared error: over a histogram, or over the numbers themselves."""

import torch
from torch import Tensor

from fewbit.numerics.clipping import Loss, search_clipping
from fewbit.numerics.qtensor import fake_quantize_rows
from fewbit.numerics.scheme import Scheme, qparams
from fewbit.observers import HistogramObserver

_GOLDEN = 0.6180339887498949
_CELLS = 2**22  # candidates times bins evaluated at a time


class SquaredErrorObserver(HistogramObserver):
    """Saturating range: least sum of count * (x - Q(x))**2 over the histogram; Q is the quantizer."""

    def _estimate(self) -> tuple[Tensor, Tensor]:
        seen = self.histogram
        counts = seen.nonzero_counts() if self.scheme.spec.zero else seen.counts
        lo, hi = seen.lo.clamp(max=0), seen.hi.clamp(min=0)
        loss = squared_error(self._points(), counts, self.scheme)
        return search_clipping(loss, lo, hi, self.scheme.symmetric)

    def _points(self) -> Tensor:
        """One point in each bin that stands for all its numbers: float32 [C, bins].

        The points are spread over the bins by the golden ratio: at bin centres, they would all sit in the
        same place of the quantizer's step when steps are finer than bins, and a coarse step could seem free
        of error.
        """
        edges = self.histogram.edges()
        place = (
            torch.arange(self.histogram.bins, device=edges.device, dtype=torch.float64) * _GOLDEN + 0.5
        ).frac()
        return (edges[:, :-1] + place * (edges[:, 1:2] - edges[:, 0:1])).to(torch.float32)


def squared_error(points: Tensor, weights: Tensor, scheme: Scheme) -> Loss:
    """The loss of ranges: weights * (points - Q(points))**2, summed over each block.

    Args:
        points: float32 [C, n]; weights: [C, n], counted in float64.
    """

    def loss(low: Tensor, high: Tensor) -> Tensor:
        step = max(1, _CELLS // (low.shape[1] * points.shape[1]))
        sums = []
        for start in range(0, low.shape[0], step):
            part = slice(start, start + step)
            shape = (*low[part].shape, points.shape[1])
            x = points[part].unsqueeze(1).expand(shape).reshape(-1, points.shape[1])
            scale, zero_point = qparams(low[part].reshape(-1), high[part].reshape(-1), scheme)
            error = (fake_quantize_rows(x, scale, zero_point, scheme) - x).square_().reshape(shape)
            sums.append(torch.einsum("ckb,cb->ck", error.to(torch.float64), weights[part].to(torch.float64)))
        return torch.cat(sums)

    return loss
