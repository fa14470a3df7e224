"""Dense storage of codes of 1 to 16 bits: no padding between codes, the least significant bit first."""

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import FormatError

_CHUNK = (
    2**20
)  # codes unpacked into single bits at a time; a multiple of 8, so that chunks begin on whole bytes


def packed_size(n: int, bits: int) -> int:
    """Bytes that n codes of that many bits take."""
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as a dense stream of bits: bit k of code i is bit i * bits + k, and bit b is bit b % 8 of byte b
    // 8.

    Args:
        codes: an integer tensor of any shape, taken in row-major order; negative codes become two's
            complement.
        bits: 1 to 16.

    Returns:
        uint8 [ceil(numel * bits / 8)], on the CPU; unused bits of the last byte are zero.

    Raises:
        FormatError: bits out of range, codes that are not integers or do not fit.
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise FormatError(f"codes of dtype {codes.dtype} cannot be packed: expected integers")
    flat = codes.detach().cpu().reshape(-1)
    if flat.numel() and (int(flat.min()) < -(2 ** (bits - 1)) or int(flat.max()) >= 2**bits):
        raise FormatError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit {bits} bits")
    parts = [_pack(part.to(torch.int64).numpy(), bits) for part in flat.split(_CHUNK) if part.numel()]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.uint8)


def unpack(data: Tensor, bits: int, signed: bool, n: int) -> Tensor:
    """The first n codes of a dense stream, inverse of `pack`.

    Args:
        data: uint8, 1-d.
        bits: 1 to 16.
        signed: whether codes are two's complement.
        n: how many.

    Returns:
        int32 [n].

    Raises:
        FormatError: bits out of range, or data too short.
    """
    _check_bits(bits)
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise FormatError(f"packed codes are {data.dtype} of {data.dim()} dimensions: expected uint8 of 1")
    if n < 0 or data.numel() < packed_size(n, bits):
        raise FormatError(
            f"{data.numel()} bytes are too short for {n} codes of {bits} bits: the file is damaged"
        )
    raw = data.detach().cpu().numpy()
    parts = []
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        part = raw[start * bits // 8 : packed_size(stop, bits)]
        digits = np.unpackbits(part, bitorder="little", count=(stop - start) * bits).reshape(-1, bits)
        parts.append(digits.astype(np.int32) @ _place_values(bits, signed))
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int32)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    digits = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(digits.astype(np.uint8).reshape(-1), bitorder="little")


def _place_values(bits: int, signed: bool) -> np.ndarray:
    """What each bit is worth: in two's complement, the last one counts negative."""
    values = np.int32(1) << np.arange(bits, dtype=np.int32)
    if signed:
        values[-1] = -values[-1]
    return values


def _check_bits(bits: int) -> None:
    if type(bits) is not int or not 1 <= bits <= 16:
        raise FormatError(f"codes of {bits!r} bits cannot be packed: expected 1 to 16")
