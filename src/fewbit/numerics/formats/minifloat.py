"""Floats of 8, 6 and 4 bits with a scale: `float8_e4m3`, `float8_e5m2`, `float6_e2m3`, `float6_e3m2`, `float4_e2m1`.

Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433), whose E4M3 has no infinities; the smaller
ones as in the OCP Microscaling Formats specification 1.0. A code is the bit pattern; infinities and NaN have none.
"""

import re

from fewbit.numerics import minifloats
from fewbit.numerics.format import Format
from fewbit.numerics.levels import Levels, sign_magnitude

PATTERN = r"float8_e4m3|float8_e5m2|float6_e2m3|float6_e3m2|float4_e2m1"
EXAMPLES = tuple(PATTERN.split("|"))


def make(match: re.Match[str]) -> Format:
    """The minifloat of a name."""
    kind: minifloats.Minifloat = getattr(minifloats, match[0].upper())
    return Levels(match[0], kind.bits, sign_magnitude(kind.magnitudes(), kind.bits))
