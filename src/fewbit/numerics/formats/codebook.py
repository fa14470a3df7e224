"""Codebooks, `codebook<N>` (a table for each block) and `codebook<N>_shared` (one table, a scale for each block).

Han et al., "Deep Compression" (arXiv 1510.00149): weights share a few values, which are fitted to the tensor.
"""

import re

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.numerics.format import SMALLEST_SCALE, Format

PATTERN = r"codebook([1-8])(_shared)?"
EXAMPLES = tuple(f"codebook{bits}{shared}" for shared in ("", "_shared") for bits in (4, 3, 2, 1, 5, 6, 7, 8))


class Codebook(Format):
    """2**bits values fitted to the tensor, ascending, one of them zero; a code is the index of a value.

    A table's values are float16 numbers within -1 .. 1. Where each block has a table, scales are powers of two,
    which only bring the table into the range where float16 is exact enough: their exponent is stored in 8 bits.
    """

    integer = False
    learned = True
    rounding = "kmeans"
    code_dtype = torch.uint8
    qmin, qmax = -1.0, 1.0

    def __init__(self, bits: int, shared: bool) -> None:
        self.name = f"codebook{bits}{'_shared' if shared else ''}"
        self.bits = bits
        self.shared = shared
        self.scale_bits = 32 if shared else 8

    def encode(self, v: Tensor) -> Tensor:
        raise self._no_values()

    def decode(self, codes: Tensor) -> Tensor:
        raise self._no_values()

    def scales(self, span: Tensor, top: Tensor | float) -> Tensor:
        if self.shared:
            return super().scales(span, top)
        mantissa, exponent = torch.frexp(span / top)
        exact = torch.ldexp(torch.ones_like(span), exponent - (mantissa == 0.5).to(exponent.dtype))
        return torch.where(span == 0, 1.0, exact).clamp(min=SMALLEST_SCALE).to(torch.float32)

    def _no_values(self) -> FormatError:
        return FormatError(
            f"format {self.name!r} has no values before they are fitted to a tensor: "
            "use a rounding that fits them, such as 'kmeans'; activations need another format"
        )


def make(match: re.Match[str]) -> Format:
    """The codebook format of a name."""
    return Codebook(int(match[1]), shared=bool(match[2]))
