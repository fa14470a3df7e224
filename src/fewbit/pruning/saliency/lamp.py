"""Squares over the sum of all larger ones: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning"
(LAMP, arXiv 2010.07611). No layer is emptied: its largest weight has the score 1."""

import torch
from torch import Tensor

from fewbit.pruning.saliency import Weight


def scores(weight: Weight) -> Tensor:
    """Each square as a share of those that are no smaller."""
    squares = weight.value.detach().double().square().reshape(-1)
    order = squares.argsort()
    left = squares[order].flip(0).cumsum(0).flip(0)
    found = torch.empty_like(squares)
    found[order] = squares[order] / left.clamp(min=1e-300)
    return found
