"""The clipping bounds that lose the least information: Kullback-Leibler calibration, for one or two bounds.

Migacz, "8-bit Inference with TensorRT" (GPU Technology Conference 2017). Three things differ from its
pseudocode: the levels are the scheme's own, so that an affine or one-sided range uses all of them; exact
zeros do not count, because every scheme codes them exactly; and a range whose clipped numbers have no level
of their own to go to is ruled out, not smoothed.
"""

import torch
from torch import Tensor

from fewbit.numerics.clipping import search_clipping
from fewbit.numerics.scheme import qparams
from fewbit.observers import HistogramObserver


class Observer(HistogramObserver):
    """Saturating range: least KL(P || Q) over the histogram.

    P is the histogram within the range, with what lies outside added to the outermost bins. Q is the
    histogram within the range, quantized: each level's numbers are spread evenly over those of its bins that
    P has numbers in. A format with more levels than the histogram has bins loses nothing that can be seen:
    the true extremes are kept.
    """

    BINS = 8192  # some 16 bins or more per level of 8 bits: with few, a narrow range seems to lose nothing

    def _estimate(self) -> tuple[Tensor, Tensor]:
        seen = self.histogram
        levels = self._levels()
        lo, hi = seen.lo.clamp(max=0), seen.hi.clamp(min=0)
        if levels.numel() >= seen.bins:
            return lo, hi
        edges, counts = seen.edges(), seen.nonzero_counts().to(torch.float64)
        between = (levels[1:] + levels[:-1]) / 2

        def loss(low: Tensor, high: Tensor) -> Tensor:
            scale, zero_point = qparams(low.reshape(-1), high.reshape(-1), self.scheme)
            shape = (*low.shape, 1)
            steps = (between - zero_point.reshape(shape)) * scale.to(torch.float64).reshape(shape)
            each = zip(edges, counts, low, high, steps, strict=True)
            return torch.stack([_divergence(*block) for block in each])

        return search_clipping(loss, lo, hi, self.scheme.symmetric)

    def _levels(self) -> Tensor:
        """The scheme's normalised values, ascending: float64 [levels]."""
        spec = self.scheme.spec
        values = spec.decode(spec.codes()).to(torch.float64)
        return values[(values >= self.scheme.qmin) & (values <= self.scheme.qmax)]


def _divergence(edges: Tensor, counts: Tensor, low: Tensor, high: Tensor, steps: Tensor) -> Tensor:
    """KL(P || Q) of K candidate ranges of one block; infinite where P has numbers that no level of Q has.

    Levels are runs of bins, so everything follows from cumulated sums, at the runs' ends.

    Args:
        edges, counts: float64 [bins + 1], [bins].
        low, high: float64 [K], the ranges.
        steps: float64 [K, levels - 1], where one level ends and the next begins.

    Returns:
        float64 [K].
    """
    bins, total = counts.numel(), counts.sum()
    if total == 0:
        return torch.zeros_like(low)
    first = (torch.searchsorted(edges, low, right=True) - 1).clamp(0, bins - 1)
    last = (torch.searchsorted(edges, high, right=True) - 1).clamp(0, bins - 1)
    centres = (edges[1:] + edges[:-1]) / 2
    inner = torch.searchsorted(centres, steps.contiguous())
    ends = torch.cat(
        (first[:, None], inner.clamp(first[:, None], last[:, None] + 1), last[:, None] + 1), dim=1
    )

    sums, occupied = _cumulated(counts), _cumulated((counts > 0).to(torch.float64))
    p, bins_of_p = sums[ends].diff(dim=1), occupied[ends].diff(dim=1)
    q = p.clone()
    entropy = _cumulated(torch.xlogy(counts, counts))
    p_log_p = entropy[last + 1] - entropy[first]
    # What is clipped joins the outermost bins. A single bin left takes both, one after the other.
    bin_first = counts[first] + sums[first]
    rest = sums[-1] - sums[last + 1]
    for place, extra, before in (
        (first, sums[first], counts[first]),
        (last, rest, torch.where(last == first, bin_first, counts[last])),
    ):
        level = (inner <= place[:, None]).sum(dim=1, keepdim=True)
        p.scatter_add_(1, level, extra[:, None])
        bins_of_p.scatter_add_(1, level, ((before == 0) & (extra > 0)).to(torch.float64)[:, None])
        p_log_p += torch.xlogy(before + extra, before + extra) - torch.xlogy(before, before)
    p_log_q = torch.xlogy(p, q / bins_of_p.clamp(min=1)).sum(dim=1)
    divergence = (p_log_p - p_log_q) / total - total.log() + q.sum(dim=1).log()
    return torch.where((p > 0) & (q == 0), torch.inf, 0.0).sum(dim=1) + divergence.nan_to_num(nan=torch.inf)


def _cumulated(x: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, ... elements: float64 [n + 1]."""
    return torch.cat((x.new_zeros(1), x.cumsum(dim=0)))
