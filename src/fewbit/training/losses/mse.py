"""Squared error of outputs, for any task: Ba & Caruana, "Do Deep Nets Really Need to be Deep?" (arXiv 1312.6184)."""

import torch.nn.functional as F
from torch import Tensor


def loss(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """The mean squared difference."""
    return F.mse_loss(student, teacher)
