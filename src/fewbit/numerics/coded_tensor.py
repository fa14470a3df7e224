"""Tensors as few bytes, without loss: dense, or as gaps and values where one value is most frequent.

Gaps in row-major or column-major order follow Han et al., "Deep Compression" (arXiv 1510.00149), with an escape for
long ones; both streams are entropy-coded. `docs/saved-form.md` has the layout byte by byte.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.numerics.coding import SLACK, Reader, Stream, cost, number_bytes

RAW, DENSE, BY_ROW, BY_COLUMN = range(4)
_LIMITS = (7, 15, 31, 63, 127, 255)  # candidates for the gap that stands for "no value yet"
_WORTH_TRYING = 0.2  # share of the most frequent number below which no gaps are tried


@dataclass(frozen=True)
class CodedTensor:
    """A tensor's numbers as they are stored.

    Attributes:
        form: RAW, DENSE, BY_ROW or BY_COLUMN.
        raw: of RAW, the numbers' little-endian bytes.
        planes: a stream for each byte of a number, the lowest first: of all numbers, or of those that are not common.
        common: of BY_ROW and BY_COLUMN, the bytes of the most frequent number.
        limit: the gap that stands for so many common numbers with nothing behind them.
        gaps: how many common numbers stand before each other one.
    """

    form: int
    raw: bytes = b""
    planes: tuple[Stream, ...] = ()
    common: bytes = b""
    limit: int = 0
    gaps: Stream = field(default_factory=lambda: Stream(0, 0, 0))

    @classmethod
    def encode(cls, x: Tensor) -> "CodedTensor":
        """The smallest form of a tensor of any dtype and shape: all are tried."""
        flat = x.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy()
        numbers = raw.reshape(flat.numel(), flat.element_size())
        # Estimates from counts, which are fast, and how to make what is found best; the last is decoded fastest.
        ways: list[tuple[int, Callable[[], CodedTensor]]] = [(raw.size, lambda: cls(RAW, raw.tobytes()))]
        if len(numbers):
            dense = (_cost(numbers), lambda: cls(DENSE, planes=_streams(numbers)))
            ways = [dense, *_sparse(numbers, x.shape), *ways]
        least = min(ways, key=lambda way: way[0])[0] * (1 + SLACK)
        return [make for size, make in ways if size <= least][-1]()

    @classmethod
    def read(cls, data: bytes, n: int, size: int) -> "CodedTensor":
        """What `to_bytes` wrote: n numbers of that many bytes, not yet decoded. FormatError for what cannot be."""
        reader = Reader(data)
        form = reader.byte()
        if form == RAW:
            coded = cls(RAW, reader.take(n * size))
        elif form == DENSE:
            coded = cls(DENSE, planes=tuple(Stream.read(reader, n) for _ in range(size)))
        elif form in (BY_ROW, BY_COLUMN):
            common, limit = reader.take(size), reader.byte()
            values, steps = reader.number(), reader.number()
            if not limit or not values <= steps <= n:
                raise FormatError(f"{steps} gaps for {values} of {n} numbers found: the data are damaged")
            gaps = Stream.read(reader, steps)
            coded = cls(
                form, b"", tuple(Stream.read(reader, values) for _ in range(size)), common, limit, gaps
            )
        else:
            raise FormatError(f"a tensor of form {form} found, expected 0 to 3")
        if reader.left:
            raise FormatError(f"{reader.left} bytes more than expected found: the data are damaged")
        return coded

    def decode(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor, in memory of its own. Raises FormatError for data that cannot be."""
        n = math.prod(shape)
        if not n:
            return torch.empty(shape, dtype=dtype)
        if self.form == RAW:
            numbers = np.frombuffer(self.raw, np.uint8).copy()
        elif self.form == DENSE:
            numbers = _joined([plane.decode() for plane in self.planes])
        else:
            places = _places(self.gaps.decode(), self.limit, n)
            if len(places) != self.planes[0].n:
                raise FormatError(
                    f"{len(places)} places found for {self.planes[0].n} values: the data are damaged"
                )
            width = dtype.itemsize
            table = np.empty((n, width), np.uint8)
            table[:] = np.frombuffer(self.common, np.uint8)
            if self.form == BY_COLUMN:
                rows = shape[0] if shape else 1
                places = places % max(rows, 1) * (n // max(rows, 1)) + places // max(rows, 1)
            for i, plane in enumerate(self.planes):
                table[places, i] = plane.decode()
            numbers = table.reshape(-1)
        return torch.from_numpy(numbers).view(dtype).reshape(shape)

    def to_bytes(self) -> bytes:
        """What `read` reads."""
        return b"".join([self._head(), self.raw, self.gaps.to_bytes(), *(p.to_bytes() for p in self.planes)])

    def sizes(self) -> dict[str, int]:
        """Bytes of codes, gaps and tables, and of what frames them; they add up to all."""
        streams = [self.gaps, *self.planes]
        parts = {
            "codes": len(self.raw) + sum(len(plane.payload) for plane in self.planes),
            "gaps": len(self.gaps.payload),
            "tables": sum(len(stream.table) for stream in streams),
        }
        return parts | {"frames": len(self.to_bytes()) - sum(parts.values())}

    def _head(self) -> bytes:
        if self.form in (RAW, DENSE):
            return bytes([self.form])
        counts = number_bytes(self.planes[0].n) + number_bytes(self.gaps.n)
        return bytes([self.form]) + self.common + bytes([self.limit]) + counts


def _sparse(numbers: np.ndarray, shape: torch.Size) -> list[tuple[int, Callable[[], CodedTensor]]]:
    """The sparse forms: what each about takes, and how to make it; the fastest to decode comes last."""
    common = _most_frequent(numbers)
    others = (numbers != common).any(1)
    if 1 - others.mean() < _WORTH_TRYING:
        return []
    forms = [(BY_ROW, numbers, others)]
    if len(shape) > 1 and shape[0] > 1:
        by_column = np.ascontiguousarray(numbers.reshape(shape[0], -1, numbers.shape[1]).swapaxes(0, 1))
        forms.append(
            (BY_COLUMN, by_column.reshape(numbers.shape), others.reshape(shape[0], -1).T.reshape(-1))
        )
    ways: list[tuple[int, Callable[[], CodedTensor]]] = []
    for form, ordered, used in forms:
        places = np.flatnonzero(used)
        values = ordered[places]
        costs = {limit: cost(_gaps(places, limit)) for limit in _LIMITS}
        limit = max(each for each in _LIMITS if costs[each] <= min(costs.values()) * (1 + SLACK))
        spent = 1 + len(common) + costs[limit] + _cost(values)
        ways.insert(0, (spent, partial(_with_gaps, form, places, values, common, limit)))
    return ways


def _with_gaps(
    form: int, places: np.ndarray, values: np.ndarray, common: np.ndarray, limit: int
) -> CodedTensor:
    gaps = Stream.encode(_gaps(places, limit))
    return CodedTensor(form, b"", _streams(values), common.tobytes(), limit, gaps)


def _most_frequent(numbers: np.ndarray) -> np.ndarray:
    """The bytes of the most frequent number of one or two bytes; of wider ones, zero."""
    size = numbers.shape[1]
    if size > 2:
        return np.zeros(size, np.uint8)
    whole = numbers.reshape(-1).view(f"<u{size}")
    return np.array([np.bincount(whole).argmax()], f"<u{size}").view(np.uint8)


def _gaps(places: np.ndarray, limit: int) -> np.ndarray:
    """The gaps before ascending places, in steps below the limit; a step of the limit has no number behind it."""
    gaps = np.diff(places, prepend=-1) - 1
    long = gaps // limit
    steps = np.full(len(gaps) + int(long.sum()), limit, np.uint8)
    steps[np.cumsum(long + 1) - 1] = gaps % limit
    return steps


def _places(steps: np.ndarray, limit: int, n: int) -> np.ndarray:
    """The inverse of `_gaps`: places below n. Raises FormatError for others."""
    ends = steps < limit
    places = np.cumsum(steps + ends.astype(np.int64))[ends] - 1
    if len(steps) and (int(steps.max()) > limit or not ends[-1] or int(places[-1]) >= n):
        raise FormatError("gaps that lead beyond the tensor found: the data are damaged")
    return places


def _streams(numbers: np.ndarray) -> tuple[Stream, ...]:
    return tuple(Stream.encode(np.ascontiguousarray(plane)) for plane in numbers.T)


def _joined(planes: list[np.ndarray]) -> np.ndarray:
    return planes[0] if len(planes) == 1 else np.stack(planes, axis=1).reshape(-1)


def _cost(numbers: np.ndarray) -> int:
    return sum(cost(plane) for plane in numbers.T)
