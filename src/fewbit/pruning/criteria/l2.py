"""The length of a unit's weights, those that make it and those that read it (as DepGraph, arXiv 2301.12900)."""

import torch
from torch import Tensor

from fewbit.pruning.criteria import Units


def scores(units: Units) -> Tensor:
    return torch.stack([rows.square().mean(1) for rows in units.weights()]).sum(0).sqrt()
