"""Soft labels: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).

Students in few bits cannot follow the small probabilities that a high temperature brings out: 1 is safe for them.
"""

import torch.nn.functional as F
from torch import Tensor


def loss(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """The Kullback-Leibler divergence from the teacher's classes to the student's, times the squared temperature."""
    classes = student.shape[-1]
    found = F.log_softmax(student.reshape(-1, classes) / temperature, dim=1)
    wanted = F.log_softmax(teacher.reshape(-1, classes) / temperature, dim=1)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean") * temperature**2
