"""Half-width floats, `float16` (IEEE 754 binary16) and `bfloat16`: numbers stored as they are, without a scale."""

import re

import torch
from torch import Tensor

from fewbit.numerics.format import Format

PATTERN = r"float16|bfloat16"
EXAMPLES = ("float16", "bfloat16")


class Floating(Format):
    """A floating-point type of torch without its infinities and NaN; a code is the number in that type.

    Minus zero is coded as zero.
    """

    integer = False
    scaled = False
    saturates = False  # a weight beyond float16 is a fault of the model, not something to clip

    def __init__(self, name: str) -> None:
        self.name = name
        self.code_dtype = getattr(torch, name)
        limits = torch.finfo(self.code_dtype)
        self.bits = limits.bits
        self.qmin, self.qmax = limits.min, limits.max

    def encode(self, v: Tensor) -> Tensor:
        return v.clamp(self.qmin, self.qmax).to(self.code_dtype) + 0.0

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def codes(self) -> Tensor:
        patterns = torch.arange(2 ** (self.bits - 1)).to(torch.int16).view(self.code_dtype)
        positive = patterns[torch.isfinite(patterns)]
        return torch.cat((-positive[1:].flip(0), positive))


def make(match: re.Match[str]) -> Format:
    """The format of a name."""
    return Floating(match[0])
