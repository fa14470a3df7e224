"""Bit patterns of small floating-point numbers, and what each of them stands for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Minifloat:
    """A sign bit, exponent bits and mantissa bits, with subnormal numbers.

    Attributes:
        exponent, mantissa: how many bits.
        special: how many of the largest magnitudes' bit patterns are infinities or NaN.
    """

    exponent: int
    mantissa: int
    special: int = 0

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest finite number: 8 for one that is at least 256 and below 512."""
        finite = 2 ** (self.bits - 1) - self.special
        return ((finite - 1) >> self.mantissa) - self._bias

    @property
    def _bias(self) -> int:
        return int(2 ** (self.exponent - 1)) - 1

    def magnitudes(self) -> list[float]:
        """The finite numbers that are not negative, in the order of their bit patterns, which is ascending."""
        numbers = []
        for pattern in range(2 ** (self.bits - 1) - self.special):
            exponent, fraction = pattern >> self.mantissa, (pattern % 2**self.mantissa) / 2**self.mantissa
            whole = 1.0 if exponent else 0.0
            numbers.append((whole + fraction) * 2.0 ** (max(exponent, 1) - self._bias))
        return numbers


FLOAT8_E4M3 = Minifloat(4, 3, special=1)  # "fn": no infinities, one NaN
FLOAT8_E5M2 = Minifloat(5, 2, special=4)
FLOAT6_E2M3 = Minifloat(2, 3)
FLOAT6_E3M2 = Minifloat(3, 2)
FLOAT4_E2M1 = Minifloat(2, 1)
