"""Blocks of small numbers with a small scale: `mxfp8_e4m3` and its like, `mxfp4`, `mxint8`, `nvfp4`.

OCP Microscaling Formats (MX) Specification 1.0 (2023), where 32 numbers share a power of two (Rouhani et al., arXiv
2310.10537). NVFP4: 16 numbers share a float8_e4m3, relative to one float32 of the whole tensor ("Pretraining Large
Language Models with NVFP4", arXiv 2509.25149).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.numerics.format import SMALLEST_SCALE, Format, stored_scales
from fewbit.numerics.levels import Levels, sign_magnitude
from fewbit.numerics.minifloats import (
    FLOAT4_E2M1,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    Minifloat,
)

PATTERN = r"mxfp8_e4m3|mxfp8_e5m2|mxfp6_e2m3|mxfp6_e3m2|mxfp4|mxint8|nvfp4"
EXAMPLES = tuple(PATTERN.split("|"))

_ELEMENTS = {
    "mxfp8_e4m3": FLOAT8_E4M3,
    "mxfp8_e5m2": FLOAT8_E5M2,
    "mxfp6_e2m3": FLOAT6_E2M3,
    "mxfp6_e3m2": FLOAT6_E3M2,
    "mxfp4": FLOAT4_E2M1,
}


class Microscaling(Levels):
    """Elements with a power of two for every 32: that of the largest one, over that of the largest element.

    What then lies beyond the largest element saturates, as the specification has it. The scale's exponent is
    stored in 8 bits (E8M0), from -126 here, so that it is a normal float32.
    """

    block = 32
    scale_bits = 8

    def __init__(self, name: str, bits: int, values: Mapping[int, float], largest_exponent: int) -> None:
        super().__init__(name, bits, values)
        self._largest_exponent = largest_exponent

    def scales(self, span: Tensor, top: Tensor | float) -> Tensor:
        exponent = torch.frexp(span).exponent - 1 - self._largest_exponent
        scale = torch.ldexp(torch.ones_like(span), exponent)
        return torch.where(span == 0, 1.0, scale).clamp(min=SMALLEST_SCALE).to(torch.float32)


class NVFP4(Levels):
    """float4_e2m1 with a float8_e4m3 for every 16, times a float32 for all that makes the largest of them 448.

    The product of the two is the scale of a `QTensor`. A block too small for any float8 gets the smallest one.
    """

    block = 16
    scale_bits = 8
    tensor_bits = 32

    def __init__(self) -> None:
        super().__init__("nvfp4", FLOAT4_E2M1.bits, _signed(FLOAT4_E2M1))
        self._scale_format = Levels("float8_e4m3", FLOAT8_E4M3.bits, _signed(FLOAT8_E4M3))

    def scales(self, span: Tensor, top: Tensor | float) -> Tensor:
        shared = self.tensor_scale(span, top).to(torch.float64)
        relative = (span / top / shared).to(torch.float32)
        least = FLOAT8_E4M3.magnitudes()[1]
        eighth = self._scale_format.nearest(relative).clamp(min=least).to(torch.float64)
        return torch.where(span == 0, 1.0, stored_scales(eighth * shared))

    def tensor_scale(self, span: Tensor, top: Tensor | float) -> Tensor:
        """The float32 that all blocks' float8 scales are relative to, from the largest number of each block."""
        largest = span.max() if span.numel() else span.new_zeros(())
        return stored_scales(largest / top / self._scale_format.qmax)


def _signed(kind: Minifloat) -> dict[int, float]:
    return sign_magnitude(kind.magnitudes(), kind.bits)


def make(match: re.Match[str]) -> Format:
    """The microscaling format of a name."""
    name = match[0]
    if name == "nvfp4":
        return NVFP4()
    if name == "mxint8":  # two's complement in steps of 1/64
        return Microscaling(name, 8, {code % 256: code / 64 for code in range(-128, 128)}, 0)
    kind = _ELEMENTS[name]
    return Microscaling(name, kind.bits, _signed(kind), kind.largest_exponent)
