"""Weights through tanh, activations in [0, 1]: Zhou et al., "DoReFa-Net" (arXiv 1606.06160), equations 9 and 11.

The levels are the plan's format's, which holds zero (the paper's 2 k / (2**bits - 1) - 1 do not), and weights keep the
range that they begin with, where the paper leaves scales to batch norms. One bit is the sign times the mean of |w|.
"""

import torch
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.training.estimators import LearnedRange, WeightEstimator


class Weights(WeightEstimator):
    """Formats of fixed values; binary is recomputed, others squashed by tanh into a fixed range."""

    reach: Tensor

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        super().__init__(weight, q)
        self.register_buffer("reach", weight.detach().abs().amax().clamp(min=1e-12))

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.scheme.spec.bits == 1:
            return self.rounded(rows / self.reach), rows.abs().mean().expand(len(rows), 1)
        squashed = torch.tanh(rows)
        largest = squashed.abs().amax().detach().clamp(min=1e-12)
        top = torch.maximum(self.hi.abs().amax(), self.lo.abs().amax())
        scale = self.limited((self.reach / top).expand(len(rows), 1), squashed / largest * self.reach)
        return self.rounded(squashed / largest * self.reach / scale), scale


class Activations(LearnedRange):
    """Codes of [0, 1], which does not learn: networks are trained with it from the start."""

    def __init__(self, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> None:
        top = scheme.qmax - scheme.qmin
        super().__init__(
            scheme, torch.full_like(scale, 1.0 / top), torch.full_like(zero_point, int(scheme.qmin))
        )
        self.scale.requires_grad_(False)

    @classmethod
    def accepts(cls, scheme: Scheme) -> bool:
        return scheme.spec.integer and not (scheme.symmetric and scheme.qmin < 0)
