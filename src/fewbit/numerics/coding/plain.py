"""Symbols as they are: for what has no pattern."""

import numpy as np

from fewbit.errors import FormatError

MARK = 0


def cost(counts: np.ndarray) -> float:
    """A byte a symbol."""
    return float(counts.sum())


def table_size(count: int) -> int:
    """There is no table."""
    return 0


def encode(symbols: np.ndarray, counts: np.ndarray) -> tuple[bytes, bytes]:
    """The symbols themselves."""
    return b"", symbols.tobytes()


def decode(table: bytes, payload: bytes, n: int) -> np.ndarray:
    """The symbols. Raises FormatError where there are not n."""
    if len(payload) != n:
        raise FormatError(f"{len(payload)} bytes found for {n} symbols: the data are damaged")
    return np.frombuffer(payload, np.uint8).copy()
