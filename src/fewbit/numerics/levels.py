"""Number formats that are a table of levels: every format of at most 8 bits that is no plain integer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.numerics.format import Format


class Levels(Format):
    """A fixed table of values; a code is a bit pattern of at most 8 bits, in uint8.

    A number halfway between two levels gets the one whose code is even, so the codes of neighbours should differ
    in their last bit: as bit patterns of floats do, and as numbering the levels in ascending order does.
    """

    integer = False
    code_dtype = torch.uint8

    def __init__(self, name: str, bits: int, values: Mapping[int, float]) -> None:
        """A format of these values by code, each representable in float32; codes not in the table have no value."""
        self.name, self.bits = name, bits
        codes = sorted(values, key=values.__getitem__)
        levels = torch.tensor([values[code] for code in codes], dtype=torch.float32)
        self.qmin, self.qmax = float(levels[0]), float(levels[-1])
        self.zero = 0.0 in values.values()
        self._levels = levels
        self._codes = torch.tensor(codes, dtype=torch.uint8)
        self._last_below = _last_below(levels, self._codes)
        self._table = torch.full((256,), torch.nan).index_put((self._codes.long(),), levels)

    def encode(self, v: Tensor) -> Tensor:
        return self._codes.to(v.device)[self._place(v)]

    def decode(self, codes: Tensor) -> Tensor:
        return self._table.to(codes.device)[codes.to(torch.int32)]

    def codes(self) -> Tensor:
        return self._codes.clone()

    def nearest(self, v: Tensor) -> Tensor:
        return self._levels.to(v.device)[self._place(v)]

    def _place(self, v: Tensor) -> Tensor:
        return torch.bucketize(v.contiguous(), self._last_below.to(v.device), out_int32=True)


def sign_magnitude(magnitudes: list[float], bits: int) -> dict[int, float]:
    """Values by code where the first bit is the sign and the others number the magnitudes, which begin with zero.

    Minus zero has no code of its own.
    """
    sign = 2 ** (bits - 1)
    positive = dict(enumerate(magnitudes))
    return positive | {sign + code: -value for code, value in positive.items() if code}


def _last_below(levels: Tensor, codes: Tensor) -> Tensor:
    """For each pair of neighbouring levels, the largest float32 that goes to the lower one."""
    middle = (levels[1:].to(torch.float64) + levels[:-1].to(torch.float64)) / 2
    last = middle.to(torch.float32)
    tie_goes_down = codes[:-1] % 2 == 0
    beyond = (last > middle) | ((last == middle) & ~tie_goes_down)
    return torch.where(beyond, torch.nextafter(last, torch.full_like(last, -torch.inf)), last)
