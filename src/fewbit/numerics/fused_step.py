"""Quantize-dequantize of large tensors with gradients for the tensor and its scales, in one pass each way.

Separate operations read and write memory ten times over, which costs more than the layers around them; where there is
a compiler, ``torch.compile`` makes one loop of each direction. Without one they run one by one.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LARGE = 2**15  # numbers: smaller tensors are faster as they are
_logger = logging.getLogger(__name__)
_Kernel = Callable[..., Any]


def fused_step(
    x: Tensor,
    scale: Tensor,
    lo: Tensor,
    hi: Tensor,
    grad_scale: float = 1.0,
    clipped_only: bool = False,
    sign: bool = False,
) -> Tensor:
    """round(clamp(x / scale, lo, hi)) * scale; rounding passes gradients straight through.

    Gradients: for ``x`` where it is not clipped; for ``scale`` as in LSQ (arXiv 1902.08153, equation 3), times
    ``grad_scale``, or of clipped values alone (PACT, arXiv 1805.06085); for ``lo`` and ``hi``, if they need one, as
    clipped values say (with one scale only).

    Args:
        x: float of any shape and floating dtype; with several scales, rows [C, n].
        scale: float32, positive: [1], or [C, 1] for rows.
        lo, hi: float32 in scale's shape, whole numbers: smallest and largest code, less the zero point.
        sign: 1 or -1 in the place of rounding; zero is positive.

    Returns:
        x's shape and dtype.
    """
    result: Tensor = _FusedStep.apply(x, scale, lo, hi, grad_scale, clipped_only, sign)
    return result


class _FusedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        lo: Tensor,
        hi: Tensor,
        grad_scale: float,
        clipped_only: bool,
        sign: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, lo, hi)
        ctx.grad_scale, ctx.clipped_only, ctx.sign = grad_scale, clipped_only, sign
        rows, shape = _rows(x, scale)
        y: Tensor = _kernel(x, _forward_sign if sign else _forward)(rows, *_beside(scale, lo, hi))
        return _shaped(y, x, shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, lo, hi = ctx.saved_tensors
        kernel = _backward_clipped if ctx.clipped_only else _backward_sign if ctx.sign else _backward
        rows, shape = _rows(x, scale)
        if gradient.stride() != x.stride():  # the gradient came in another order of memory
            gradient = torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)
        around, _ = _rows(gradient, scale)
        beside = _beside(scale, lo, hi)
        of_x, of_scale = _kernel(x, kernel)(around, rows, *beside)
        of_lo = of_hi = None
        if ctx.needs_input_grad[2]:
            of_lo, of_hi = _backward_bounds(around, rows, *beside)
        of_scale = (of_scale * ctx.grad_scale).reshape(scale.shape)
        return _shaped(of_x, x, shape), of_scale, of_lo, of_hi, None, None, None


def _forward(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    codes = torch.round(torch.clamp(x.float() / scale, lo, hi))
    return (codes * scale).to(x.dtype)


def _forward_sign(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    return torch.where(x < 0, -scale, scale).to(x.dtype)


def _backward(gradient: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    v, g = x.float() / scale, gradient.float()
    clipped = torch.clamp(v, lo, hi)
    inside = v == clipped
    slope = torch.round(clipped) - torch.where(inside, v, 0.0)
    return torch.where(inside, g, 0.0).to(gradient.dtype), (g * slope).sum(1, keepdim=True)


def _backward_sign(
    gradient: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor]:
    v, g = x.float() / scale, gradient.float()
    inside = v == torch.clamp(v, lo, hi)
    slope = torch.where(v < 0, -1.0, 1.0) - torch.where(inside, v, 0.0)
    return torch.where(inside, g, 0.0).to(gradient.dtype), (g * slope).sum(1, keepdim=True)


def _backward_clipped(
    gradient: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor]:
    v, g = x.float() / scale, gradient.float()
    clipped = torch.clamp(v, lo, hi)
    inside = v == clipped
    of_scale = (g * torch.where(inside, 0.0, clipped)).sum(1, keepdim=True)
    return torch.where(inside, g, 0.0).to(gradient.dtype), of_scale


def _backward_bounds(
    gradient: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor]:
    v, g = x.float() / scale, gradient.float() * scale
    return torch.where(v < lo, g, 0.0).sum().reshape(1), torch.where(v > hi, g, 0.0).sum().reshape(1)


def _kernel(x: Tensor, function: _Kernel) -> _Kernel:
    if x.numel() < _LARGE or torch.compiler.is_compiling() or not _compiles(x.device.type):
        return function
    return _compiled(function)


@cache
def _compiled(function: _Kernel) -> _Kernel:
    return torch.compile(function, dynamic=True)


@cache
def _compiles(device: str) -> bool:
    """Whether there is a compiler that works."""
    x, one = torch.ones(1, _LARGE, device=device), torch.ones(1, 1, device=device)
    try:
        _compiled(_forward)(x, one, -one, one)
        _compiled(_backward)(x, x, one, -one, one)
    except Exception as error:  # no compiler, or one that fails: torch raises many types
        reason = (str(error).splitlines() or [""])[0][:200]
        _logger.warning("quantize steps are not compiled (%s); training takes longer", reason)
        return False
    return True


def _rows(x: Tensor, scale: Tensor) -> tuple[Tensor, bool]:
    """The tensor as rows, one for each scale, without a copy if memory is dense; and whether it was.

    With one scale the row is in the order of memory: compiled loops then see one shape for all tensors, and
    channels-last ones keep their order.
    """
    if scale.dim() > 1:
        return x, True
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    dense = dense or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    if dense:
        return x.as_strided((1, x.numel()), (x.numel(), 1)), True
    return x.reshape(1, -1), False


def _beside(*parameters: Tensor) -> list[Tensor]:
    """Parameters of rows: [C, 1]."""
    return [p.reshape(-1, 1) for p in parameters]


def _shaped(rows: Tensor, like: Tensor, in_memory_order: bool) -> Tensor:
    if rows.shape == like.shape:
        return rows
    return rows.as_strided(like.shape, like.stride()) if in_memory_order else rows.reshape(like.shape)
