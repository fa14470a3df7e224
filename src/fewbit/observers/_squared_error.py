"""The search for the range of least squared error: over a histogram, or over the numbers themselves."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics.clipping import Loss, search_clipping
from fewbit.numerics.qtensor import fake_quantize_rows
from fewbit.numerics.ranges import extremes
from fewbit.numerics.scheme import Scheme, block_count, blocks, qparams
from fewbit.observers import HistogramObserver

_GOLDEN = 0.6180339887498949
_CELLS = 2**18  # candidates times numbers evaluated at a time: what fits into a core's cache
_HOPELESS = 20.0  # times the least error: where clipping costs that, clipping more costs more
_HOPELESS_WEIGHTS = 4.0  # whose histograms have one hill
_ROUNDS = 2  # of refinement for weights: to 2 % of the range
_LARGE = 2**15  # numbers in a block from which a histogram says enough about it


class SquaredErrorObserver(HistogramObserver):
    """Saturating range: least sum of count * (x - Q(x))**2 over the histogram; Q is the quantizer."""

    def _estimate(self) -> tuple[Tensor, Tensor]:
        seen = self.histogram
        counts = (seen.nonzero_counts() if self.scheme.spec.zero else seen.counts).to(torch.float64)
        lo, hi = seen.lo.clamp(max=0), seen.hi.clamp(min=0)
        loss = squared_error(self._points(), counts, self.scheme)
        return search_clipping(loss, lo, hi, self.scheme.symmetric, _HOPELESS)

    def bounds_of(self, x: Tensor, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The range of each block, for the numbers themselves where blocks are small or have an importance.

        statistics: optionally "importance", float, in x's shape, not negative: how much each squared error counts.
        """
        importance = statistics.get("importance")
        if importance is not None and importance.shape != x.shape:
            found, expected = tuple(importance.shape), tuple(x.shape)
            raise CalibrationError(
                f"an importance of shape {found} does not belong to a tensor of shape {expected}"
            )
        if importance is None and x.numel() > _LARGE * block_count(x.shape, self.scheme):
            return super().bounds_of(x, statistics)
        self._widen(*extremes(x, self.scheme))
        rows = blocks(x.detach().to(torch.float32), self.scheme)
        weights = None if importance is None else blocks(importance.to(rows), self.scheme)
        least, most = self.observed()
        loss = squared_error(rows, weights, self.scheme)
        lo, hi = least.clamp(max=0), most.clamp(min=0)
        ends = search_clipping(loss, lo, hi, self.scheme.symmetric, _HOPELESS_WEIGHTS, _ROUNDS)
        return self._limited(*ends)

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


def squared_error(points: Tensor, weights: Tensor | None, scheme: Scheme) -> Loss:
    """The loss of ranges: weights * (points - Q(points))**2, summed over each block.

    Args:
        points: float32 [C, n]; weights: float [C, n], summed in their dtype; None for ones.
    """

    def loss(low: Tensor, high: Tensor) -> Tensor:
        step = max(1, _CELLS // (low.shape[1] * points.shape[1]))
        sums = []
        for start in range(0, low.shape[0], step):
            part = slice(start, start + step)
            x = points[part].unsqueeze(1)
            scale, zero_point = qparams(low[part], high[part], scheme)
            error = fake_quantize_rows(x, scale, zero_point, scheme).sub_(x).square_()
            if weights is not None:
                # A batch of products of a matrix and a vector, of this shape, takes twice as long.
                error = error.to(weights.dtype).mul_(weights[part].unsqueeze(1))
            sums.append(error.sum(dim=2).to(torch.float64))
        return torch.cat(sums)

    return loss
