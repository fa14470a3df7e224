"""Integers of 1 to 16 bits, `int<N>` (two's complement) and `uint<N>`: a code is the number itself."""

import re

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.numerics.format import Format

PATTERN = r"(u?)int([1-9][0-9]{0,2})"
EXAMPLES = tuple(
    f"{sign}int{bits}"
    for bits in (8, 4, 2, 1, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16)
    for sign in ("", "u")
)


class Integer(Format):
    """Integers qmin .. qmax: -2**(bits-1) .. 2**(bits-1) - 1 if signed, 0 .. 2**bits - 1 if not."""

    integer = True

    def __init__(self, bits: int, signed: bool) -> None:
        self.name = f"{'' if signed else 'u'}int{bits}"
        self.bits = bits
        self.signed = signed
        self.qmin = float(-(2 ** (bits - 1)) if signed else 0)
        self.qmax = float(2 ** (bits - 1) - 1 if signed else 2**bits - 1)
        small = torch.int8 if signed else torch.uint8
        # torch's uint16 lacks most operators, so unsigned codes of 9 to 16 bits live in int32.
        wide = torch.int16 if signed else torch.int32
        self.code_dtype = small if bits <= 8 else wide

    def nearest(self, v: Tensor) -> Tensor:
        return torch.round(v).clamp_(self.qmin, self.qmax)

    def encode(self, v: Tensor) -> Tensor:
        return self.nearest(v).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def codes(self) -> Tensor:
        return torch.arange(int(self.qmin), int(self.qmax) + 1).to(self.code_dtype)


def make(match: re.Match[str]) -> Format:
    """The integer format of a name. Raises FormatError if its number of bits is not 1 to 16."""
    bits = int(match[2])
    if not 1 <= bits <= 16:
        raise FormatError(
            f"format {match[0]!r} has {bits} bits: integer formats have 1 to 16 bits, e.g. 'int8'"
        )
    return Integer(bits, signed=not match[1])
