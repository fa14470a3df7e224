"""Weights that jump back and forth between two codes: found by how often they turn round, and frozen.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086), algorithm 1 and equation 6.
"""

import torch
from torch import Tensor, nn

_MOMENTUM = 0.01  # of the running averages: of how often a code turns, and of the code itself


class Oscillation(nn.Module):
    """Watches the codes of one weight, and holds those that turn round too often at the code where they mostly were.

    Args:
        codes: float32 [C, n], the weight's values at the start.
        threshold: the share of steps in which a code may turn round; None to watch only.
    """

    last: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    def __init__(self, codes: Tensor, threshold: float | None) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("last", codes.detach().clone())
        self.register_buffer("direction", torch.zeros_like(codes))
        self.register_buffer("frequency", torch.zeros_like(codes))
        self.register_buffer("average", codes.detach().clone())
        self.register_buffer("frozen", torch.zeros_like(codes, dtype=torch.bool))

    def forward(self, values: Tensor, watch: bool) -> Tensor:
        """The values, those of frozen codes replaced; with ``watch`` this counts as a step of training."""
        if watch:
            self._watch(torch.round(values.detach()))
        if self.threshold is None:
            return values
        return torch.where(self.frozen, torch.round(self.average), values)

    def _watch(self, codes: Tensor) -> None:
        change = torch.sign(codes - self.last)
        turned = (change * self.direction) < 0
        self.frequency.lerp_(turned.to(self.frequency.dtype), _MOMENTUM)
        self.direction = torch.where(change == 0, self.direction, change)
        self.average = torch.where(self.frozen, self.average, torch.lerp(self.average, codes, _MOMENTUM))
        self.last = codes
        if self.threshold is not None:
            self.frozen |= self.frequency > self.threshold
