"""Learned step sizes: Esser et al., "Learned Step Size Quantization" (LSQ, arXiv 1902.08153).

A scale's gradient is divided by the root of the numbers that share it times the largest code; training begins with
the scales that calibration found, instead of the paper's 2 mean|w| / sqrt(qmax).
"""

from torch import Tensor, nn

from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.training.estimators import LearnedRange, WeightEstimator


class Weights(WeightEstimator):
    """Every format of fixed values with free scales: integers, ternary, binary, powers of two, small floats."""

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        super().__init__(weight, q)
        self.scale = nn.Parameter(q.scale.detach().clone().reshape(-1, 1))
        numbers = weight.numel() // max(q.scale.numel(), 1)
        self._grad_scale = float((max(numbers, 1) * max(self.scheme.qmax, 1.0)) ** -0.5)

    @classmethod
    def accepts(cls, spec: Format) -> bool:
        return super().accepts(spec) and spec.block is None

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.limited(self.scale, rows)
        scale = scale * self._grad_scale + (scale * (1 - self._grad_scale)).detach()
        return self.rounded(rows / scale), scale


class Activations(LearnedRange):
    """Per tensor; the zero point stays."""
