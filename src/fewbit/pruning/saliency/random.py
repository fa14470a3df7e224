"""At random: the control that a criterion has to beat."""

import torch
from torch import Tensor

from fewbit.pruning.saliency import Weight


def scores(weight: Weight) -> Tensor:
    """Numbers between 0 and 1."""
    return torch.rand(weight.value.shape, generator=weight.generator, dtype=torch.float64)
