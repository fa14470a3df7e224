"""The factor of the norm behind a unit: Liu et al., "Network Slimming" (arXiv 1708.06519).

Units without a norm have the length of the weights that make them, so that all are comparable within their group.
"""

import torch
from torch import Tensor

from fewbit.pruning.criteria import Units


def scores(units: Units) -> Tensor:
    found = units.factors() or [rows.square().sum(1, keepdim=True).sqrt() for rows in units.makers()]
    return torch.stack([rows.abs().mean(1) for rows in found]).sum(0)
