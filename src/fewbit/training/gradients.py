"""Gradients in few bits: what flows back through a layer is quantized, at random to one of its neighbours.

Zhou et al., "DoReFa-Net" (arXiv 1606.06160), section 2.5: the range is that of each sample's gradient. Rounding at
random keeps the mean right: Gupta et al., "Deep Learning with Limited Numerical Precision" (arXiv 1502.02551).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import RecipeError
from fewbit.numerics.format import Format, get_format


@dataclass(frozen=True)
class GradientFormat:
    """How gradients are coded: integers of 2 to 8 bits or small floats with a scale.

    ``stochastic``: round to one of the two neighbours, the nearer the more likely; else to the nearest.
    """

    format: str
    stochastic: bool = True

    def __post_init__(self) -> None:
        spec = get_format(self.format)
        if spec.learned or spec.block is not None or spec.bits > 8 or spec.qmin >= 0:
            raise RecipeError(
                f"gradients={self.format!r}: gradients have signs and a scale of their own each time: "
                "use int2 to int8, float8_e5m2 or float8_e4m3"
            )

    @property
    def spec(self) -> Format:
        return get_format(self.format)


def quantize_gradient(x: Tensor, form: GradientFormat) -> Tensor:
    """x itself; its gradient is quantized on the way back, with the range of each sample (dimension 0)."""
    result: Tensor = _Gradient.apply(x, form)
    return result


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: GradientFormat) -> Tensor:
        ctx.form = form
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return rounded_gradient(gradient, ctx.form), None


def rounded_gradient(gradient: Tensor, form: GradientFormat) -> Tensor:
    """The gradient in its format: same shape and dtype.

    Integers are symmetric, -qmax .. qmax, so that a gradient of zero stays zero.
    """
    spec = form.spec
    rows = gradient.float().reshape(len(gradient), -1) if gradient.dim() else gradient.float().reshape(1, 1)
    scale = rows.abs().amax(dim=1, keepdim=True) / spec.qmax
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    v = rows / scale
    if form.stochastic:
        v = _at_random(v, spec)
    else:
        v = torch.round(v) if spec.integer else spec.nearest(v)
    return (v.clamp(-spec.qmax, spec.qmax) * scale).reshape(gradient.shape).to(gradient.dtype)


def _at_random(v: Tensor, spec: Format) -> Tensor:
    """One of the two neighbouring values, such that the mean is v."""
    if spec.integer:
        return torch.floor(v + torch.rand_like(v))
    levels = spec.decode(spec.codes()).to(v.device)
    above = torch.searchsorted(levels, v.contiguous(), right=True).clamp(1, len(levels) - 1)
    lower, upper = levels[above - 1], levels[above]
    return torch.where(torch.rand_like(v) < (v - lower) / (upper - lower), upper, lower)
