"""One and three levels: `binary` (-1, 1), `ternary` (-1, 0, 1), and without a scale `binary_sign`, `ternary_fixed`.

Rastegari et al., "XNOR-Net" (arXiv 1603.05279); Li et al., "Ternary Weight Networks" (arXiv 1605.04711); with the fixed
values 1 and -1, Courbariaux et al., "BinaryConnect" (arXiv 1511.00363).
"""

import re

import torch
from torch import Tensor

from fewbit.numerics.format import SMALLEST_SCALE, Format
from fewbit.numerics.levels import Levels

PATTERN = r"binary|binary_sign|ternary|ternary_fixed"
EXAMPLES = tuple(PATTERN.split("|"))


class Binary(Levels):
    """The sign alone: code 1 for negative numbers; zero counts as positive. The best scale is the mean of |x|."""

    observer = "xnor"

    def __init__(self, name: str, scaled: bool) -> None:
        super().__init__(name, 1, {0: 1.0, 1: -1.0})
        self.scaled = scaled

    def nearest(self, v: Tensor) -> Tensor:
        return torch.where(v < 0, -1.0, 1.0)

    def scales(self, span: Tensor, top: Tensor | float) -> Tensor:
        """As everywhere, but of a block that is all zeros next to nothing, since zero is not a level."""
        return (span / top).clamp(min=SMALLEST_SCALE).to(torch.float32)


class Ternary(Format):
    """-1, 0 and 1 in two bits, as integers, so that integer kernels serve."""

    bits = 2
    integer = True
    qmin, qmax = -1.0, 1.0
    code_dtype = torch.int8
    observer = "twn"

    def __init__(self, name: str, scaled: bool) -> None:
        self.name = name
        self.scaled = scaled

    def nearest(self, v: Tensor) -> Tensor:
        return torch.round(v).clamp(-1, 1)

    def encode(self, v: Tensor) -> Tensor:
        return self.nearest(v).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def codes(self) -> Tensor:
        return torch.tensor([-1, 0, 1], dtype=self.code_dtype)


def make(match: re.Match[str]) -> Format:
    """The binary or ternary format of a name."""
    scaled = "_" not in match[0]
    return Binary(match[0], scaled) if match[0].startswith("binary") else Ternary(match[0], scaled)
