"""Mergeable histograms in bounded memory; bin widths are powers of two, so that merging is exact."""

import torch
from torch import Tensor

from fewbit.errors import CalibrationError

_MAX_CELLS = 2**24  # counts over all blocks together: 128 MiB
_FEWEST_BINS = 64
_CHUNK = 2**17  # numbers binned at a time: temporary arrays stay in the cache and do not grow with the batch
_FINEST = -126  # exponent of the narrowest bin: its inverse is still a finite float32
_INDEX_BITS = 23  # a bin's index counted from zero stays below 2**24, so it is exact in float32


class Histogram:
    """Counts of numbers in equal bins, one row of bins per block, over a range that grows with the data.

    Bin j of a block holds the numbers x with (origin + j) <= x / 2**exponent < (origin + j + 1). The exponent
    and the origin are the ones that fit the extremes seen so far most tightly, so they depend on the data
    alone: the same numbers in any order, in any batches, merged in any way, give the same counts, exactly
    (numbers below 2**-149 of a bin's width aside, which may land on the other side of zero).

    Attributes:
        counts: int64 [C, bins]; zeros included.
        zeros: int64 [C], how many numbers were exactly zero.
        exponent, origin: int64 [C].
        lo, hi: float32 [C], the true extremes.
    """

    def __init__(self, lo: Tensor, hi: Tensor, bins: int = 2048) -> None:
        """An empty histogram for numbers in lo..hi (float32 [C], finite); many blocks get fewer bins each."""
        while lo.numel() * bins > _MAX_CELLS and bins > _FEWEST_BINS:
            bins //= 2
        self.bins = bins
        self.lo, self.hi = lo, hi
        self.exponent, self.origin = _layout(lo, hi, bins)
        self.counts = torch.zeros(lo.numel(), bins, dtype=torch.int64, device=lo.device)
        self.zeros = torch.zeros(lo.numel(), dtype=torch.int64, device=lo.device)

    def update(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        """Counts the numbers of `rows` [C, n] (any float dtype, finite), whose extremes are lo and hi [C]."""
        self._grow(lo, hi)
        blocks, numbers = rows.shape
        inverse = torch.exp2(-self.exponent.to(torch.float32)).reshape(-1, 1)
        origin = self.origin.to(torch.float32).reshape(-1, 1)
        first = torch.arange(blocks, device=rows.device).reshape(-1, 1) * self.bins
        size = min(numbers, max(_CHUNK, self.counts.numel()) // blocks)
        # Buffers are reused: for fresh ones, the system's page faults take longer than the arithmetic.
        place = torch.empty(blocks, size, device=rows.device)
        index = torch.empty(blocks, size, dtype=torch.int64, device=rows.device)
        flat = self.counts.reshape(-1)
        for part in rows.split(size, dim=1):
            part, end = part.to(torch.float32), part.shape[1]
            # Comparing into a float buffer, then summing (exact below 2**24), is 5 times as fast as counting.
            self.zeros += torch.eq(part, 0, out=place[:, :end]).sum(dim=1).to(torch.int64)
            torch.mul(part, inverse, out=place[:, :end]).floor_().sub_(origin)
            index[:, :end] = place[:, :end]
            if blocks > 1:
                index[:, :end] += first
            flat += torch.bincount(index[:, :end].reshape(-1), minlength=flat.numel())

    def merge(self, other: "Histogram") -> None:
        """Adds all counts of another histogram.

        Raises CalibrationError if it has another number of blocks.
        """
        if other.counts.shape != self.counts.shape:
            found, expected = tuple(other.counts.shape), tuple(self.counts.shape)
            raise CalibrationError(f"histograms of {found} and {expected} blocks and bins cannot be merged")
        self._grow(other.lo, other.hi)
        self.counts += _moved(other, self.exponent, self.origin)
        self.zeros += other.zeros

    def edges(self) -> Tensor:
        """Bin edges: float64 [C, bins + 1]."""
        index = torch.arange(self.bins + 1, device=self.origin.device) + self.origin.reshape(-1, 1)
        return torch.ldexp(index.to(torch.float64), self.exponent.reshape(-1, 1))

    def nonzero_counts(self) -> Tensor:
        """Counts without the exact zeros, which every scheme codes exactly: int64 [C, bins]."""
        counts = self.counts.clone()
        place = (-self.origin).clamp(0, self.bins - 1).reshape(-1, 1)
        # A block whose range does not hold zero has no zeros to subtract, so the clamped place does no harm.
        counts.scatter_add_(1, place, -self.zeros.reshape(-1, 1))
        return counts

    def _grow(self, lo: Tensor, hi: Tensor) -> None:
        self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
        exponent, origin = _layout(self.lo, self.hi, self.bins)
        if not (torch.equal(exponent, self.exponent) and torch.equal(origin, self.origin)):
            self.counts = _moved(self, exponent, origin)
            self.exponent, self.origin = exponent, origin


def _layout(lo: Tensor, hi: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Smallest exponent, and its origin, with which `bins` bins hold lo..hi: int64 [C] each."""
    lo, hi = lo.to(torch.float64), hi.to(torch.float64)
    magnitude = torch.frexp(torch.maximum(lo.abs(), hi.abs())).exponent
    # A width w holds the span only if w > span / bins, so no exponent below this one can do.
    exponent = torch.where(hi > lo, torch.frexp((hi - lo) / bins).exponent, _FINEST)
    exponent = torch.maximum(exponent, magnitude - _INDEX_BITS).clamp(min=_FINEST).to(torch.int64)
    while True:
        first = torch.ldexp(lo, -exponent).floor()
        short = torch.ldexp(hi, -exponent).floor() - first >= bins
        if not bool(short.any()):
            return exponent, first.to(torch.int64)
        exponent = exponent + short


def _moved(old: Histogram, exponent: Tensor, origin: Tensor) -> Tensor:
    """Counts of `old` in a coarser or shifted layout that covers it: int64 [C, bins]."""
    index = torch.arange(old.bins, device=origin.device) + old.origin.reshape(-1, 1)
    # 63 is enough: indices are below 2**24, and a right shift of a negative number rounds down, as bins do.
    shift = (exponent - old.exponent).clamp(max=63).reshape(-1, 1)
    index = (index >> shift) - origin.reshape(-1, 1)
    # Only empty bins can fall outside the new layout.
    return torch.zeros_like(old.counts).scatter_add_(1, index.clamp(0, old.bins - 1), old.counts)
