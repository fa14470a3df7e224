"""Ranges that follow what is seen, straight through: Jacob et al. (arXiv 1712.05877), section 3.1.

For networks that train from the start: their numbers leave the ranges that calibration found in an untrained network.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fewbit.numerics.format import SMALLEST_SCALE
from fewbit.numerics.scheme import Scheme
from fewbit.training.estimators import ActivationEstimator, WeightEstimator

_SHRINKS = 0.01  # the share of a batch in the moving average; a range grows at once (see `Activations`)


class Weights(WeightEstimator):
    """Every format of fixed values with free scales: the largest weight of each row is the largest code."""

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = self.bounds()
        values = rows.detach()
        above = values.amax(1, keepdim=True) / torch.where(hi > 0, hi, torch.inf)
        below = values.amin(1, keepdim=True) / torch.where(lo < 0, lo, -torch.inf)
        scale = self.limited(torch.maximum(above, below), rows)
        return self.rounded(rows / scale), scale


class Activations(ActivationEstimator):
    """Integers: a range that grows at once, and shrinks by a moving average, to the batches of all processes.

    So training clips by half a step at most. An average both ways, the usual choice, clips the largest numbers of half
    the batches, and their gradients with them.
    """

    range: Tensor
    zero_point: Tensor

    def __init__(self, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(scheme, scale, zero_point)
        zero = zero_point.detach().clone().reshape(1)
        self.register_buffer("zero_point", zero)  # stays where the scheme is symmetric
        ends = torch.tensor([scheme.qmin, scheme.qmax], device=zero.device, dtype=torch.float32)
        self.register_buffer("range", (ends - zero) * scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self._follow(x.detach().float())
        return self.rounded(x)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        least, most = x.amin().clamp(max=0), x.amax().clamp(min=0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
        seen = torch.stack([least, most])
        wider = torch.stack([seen[0] < self.range[0], seen[1] > self.range[1]])
        self.range.lerp_(seen, torch.where(wider, 1.0, _SHRINKS))

    def exact(self) -> tuple[Tensor, Tensor]:
        lo, hi = self.range[:1], self.range[1:]
        qmin, qmax = self.scheme.qmin, self.scheme.qmax
        if self.scheme.symmetric:
            zero = self.zero_point
            above, below = hi / max(qmax - int(zero), 1), lo / min(qmin - int(zero), -1)
            return torch.maximum(above, below).clamp(min=SMALLEST_SCALE), zero.to(torch.int32)
        scale = ((hi - lo) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
        zero = torch.round(qmin - lo / scale).clamp(qmin, qmax)
        return scale, zero.to(torch.int32)
