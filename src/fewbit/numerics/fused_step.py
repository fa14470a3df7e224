"""Quantize-dequantize of large tensors with gradients for the input, the scale and the zero point, in two passes.

Separate operations read and write memory ten times over, which costs more than the convolutions around them; where
there is a compiler, ``torch.compile`` makes one loop of each direction. Without one they run one by one.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LARGE = 2**15  # numbers: smaller tensors are faster as they are
_logger = logging.getLogger(__name__)


def fused_step(
    x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, grad_scale: float = 1.0, clipped_only: bool = False
) -> Tensor:
    """round(clamp(x / scale, lo, hi)) * scale; rounding passes gradients straight through.

    Gradients: for ``x`` where it is not clipped; for ``scale`` as in LSQ (arXiv 1902.08153, equation 3), times
    ``grad_scale``, or of clipped values alone (PACT, arXiv 1805.06085); for ``lo`` and ``hi``, if they need one, as
    clipped values say.

    Args:
        x: float of any shape and floating dtype.
        scale: float32 [1], positive.
        lo, hi: float32 [1] on x's device, whole numbers: smallest and largest code, less the zero point.

    Returns:
        x's shape and dtype.
    """
    result: Tensor = _FusedStep.apply(x, scale, lo, hi, grad_scale, clipped_only)
    return result


class _FusedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, grad_scale: float, clipped_only: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, lo, hi)
        ctx.grad_scale, ctx.clipped_only = grad_scale, clipped_only
        forward = _kernel(x, _forward)
        flat, shape = _flat(x)
        return _shaped(forward(flat, scale, lo, hi), x, shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, lo, hi = ctx.saved_tensors
        backward = _kernel(x, _backward_clipped if ctx.clipped_only else _backward)
        flat, shape = _flat(x)
        if shape and gradient.stride() == x.stride():
            around, _ = _flat(gradient)
        else:  # the gradient came in another order of memory
            flat, shape, around = x.reshape(-1), False, gradient.reshape(-1)
        gx, of_scale = backward(around, flat, scale, lo, hi)
        of_lo = of_hi = None
        if ctx.needs_input_grad[2]:
            of_lo, of_hi = _backward_bounds(around, flat, scale, lo, hi)
        of_scale = (of_scale * ctx.grad_scale).reshape(1)
        return _shaped(gx, x, shape), of_scale, of_lo, of_hi, None, None


def _forward(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    codes = torch.round(torch.clamp(x.float() / scale, lo, hi))
    return (codes * scale).to(x.dtype)


def _backward(gradient: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    v = x.float() / scale
    clipped = torch.clamp(v, lo, hi)
    g = gradient.float()
    inside = v == clipped
    slope = torch.round(clipped) - torch.where(inside, v, 0.0)
    return torch.where(inside, g, 0.0).to(gradient.dtype), (g * slope).sum()


def _backward_clipped(
    gradient: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor]:
    v = x.float() / scale
    clipped = torch.clamp(v, lo, hi)
    g = gradient.float()
    inside = v == clipped
    return torch.where(inside, g, 0.0).to(gradient.dtype), (g * torch.where(inside, 0.0, clipped)).sum()


def _backward_bounds(
    gradient: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor]:
    v, g = x.float() / scale, gradient.float()
    return scale * torch.where(v < lo, g, 0.0).sum(), scale * torch.where(v > hi, g, 0.0).sum()


_Kernel = Callable[..., Any]


def _kernel(x: Tensor, function: _Kernel) -> _Kernel:
    if x.numel() < _LARGE or torch.compiler.is_compiling():
        return function
    return _compiled(x.device.type)[function]


@cache
def _compiled(device: str) -> dict[_Kernel, _Kernel]:
    """Each function as one loop, or as it is where nothing can compile them."""
    x, one = torch.ones(_LARGE, device=device), torch.ones(1, device=device)
    plain: list[_Kernel] = [_forward, _backward, _backward_clipped]
    compiled = [torch.compile(function, dynamic=True) for function in plain]
    try:
        compiled[0](x, one, -one, one)
        compiled[1](x, x, one, -one, one)
    except Exception as error:  # no compiler, or one that fails: torch raises many types
        reason = (str(error).splitlines() or [""])[0][:200]
        _logger.warning("quantize steps are not compiled (%s); training takes longer", reason)
        return dict(zip(plain, plain, strict=True))
    return dict(zip(plain, compiled, strict=True))


def _flat(x: Tensor) -> tuple[Tensor, bool]:
    """The numbers in the order of memory, without a copy if none are left out; and whether that was so.

    Compiled loops then see one shape for all tensors, and channels-last ones keep their order.
    """
    if x.is_contiguous():
        return x.reshape(-1), True
    dense = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    dense = dense or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    if dense:
        return x.as_strided((x.numel(),), (1,)), True
    return x.reshape(-1), False


def _shaped(flat: Tensor, like: Tensor, in_memory_order: bool) -> Tensor:
    return flat.as_strided(like.shape, like.stride()) if in_memory_order else flat.reshape(like.shape)
