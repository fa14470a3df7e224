"""Straight through, with the ranges that calibration found: Bengio et al. (arXiv 1308.3432); arXiv 1712.05877.

Nothing learns but the weights: gradients pass where a value is not clipped.
"""

import torch
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.training.estimators import ActivationEstimator, WeightEstimator


class Weights(WeightEstimator):
    """Every format of fixed values."""

    scale: Tensor

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        super().__init__(weight, q)
        self.register_buffer("scale", q.scale.detach().clone().reshape(-1, 1))

    @classmethod
    def accepts(cls, spec: object) -> bool:
        return not getattr(spec, "learned", False)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.limited(self.scale, rows) if self.scheme.spec.scaled else self.scale
        return self.rounded(rows / scale), scale


class Activations(ActivationEstimator):
    """Every format, of integers and others."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(scheme, scale, zero_point)
        self.register_buffer("scale", scale.detach().clone().reshape(1))
        self.register_buffer("zero_point", zero_point.detach().clone().reshape(1))

    @classmethod
    def accepts(cls, scheme: Scheme) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(x)

    def exact(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point.to(torch.int32)
