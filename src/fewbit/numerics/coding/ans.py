"""Asymmetric numeral systems by the library constriction, with shares in whole numbers that the file states.

Duda, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
arithmetic coding" (arXiv 1311.2540); Bamler, "Understanding Entropy Coding With Asymmetric Numeral Systems (ANS): a
Statistician's Perspective" (arXiv 2201.01741).
"""

from typing import Any

import numpy as np

from fewbit.errors import FormatError

MARK = 2
_PRECISION = 24  # bits of a symbol's share, of the library's own choice
_TOP = 20  # the most frequent symbol's exponent: the rarest of 2**23 still has a weight of its own


def cost(counts: np.ndarray) -> float:
    """The entropy under the table's shares, the table, and a state of 8 bytes."""
    used = counts > 0
    bits = _PRECISION - np.log2(shares(_table(counts))[used])
    return float((counts[used] * bits).sum()) / 8 + 8 + len(counts)


def table_size(count: int) -> int:
    """A byte a symbol."""
    return count


def encode(symbols: np.ndarray, counts: np.ndarray) -> tuple[bytes, bytes]:
    """The table of weights, and the words of the library's coder."""
    from constriction import stream

    table = _table(counts)
    used = table > 0
    index = np.cumsum(used, dtype=np.int32) - 1
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(index[symbols], _model(shares(table)[used]))
    return table.tobytes(), coder.get_compressed().astype("<u4").tobytes()


def decode(table: bytes, payload: bytes, n: int) -> np.ndarray:
    """The symbols. Raises FormatError for a payload that does not end where the encoder began."""
    from constriction import stream

    weights = np.frombuffer(table, np.uint8)
    if len(weights) < 2 or not weights[0] or not weights[-1]:
        raise FormatError("a table whose ends have no weight found: the data are damaged")
    if not payload or len(payload) % 4 or not any(payload[-4:]):
        raise FormatError("entropy-coded data that are no whole words found: the data are damaged")
    coder = stream.stack.AnsCoder(np.frombuffer(payload, "<u4").astype(np.uint32))
    used = np.flatnonzero(weights)
    try:
        index = coder.decode(_model(shares(weights)[used]), n)
    except BaseException as error:
        if (
            type(error).__name__ != "PanicException"
        ):  # Rust's, which is no Exception: nobody else would catch it
            raise
        raise FormatError(
            "entropy-coded data that the coder cannot read found: the data are damaged"
        ) from None
    if not coder.is_empty():
        raise FormatError("entropy-coded data do not end where they began: the data are damaged")
    found = index.astype(np.uint8)
    if len(used) == len(weights):
        return found
    # Many times faster than NumPy's indexing.
    translated = found.tobytes().translate(used.astype(np.uint8).tobytes().ljust(256))
    return np.frombuffer(bytearray(translated), np.uint8)


def shares(table: np.ndarray) -> np.ndarray:
    """Each symbol's share of 2**24 by a table of weights: int64, at least 1 where the weight is not zero."""
    wide = table.astype(np.int64)
    weights = np.where(wide > 0, (8 + (wide & 7)) << (wide >> 3), 0)
    used = weights > 0
    free = (1 << _PRECISION) - int(used.sum())
    share = weights * free // int(weights.sum()) + used
    share[weights.argmax()] += (1 << _PRECISION) - int(share.sum())
    return share


def _table(counts: np.ndarray) -> np.ndarray:
    """Counts as weights of a byte, (8 + its low 3 bits) << its high 5: within a sixteenth. Zero is for no count."""
    scaled = np.maximum(counts * (float(8 << _TOP) / float(counts.max())), 9.0)
    exponent = np.floor(np.log2(scaled)).astype(np.int64) - 3
    byte = (exponent << 3) + np.rint(scaled / 2.0**exponent).astype(np.int64) - 8  # a 16 carries over
    return np.where(counts > 0, byte, 0).astype(np.uint8)


def _model(share: np.ndarray) -> Any:
    """The library gives each symbol 1 and divides the rest: with numbers that add up to the rest, it rounds nothing."""
    from constriction import stream

    return stream.model.Categorical((share - 1).astype(np.float64), perfect=False)
