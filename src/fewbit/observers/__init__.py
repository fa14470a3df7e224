"""Range estimation: one estimator a file, each with a class `Observer`, built from a scheme."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics.histogram import Histogram
from fewbit.numerics.ranges import extremes
from fewbit.numerics.scheme import Scheme, blocks
from fewbit.registry import Registry

registry = Registry("fewbit.observers", "observer")


class RangeObserver(ABC):
    """What all observers share: the true extremes, the checks, and the frame of update, merge and bounds.

    A plug-in names its subclass `Observer` and fills in `_observe`, `_absorb` and `_estimate`. Its state must
    not grow with the number of updates.

    Class attributes:
        SATURATES: whether `bounds` may be narrower than what was observed.
        ORDER_INDEPENDENT: whether the same numbers in another order, or in other batches, give the same
            bounds.
        STATISTICS: what `bounds_of` asks for beside the tensor, by name.
    """

    STATISTICS: frozenset[str] = frozenset()
    SATURATES: bool
    ORDER_INDEPENDENT: bool

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._lo: Tensor | None = None
        self._hi: Tensor | None = None

    @torch.inference_mode(False)  # what is kept may be changed later, outside of inference mode
    def update(self, x: Tensor) -> None:
        """Takes one batch into account; a tensor without numbers changes nothing.

        Raises:
            CalibrationError: NaN or infinities (naming the index), or another number of blocks than before.
            FormatError: the scheme does not fit the shape.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        lo, hi = extremes(x, self.scheme)
        self._widen(lo, hi)
        self._observe(blocks(x, self.scheme), lo, hi)

    @torch.inference_mode(False)
    def merge(self, other: Self) -> None:
        """Adds all that another observer of the same kind and scheme has seen, as if it came next."""
        if type(other) is not type(self) or other.scheme != self.scheme:
            raise CalibrationError("only observers of the same kind and scheme can be merged")
        if other._lo is None or other._hi is None:
            return
        self._widen(other._lo, other._hi)
        self._absorb(other)

    def observed(self) -> tuple[Tensor, Tensor]:
        """True minimum and maximum of each block: float32 [C].

        Raises CalibrationError if nothing was seen.
        """
        if self._lo is None or self._hi is None:
            raise CalibrationError("nothing was observed: run calibration data through this layer first")
        return self._lo, self._hi

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The estimated range of each block, zero included: lo, hi float32 [C].

        Raises:
            CalibrationError: nothing was seen.
        """
        self.observed()
        return self._limited(*self._estimate())

    def bounds_of(self, x: Tensor, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The range of each block of a tensor that is there as a whole, a weight: lo, hi float32 [C].

        Args:
            x: float, finite.
            statistics: what `STATISTICS` names.

        Raises CalibrationError and FormatError as `update` does.
        """
        self.update(x)
        return self.bounds()

    def _limited(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """An estimate, limited to the true extremes and with zero included."""
        least, most = self.observed()
        lo = torch.maximum(lo.to(torch.float32), least).clamp(max=0.0)
        hi = torch.minimum(hi.to(torch.float32), most).clamp(min=0.0)
        return lo, hi

    def _widen(self, lo: Tensor, hi: Tensor) -> None:
        if self._lo is None or self._hi is None:
            self._lo, self._hi = lo, hi
            return
        if lo.shape != self._lo.shape:
            raise CalibrationError(
                f"found {lo.numel()} blocks after {self._lo.numel()}: the scheme's dimension must keep "
                "its size from batch to batch; use granularity 'tensor' or another axis"
            )
        self._lo, self._hi = torch.minimum(self._lo, lo), torch.maximum(self._hi, hi)

    @abstractmethod
    def _observe(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        """One batch as rows [C, n] of any float dtype, and its finite extremes, which are already kept."""

    @abstractmethod
    def _absorb(self, other: Self) -> None:
        """The state of another observer, which has seen something; its extremes are already kept."""

    @abstractmethod
    def _estimate(self) -> tuple[Tensor, Tensor]:
        """The range, lo and hi [C]; `bounds` limits it to the true extremes and includes zero."""


class HistogramObserver(RangeObserver):
    """An observer that keeps a histogram of each block; a plug-in only fills in `_estimate`.

    Class attributes:
        BINS: bins per block; halved until the counts of all blocks take no more than 128 MiB.
    """

    SATURATES = True
    ORDER_INDEPENDENT = True
    BINS = 2048

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self._histogram: Histogram | None = None

    @property
    def histogram(self) -> Histogram:
        """All that was seen. Raises CalibrationError if nothing was."""
        self.observed()
        assert self._histogram is not None
        return self._histogram

    def _observe(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        if self._histogram is None:
            self._histogram = Histogram(lo, hi, self.BINS)
        self._histogram.update(rows, lo, hi)

    def _absorb(self, other: Self) -> None:
        seen = other.histogram
        if self._histogram is None:
            self._histogram = Histogram(seen.lo, seen.hi, self.BINS)
        self._histogram.merge(seen)


def observer_names() -> list[str]:
    """Names of all observers."""
    return registry.names()


def make_observer(name: str, scheme: Scheme) -> RangeObserver:
    """A fresh observer. Raises RecipeError for an unknown name, with the nearest match."""
    return registry.module(name).Observer(scheme)


def weight_statistics(name: str) -> frozenset[str]:
    """What calibration must collect for this observer of a weight. Raises RecipeError for an unknown name."""
    return frozenset(registry.module(name).Observer.STATISTICS)
