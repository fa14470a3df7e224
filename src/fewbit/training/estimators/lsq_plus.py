"""Learned scale and offset of activations: Bhalgat et al., "LSQ+" (arXiv 2004.09576).

The offset is the zero point, a whole number, so that zero stays exact; for weights, which have none, LSQ+ is LSQ.
"""

from fewbit.numerics.scheme import Scheme
from fewbit.training.estimators import LearnedRange


class Activations(LearnedRange):
    """Affine integers: for functions such as swish, whose smallest value is a little below zero."""

    OFFSET = True

    @classmethod
    def accepts(cls, scheme: Scheme) -> bool:
        return scheme.spec.integer and not scheme.symmetric
