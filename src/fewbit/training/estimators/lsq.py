"""Learned step sizes: Esser et al., "Learned Step Size Quantization" (LSQ, arXiv 1902.08153).

A scale's gradient is divided by the root of the numbers that share it times the largest code; training begins with
the scales that calibration found, instead of the paper's 2 mean|w| / sqrt(qmax).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.numerics.format import Format
from fewbit.numerics.fused_step import fused_step
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import blocks, unblocks
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
        return self.rounded(rows / scale), scale

    def forward(self, weight: Tensor) -> Tensor:
        if self.oscillation is not None:
            return super().forward(weight)
        rows = blocks(weight, self.scheme)
        scale = self.limited(self.scale, rows)
        lo, hi = self.bounds()
        spec = self.scheme.spec
        if spec.integer or spec.bits == 1:
            values = fused_step(rows, scale, lo, hi, self._grad_scale, sign=not spec.integer)
        else:
            values = _Step.apply(rows, scale, lo, hi, spec, self._grad_scale)
        return unblocks(values, weight.shape, self.scheme)


class _Step(torch.autograd.Function):
    """All as one operation: many layers have small weights, and separate operations cost more than their numbers."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, spec: Format, grad_scale: float
    ) -> Tensor:
        v = rows / scale
        clipped = torch.clamp(v, lo, hi)
        values = spec.nearest(clipped)
        ctx.save_for_backward(v, clipped, values)
        ctx.grad_scale = grad_scale
        return values * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        v, clipped, values = ctx.saved_tensors
        inside = v == clipped
        of_rows = gradient * inside
        of_scale = ((gradient * values) - of_rows * v).sum(1, keepdim=True) * ctx.grad_scale
        return of_rows, of_scale, None, None, None, None


class Activations(LearnedRange):
    """Per tensor; the zero point stays."""
