"""Codes and scales of a weight as numbers that gradients move, past the neighbouring codes if need be.

Esser et al., "Learned Step Size Quantization" (LSQ, arXiv 1902.08153).
"""

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import blocks, unblocks

_WITHIN = 0.45  # of a step around its code, where a latent weight begins


class TunedWeight:
    """A weight of an integer format that is rounded in every forward pass; latent values and scales learn.

    Weights that are exactly zero stay zero.

    Args:
        weight: float32, the weight before rounding; latent values begin there, as far as the codes allow.
        q: its codes.
    """

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        self.q = q
        codes = blocks(q.codes.to(torch.float32), q.scheme) - q.zero_point.reshape(-1, 1)
        rows = blocks(weight.detach().to(torch.float32), q.scheme) / q.scale.reshape(-1, 1)
        self.zero = rows == 0
        self.v = rows.clamp(codes - _WITHIN, codes + _WITHIN).requires_grad_()
        self.change = torch.zeros_like(q.scale).requires_grad_()

    def weight(self) -> Tensor:
        """The rounded weight: float32, differentiable in ``v`` (straight through) and in ``change``."""
        v = self.v.masked_fill(self.zero, 0.0)
        codes = v + (torch.round(v) - v).detach()
        return unblocks(self._clamped(codes) * self._scale().reshape(-1, 1), self.q.shape, self.q.scheme)

    def hard(self) -> QTensor:
        """The weight as codes."""
        with torch.no_grad():
            codes = self._clamped(
                torch.round(self.v.masked_fill(self.zero, 0.0))
            ) + self.q.zero_point.reshape(-1, 1)
            codes = unblocks(codes, self.q.shape, self.q.scheme).to(self.q.scheme.spec.code_dtype)
            return replace(self.q, codes=codes, scale=self._scale())

    def _scale(self) -> Tensor:
        return self.q.scale * self.change.exp()

    def _clamped(self, codes: Tensor) -> Tensor:
        zero_point = self.q.zero_point.reshape(-1, 1)
        lo, hi = self.q.scheme.qmin - zero_point, self.q.scheme.qmax - zero_point
        return torch.minimum(torch.maximum(codes, lo), hi)
