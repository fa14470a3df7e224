"""Streams of bytes, entropy-coded: a coder is a file here. `docs/saved-form.md` has the layout byte by byte.

A coder offers:

- ``MARK``: the byte that names it in files, never used twice and never changed; the plain coder's is the lowest.
- ``cost(counts)``: about how many bytes table and payload take; the coder whose cost is least is used.
- ``table_size(count)``: bytes of its table for an alphabet of that many symbols.
- ``encode(symbols, counts)``: table and payload, for uint8 symbols below ``len(counts)``; the first and the last
  symbol of the alphabet occur, and they differ.
- ``decode(table, payload, n)``: the n symbols, uint8. Raises FormatError for what cannot be.

Whoever decodes a stream bounds the number of its symbols first.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np

from fewbit.errors import FormatError
from fewbit.registry import Registry

SLACK = 0.005  # what is larger by no more than this is taken where it is decoded faster
registry = Registry("fewbit.numerics.coding", "coder", FormatError)


class Reader:
    """Reads a run of bytes from its beginning. Raises FormatError where it is too short."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self.at

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if size > self.left:
            raise FormatError(f"{size} more bytes expected, {self.left} found: the data end too early")
        self.at += size
        return self._data[self.at - size : self.at]

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def number(self) -> int:
        """A whole number written by `number_bytes`."""
        value = 0
        for shift in range(0, 49, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise FormatError("a number of more than 49 bits found: the data are damaged")


def number_bytes(value: int) -> bytes:
    """A whole number as LEB128: seven bits a byte, the lowest first, and a high bit where more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@dataclass(frozen=True)
class Stream:
    """n bytes (uint8 symbols) as they are stored. An alphabet of ``count`` symbols begins at ``first``, modulo 256."""

    n: int
    first: int
    count: int
    mark: int = 0
    table: bytes = b""
    payload: bytes = b""

    @classmethod
    def encode(cls, symbols: np.ndarray) -> "Stream":
        """The smallest form of uint8 symbols [n]."""
        first, counts = _alphabet(symbols)
        if len(counts) < 2:
            return cls(len(symbols), first, len(counts))
        coder = _cheapest(counts)
        table, payload = coder.encode(symbols - np.uint8(first), counts)
        return cls(len(symbols), first, len(counts), coder.MARK, table, payload)

    @classmethod
    def read(cls, reader: Reader, n: int) -> "Stream":
        """A stream of n symbols, not yet decoded. Raises FormatError for an unknown coder, and data that end early."""
        if not n:
            return cls(0, 0, 0)
        first, count = reader.byte(), reader.byte() + 1
        if count == 1:
            return cls(n, first, 1)
        mark, size = reader.byte(), reader.number()
        if mark not in _marks():
            raise FormatError(f"a stream of coder {mark} found, expected one of {sorted(_marks())}")
        return cls(n, first, count, mark, reader.take(_marks()[mark].table_size(count)), reader.take(size))

    def decode(self) -> np.ndarray:
        """The symbols: uint8 [n]. Raises FormatError for data that cannot be."""
        if self.count < 2:
            return np.full(self.n, self.first, np.uint8)
        symbols: np.ndarray = _marks()[self.mark].decode(self.table, self.payload, self.n)
        if self.first:
            symbols += np.uint8(self.first)
        return symbols

    def to_bytes(self) -> bytes:
        """What `read` reads."""
        if not self.n:
            return b""
        head = bytes([self.first, self.count - 1])
        if self.count == 1:
            return head
        return head + bytes([self.mark]) + number_bytes(len(self.payload)) + self.table + self.payload


def cost(symbols: np.ndarray) -> int:
    """About the bytes of `Stream.encode(symbols).to_bytes()`, much faster."""
    _, counts = _alphabet(symbols)
    if len(counts) < 2:
        return 2 * len(counts)
    payload = int(_cheapest(counts).cost(counts))
    return 3 + len(number_bytes(payload)) + payload


def _alphabet(symbols: np.ndarray) -> tuple[int, np.ndarray]:
    """The first symbol of the shortest run, modulo 256, that holds all symbols; how often each of it occurs."""
    counts = np.bincount(symbols, minlength=256)
    used = np.flatnonzero(counts)
    if not len(used):
        return 0, counts[:0]
    behind = int(np.diff(used, append=used[0] + 256).argmax())  # the run begins behind the widest hole
    first = int(used[(behind + 1) % len(used)])
    length = (int(used[behind]) - first) % 256 + 1
    return first, np.roll(counts, -first)[:length]


def _cheapest(counts: np.ndarray) -> ModuleType:
    costs = {mark: coder.cost(counts) for mark, coder in _marks().items()}
    least = min(costs.values()) * (1 + SLACK)
    return _marks()[min(mark for mark in costs if costs[mark] <= least)]


def _marks() -> dict[int, ModuleType]:
    return _coders(tuple(__path__))


@cache
def _coders(path: tuple[str, ...]) -> dict[int, ModuleType]:
    """The coders by their marks; listing folders is slow, so once for each list of folders."""
    coders = [registry.module(name) for name in registry.names()]
    return {coder.MARK: coder for coder in coders}
