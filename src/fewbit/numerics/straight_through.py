"""Quantize steps with gradients: rounding passes them straight through, and the scale has its own.

Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432); Esser et al.,
"Learned Step Size Quantization" (LSQ, arXiv 1902.08153), equation 3.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def learned_step(x: Tensor, scale: Tensor, lo: float, hi: float, dropped: Tensor | None = None) -> Tensor:
    """clamp(round(x / scale), lo, hi) * scale, or x itself where ``dropped``; differentiable in x and scale.

    Args:
        x: float32, any shape.
        scale: float32 scalar, positive.
        lo, hi: the smallest and largest code, less the zero point.
        dropped: bool in x's shape; None for nowhere.

    Returns:
        float32 in x's shape.
    """
    result: Tensor = _LearnedStep.apply(x, scale, lo, hi, dropped)
    return result


class _LearnedStep(torch.autograd.Function):
    """As one operation, because the same in separate ones takes three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: float, hi: float, dropped: Tensor | None) -> Tensor:
        v = x / scale
        codes = torch.round(v)
        inside = (codes >= lo) & (codes <= hi)
        codes.clamp_(lo, hi)
        slope = codes - v.mul_(inside)  # of y by scale: the rounding error inside, the bound outside
        y = codes.mul_(scale)
        if dropped is not None:
            y = torch.where(dropped, x, y)
            slope.masked_fill_(dropped, 0.0)
            inside |= dropped
        ctx.save_for_backward(inside, slope)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inside, slope = ctx.saved_tensors
        return gradient * inside, torch.dot(gradient.reshape(-1), slope.reshape(-1)), None, None, None


def coin_flips(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random booleans on the CPU, each true with probability one half."""
    count = math.prod(shape)
    words = torch.randint(2**63 - 1, (-(-count // 56),), generator=generator)
    fair = words.view(torch.uint8).reshape(-1, 8)[:, :7]  # the top bit is always zero
    bits = np.unpackbits(fair.numpy())
    return torch.from_numpy(bits[:count]).view(torch.bool).reshape(tuple(shape))
