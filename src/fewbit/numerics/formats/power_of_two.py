"""Levels in equal ratios: `pow2_<N>` (of two), `exp_<N>` (of the square root of two); sums of powers, `apot_<N>`.

Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation" (arXiv 1603.01025); Li et al.,
"Additive Powers-of-Two Quantization" (arXiv 1909.13144). All have a sign bit and zero. Sums are not divided by the
largest, as the paper does, so that they stay whole multiples of a power of two: the largest of apot_4 is 5/8.
"""

import itertools
import re

from fewbit.numerics.format import Format
from fewbit.numerics.levels import Levels, sign_magnitude

PATTERN = r"(pow2|exp|apot)_([2-8])"
EXAMPLES = tuple(f"{kind}_{bits}" for kind in ("pow2", "apot", "exp") for bits in (4, 3, 2, 5, 6, 7, 8))

_RATIO = {"pow2": 2.0, "exp": 2.0**0.5}


def make(match: re.Match[str]) -> Format:
    """The format of a name: a code is a sign bit and the magnitude's rank, zero first."""
    kind, bits = match[1], int(match[2])
    count = 2 ** (bits - 1) - 1  # magnitudes above zero
    if kind == "apot":
        magnitudes = _sums(bits - 1)
    else:
        magnitudes = [0.0] + [_RATIO[kind] ** -power for power in reversed(range(count))]
    return Levels(match[0], bits, sign_magnitude(magnitudes, bits))


def _sums(bits: int) -> list[float]:
    """Sums of one power of two from each of several sets, ascending.

    A set of three powers, or none of them, takes 2 bits; a bit left over takes a set of one. Consecutive powers are
    dealt to the sets in turn, two rounds, then to the set of one, then the third round.
    """
    sets = bits // 2
    powers = (2.0**-power for power in itertools.count(1))
    choices: list[list[float]] = [[0.0] for _ in range(sets)]
    rounds = [choices, choices, [[0.0]] if bits % 2 else [], choices]
    for chosen in rounds:
        for choice in chosen:
            choice.append(next(powers))
    if bits % 2:
        choices = [*choices, *rounds[2]]
    return sorted(sum(terms) for terms in itertools.product(*choices))
