"""`nf4`, 4-bit NormalFloat: levels that normally distributed weights use equally often, zero among them.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314), whose blocks hold 64 weights: here
the scheme says how many.
"""

import re
from statistics import NormalDist

from fewbit.numerics.format import Format
from fewbit.numerics.levels import Levels

PATTERN = r"nf4"
EXAMPLES = ("nf4",)

# The outermost quantile: the mean of half a step from the end for 15 and for 16 equal shares.
_OUTERMOST = 1 - (1 / 30 + 1 / 32) / 2


def make(match: re.Match[str]) -> Format:
    """The NormalFloat format: eight quantiles above zero, seven below, zero, all divided by the largest."""
    above, below = _quantiles(8), _quantiles(7)
    values = [-q / above[0] for q in below] + [0.0] + [q / above[0] for q in reversed(above)]
    return Levels(match[0], 4, dict(enumerate(values)))


def _quantiles(count: int) -> list[float]:
    """Standard normal quantiles of equal steps from the outermost share down to, and without, a half."""
    step = (_OUTERMOST - 0.5) / count
    return [NormalDist().inv_cdf(_OUTERMOST - i * step) for i in range(count)]
