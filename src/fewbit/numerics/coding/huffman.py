"""Canonical Huffman codes of at most 15 bits: a table of half a byte a symbol, which small streams like.

Huffman, "A Method for the Construction of Minimum-Redundancy Codes" (Proceedings of the IRE, 1952); of weights: Han et
al., "Deep Compression" (arXiv 1510.00149). Where each 512 symbols begin is stored, so that they are decoded side by
side: one by one, Python takes a symbol in no less than 70 ns, the whole budget of a weight.
"""

import heapq

import numpy as np

from fewbit.errors import FormatError

MARK = 1
LONGEST = 15  # bits of a code
LANE = 512  # symbols between two beginnings
_DAMAGED = "Huffman codes that do not fit their table found: the data are damaged"


def cost(counts: np.ndarray) -> float:
    """Exactly the bytes."""
    n = int(counts.sum())
    bits = int((counts * _lengths(counts)).sum())
    return -(-bits // 8) + table_size(len(counts)) + 2 * _beginnings(n)


def table_size(count: int) -> int:
    """Half a byte a symbol."""
    return -(-count // 2)


def encode(symbols: np.ndarray, counts: np.ndarray) -> tuple[bytes, bytes]:
    """The lengths of the codes; and the bits of each 512 symbols (uint16, where there are more), then the codes."""
    lengths = _lengths(counts)
    codes = _codes(lengths)
    place = np.arange(LONGEST)
    bits = []
    for start in range(0, len(symbols), 1 << 16):
        part = symbols[start : start + (1 << 16)]
        length = lengths[part][:, None]
        digits = (codes[part][:, None] >> np.maximum(length - 1 - place, 0)) & 1
        bits.append(digits[place < length].astype(np.uint8))
    spent = np.add.reduceat(lengths[symbols], np.arange(0, len(symbols), LANE))
    even = np.pad(lengths, (0, len(lengths) % 2)).reshape(-1, 2)
    table = (even[:, 0] | even[:, 1] << 4).astype(np.uint8)
    begin = spent.astype("<u2").tobytes() if _beginnings(len(symbols)) else b""
    return table.tobytes(), begin + np.packbits(np.concatenate(bits)).tobytes()


def decode(table: bytes, payload: bytes, n: int) -> np.ndarray:
    """The symbols. Raises FormatError for lengths that are no code, and for codes that do not end where they should."""
    nibbles = np.frombuffer(table, np.uint8)
    lookup = _lookup(np.stack([nibbles & 15, nibbles >> 4], axis=1).reshape(-1).astype(np.int64))
    lanes = -(-n // LANE)
    head = 2 * _beginnings(n)
    if len(payload) < head:
        raise FormatError(_DAMAGED)
    data = np.frombuffer(payload, np.uint8)[head:]
    spent = np.frombuffer(payload, "<u2", lanes).astype(np.int64) if head else np.array([8 * len(data)])
    ends = np.cumsum(spent)
    if -(-int(ends[-1]) // 8) != len(data):
        raise FormatError(_DAMAGED)
    padded = np.concatenate([data, np.zeros(LANE * LONGEST // 8 + 8, np.uint8)]).astype(np.int32)
    words = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
    at = ends - spent
    out = np.zeros((LANE if lanes > 1 else n, lanes), np.uint8)
    for step in range(len(out)):
        here = at[: lanes if step < n - LANE * (lanes - 1) else lanes - 1]
        found = lookup[(words[here >> 3] >> (9 - (here & 7))) & 0x7FFF]
        out[step, : len(here)] = found >> 4
        here += found & 15
    stray = ends - at
    if head:
        sound = not stray.any()
    else:
        sound = 0 <= int(stray[0]) < 8  # a single lane ends in its last byte
    if not sound:
        raise FormatError(_DAMAGED)
    return np.ascontiguousarray(out.T).reshape(-1)[:n]


def _beginnings(n: int) -> int:
    return -(-n // LANE) if n > LANE else 0


def _lengths(counts: np.ndarray) -> np.ndarray:
    """Bits of each symbol's code, 0 for those that do not occur: int64."""
    weights = counts.astype(np.int64)
    while True:
        heap: list[tuple[int, int, tuple[int, ...]]] = [
            (int(weight), i, (i,)) for i, weight in enumerate(weights) if weight
        ]
        heapq.heapify(heap)
        lengths = np.zeros(len(weights), np.int64)
        while len(heap) > 1:
            (a, _, left), (b, tie, right) = heapq.heappop(heap), heapq.heappop(heap)
            lengths[[*left, *right]] += 1
            heapq.heappush(heap, (a + b, tie, left + right))
        if lengths.max() <= LONGEST:
            return lengths
        weights = np.where(weights > 0, (weights >> 1) | 1, 0)  # flatter, until the codes are short enough


def _codes(lengths: np.ndarray) -> np.ndarray:
    """Canonical codes: in order of length, then of symbol, each the one before plus one."""
    codes = np.zeros(len(lengths), np.int64)
    code, before = 0, 0
    for length, symbol in sorted((int(length), i) for i, length in enumerate(lengths) if length):
        code <<= length - before
        codes[symbol], before = code, length
        code += 1
    return codes


def _lookup(lengths: np.ndarray) -> np.ndarray:
    """For each 15 bits the symbol that they begin with, times 16, plus the length of its code; 0 where none does."""
    space = 1 << LONGEST
    if not lengths.any() or int(np.where(lengths > 0, space >> lengths, 0).sum()) > space:
        raise FormatError(_DAMAGED)
    table = np.zeros(space, np.int64)
    for symbol, (length, code) in enumerate(zip(lengths, _codes(lengths), strict=True)):
        if length:
            start = int(code) << (LONGEST - int(length))
            table[start : start + (space >> int(length))] = symbol << 4 | int(length)
    return table
