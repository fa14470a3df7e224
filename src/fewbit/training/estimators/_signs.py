"""Signs and their gradients, which estimators of one bit share."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fewbit.numerics.scheme import Scheme
from fewbit.training.estimators import LearnedRange


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


class OneBit(LearnedRange):
    """Activations of one bit, nothing or the scale, with a slope of its own around half the scale."""

    @classmethod
    def accepts(cls, scheme: Scheme) -> bool:
        return scheme.spec.name == "uint1"

    @abstractmethod
    def slope(self, v: Tensor) -> Tensor:
        """The slope of the sign at v, which is -1 at the lower code and 1 at the upper one; in v's shape."""

    def forward(self, x: Tensor) -> Tensor:
        scale, lo = self._scale().to(x.dtype), self.lo.to(x.dtype)
        v = 2 * x / scale - 1 - 2 * lo
        return ((sign(v, self.slope(v.detach())) + 1) / 2 + lo) * scale
