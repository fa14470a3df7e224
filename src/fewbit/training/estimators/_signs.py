"""Signs and their gradients, which estimators of one bit share."""

from typing import Any

import torch
from torch import Tensor


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def sign(x: Tensor, slope: Tensor) -> Tensor:
    """1, or -1 for negative numbers; gradients are multiplied by ``slope``, in x's shape."""
    result: Tensor = _Sign.apply(x, slope.detach())
    return result


def polynomial(x: Tensor) -> Tensor:
    """The slope of Bi-Real Net's approximation of the sign: 2 - 2|x| within -1 .. 1 (arXiv 1808.00278)."""
    return (2 - 2 * x.abs()).clamp(min=0)


def decaying(x: Tensor, progress: float) -> Tensor:
    """The slope of IR-Net's estimator k tanh(t x): wide at first, near the sign at last (arXiv 1909.10788)."""
    t = 0.1 * 100.0**progress
    return max(1 / t, 1.0) * t * (1 - torch.tanh(t * x).square())
