"""Learned clipping: Choi et al., "PACT: Parameterized Clipping Activation" (arXiv 1805.06085).

The clip's gradient is that of the clipped values alone. What learns here is the scale, the clip over the largest code.
"""

import torch
from torch import Tensor

from fewbit.numerics.scheme import Scheme
from fewbit.training.estimators import LearnedRange


class Activations(LearnedRange):
    """Integers of which none is below zero, as after a ReLU."""

    CLIPPED_ONLY = True

    def __init__(self, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(scheme, scale, torch.full_like(zero_point, int(scheme.qmin)))

    @classmethod
    def accepts(cls, scheme: Scheme) -> bool:
        return scheme.spec.integer and not (scheme.symmetric and scheme.qmin < 0)

    def grad_scale(self, x: Tensor) -> float:
        return 1.0 / (self.scheme.qmax - self.scheme.qmin)
