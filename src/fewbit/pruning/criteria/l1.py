"""The absolute weights that make a unit: Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710)."""

import torch
from torch import Tensor

from fewbit.pruning.criteria import Units


def scores(units: Units) -> Tensor:
    return torch.stack([rows.abs().mean(1) for rows in units.makers()]).sum(0)
