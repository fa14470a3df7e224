"""Rounding up or down as a number that can be learned.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound, arXiv 2004.10568).
"""

import torch
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import blocks, unblocks

_LOW, _HIGH = -0.1, 1.1  # the sigmoid is stretched, so that 0 and 1 are reached


class SoftRounding:
    """A weight whose codes lie between the integers below and above: ``v``, one number a weight, says where.

    Weights that are exactly zero stay zero.

    Args:
        weight: float32, the weight before rounding.
        q: its nearest codes, which set scale and zero point; of an integer format.
    """

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        self.q = q
        rows = blocks(weight.detach().to(torch.float32), q.scheme) / q.scale.reshape(-1, 1)
        self.floor, self.zero = torch.floor(rows), rows == 0
        part = (rows - self.floor).clamp(0.01, 0.99)
        share = (part - _LOW) / (_HIGH - _LOW)
        self.v = torch.log(share / (1 - share)).requires_grad_()

    def up(self) -> Tensor:
        """How far each code is on its way to the integer above, 0 to 1."""
        return (torch.sigmoid(self.v) * (_HIGH - _LOW) + _LOW).clamp(0, 1).masked_fill(self.zero, 0.0)

    def weight(self) -> Tensor:
        """The weight with soft codes: float32, differentiable in ``v``."""
        return self._value(self._codes(self.up()))

    def undecided(self, beta: float) -> Tensor:
        """Sum of 1 - abs(2 h - 1)**beta over the codes' positions h: zero where all of them are decided."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def hard(self) -> QTensor:
        """The weight with every code decided."""
        with torch.no_grad():
            codes = self._codes(((self.v >= 0) & ~self.zero).to(torch.float32))
            codes = unblocks(codes, self.q.shape, self.q.scheme).to(self.q.scheme.spec.code_dtype)
        return QTensor(codes, self.q.scale, self.q.zero_point, self.q.scheme, self.q.shape)

    def _codes(self, up: Tensor) -> Tensor:
        scheme = self.q.scheme
        return (self.floor + up + self.q.zero_point.reshape(-1, 1)).clamp(scheme.qmin, scheme.qmax)

    def _value(self, codes: Tensor) -> Tensor:
        rows = (codes - self.q.zero_point.reshape(-1, 1)) * self.q.scale.reshape(-1, 1)
        return unblocks(rows, self.q.shape, self.q.scheme)
