"""Lossless coding of codes near their entropy: rANS over many interleaved lanes, so that NumPy does each step at once.

Duda, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
arithmetic coding" (arXiv 1311.2540); interleaving: Giesen, "Interleaved entropy coders" (arXiv 1402.3392).

Codes of up to 8 bits are one plane of bytes, wider ones two (low bytes first). A plane is its length in bytes (uint32),
its kind (uint8: 0 as it is, 1 rANS), and its content. Of a rANS plane: the number of lanes (uint16), the number of
symbols (uint16), each symbol's share of 2**14 (uint16), each lane's last state (uint32), then 16-bit words. Symbol i
belongs to lane i % lanes. All numbers are little-endian.
"""

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import FormatError

_PRECISION = 14  # bits of a symbol's share
_LOWEST = 1 << 16  # a state stays in [2**16, 2**32)
_LANES = 4096
_PER_LANE = 512  # symbols at least, which makes a lane's state cheap
# Symbols a byte of file at most, so that a small file cannot ask for much memory; padded with zeros if need be.
_DENSEST = 256
_DAMAGED = "entropy-coded codes are damaged: save the model again"


def entropy_encode(codes: Tensor) -> Tensor:
    """Codes without loss, as bytes: about as many bits as their entropy, whatever their format.

    Args:
        codes: any dtype of one or two bytes; taken in row-major order.

    Returns:
        uint8, 1-d, on the CPU.

    Raises:
        FormatError: a dtype of another size.
    """
    return torch.from_numpy(np.concatenate([_framed(plane) for plane in _planes(codes)]))


def entropy_decode(data: Tensor, dtype: torch.dtype, n: int) -> Tensor:
    """The inverse of `entropy_encode`: n codes of a dtype, 1-d. Raises FormatError for data that cannot be."""
    raw, planes, start = data.numpy(), [], 0
    for _ in range(dtype.itemsize):
        if len(raw) < start + 5:
            raise FormatError(_DAMAGED)
        size, kind = int(raw[start : start + 4].view("<u4")[0]), int(raw[start + 4])
        content = raw[start + 5 : start + 5 + size]
        if len(content) != size or kind > 1 or n > _DENSEST * size:
            raise FormatError(_DAMAGED)
        planes.append(_decode(content, n) if kind else content)
        start += 5 + size
    if start != len(raw) or any(len(plane) != n for plane in planes):
        raise FormatError(_DAMAGED)
    return torch.from_numpy(np.stack(planes, axis=1).reshape(-1)).view(dtype)


def _planes(codes: Tensor) -> list[np.ndarray]:
    size = codes.dtype.itemsize
    if size > 2:
        raise FormatError(f"codes of dtype {codes.dtype} cannot be coded: expected one or two bytes each")
    flat = codes.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return [np.ascontiguousarray(flat[i::size]) for i in range(size)]


def _framed(plane: np.ndarray) -> np.ndarray:
    coded = _encode(plane)
    kind = int(len(coded) < len(plane))
    content = coded if kind else plane
    header = np.array([len(content)], "<u4").view(np.uint8)
    return np.concatenate([header, np.array([kind], np.uint8), content])


def _shares(symbols: np.ndarray) -> np.ndarray:
    """Each symbol's share of 2**14, at least 1 for those that occur: uint32 [largest symbol + 1]."""
    counts = np.bincount(symbols)
    shares = np.maximum(np.rint(counts * ((1 << _PRECISION) / len(symbols))), counts > 0).astype(np.int64)
    while missing := (1 << _PRECISION) - int(shares.sum()):
        shares[shares.argmax()] += 1 if missing > 0 else -1
    return shares.astype(np.uint32)


def _encode(symbols: np.ndarray) -> np.ndarray:
    n = len(symbols)
    if not n:
        return np.empty(0, np.uint8)
    shares = _shares(symbols)
    starts = (np.cumsum(shares) - shares).astype(np.uint32)
    lanes = min(max(n // _PER_LANE, 1), _LANES)
    states = np.full(lanes, _LOWEST, np.uint32)
    words = []
    for first in reversed(range(0, n, lanes)):  # the last symbol first: the decoder undoes it step by step
        part = symbols[first : first + lanes]
        share, x = shares[part], states[: len(part)]
        full = (x >> (32 - _PRECISION)) >= share
        words.append(x[full].astype("<u2"))
        x[full] >>= np.uint32(16)
        quotient = x // share
        states[: len(part)] = (quotient << _PRECISION) + (x - quotient * share) + starts[part]
    head = np.array([lanes, len(shares)], "<u2").view(np.uint8)
    parts = [head, shares.astype("<u2").view(np.uint8), states.astype("<u4").view(np.uint8)]
    coded = np.concatenate([*parts, np.concatenate(words[::-1]).view(np.uint8)])
    padding = -(-n // _DENSEST) - len(coded)
    return np.pad(coded, (0, padding + padding % 2)) if padding > 0 else coded


def _decode(data: np.ndarray, n: int) -> np.ndarray:
    lanes, shares, states, words = _parts(data)
    symbol = np.repeat(np.arange(len(shares), dtype=np.uint8), shares)
    share = shares.astype(np.uint32)[symbol]
    offset = (
        np.arange(1 << _PRECISION, dtype=np.uint32) - (np.cumsum(shares) - shares).astype(np.uint32)[symbol]
    )
    out = np.empty(n, np.uint8)
    used = 0
    for first in range(0, n, lanes):
        x = states[: min(lanes, n - first)]
        slot = x & np.uint32((1 << _PRECISION) - 1)
        out[first : first + lanes] = symbol[slot]
        x = share[slot] * (x >> _PRECISION) + offset[slot]
        empty = np.flatnonzero(x < _LOWEST)
        fresh = words[used : used + len(empty)]
        if len(fresh) != len(empty):
            raise FormatError(_DAMAGED)
        x[empty] = (x[empty] << np.uint32(16)) | fresh
        states[: len(x)] = x
        used += len(empty)
    if (states != _LOWEST).any() or words[used:].any():
        raise FormatError(_DAMAGED)
    return out


def _parts(data: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Number of lanes, shares, states and words, each checked for what it may be."""
    if len(data) < 4 or len(data) % 2:
        raise FormatError(_DAMAGED)
    lanes, count = (int(v) for v in data[:4].view("<u2"))
    states = 4 + 2 * count
    words = states + 4 * lanes
    if not 1 <= lanes <= _LANES or not 1 <= count <= 256 or len(data) < words:
        raise FormatError(_DAMAGED)
    shares = data[4:states].copy().view("<u2").astype(np.int64)
    first = data[states:words].copy().view("<u4").astype(np.uint32)
    if shares.sum() != 1 << _PRECISION or (first < _LOWEST).any():
        raise FormatError(_DAMAGED)
    return lanes, shares, first, data[words:].copy().view("<u2").astype(np.uint32)
