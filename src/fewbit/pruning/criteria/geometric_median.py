"""How far a unit's weights are from all others of its group: He et al. (FPGM, arXiv 1811.00250).

What lies near the middle of the others can be replaced by them.
"""

import torch
from torch import Tensor

from fewbit.pruning.criteria import Units


def scores(units: Units) -> Tensor:
    return torch.stack([torch.cdist(rows, rows).mean(1) for rows in units.makers()]).sum(0)
