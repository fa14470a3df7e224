"""The control: any other criterion has to be better."""

import torch
from torch import Tensor

from fewbit.pruning.criteria import Units


def scores(units: Units) -> Tensor:
    return torch.rand(len(units), generator=units.generator, dtype=torch.float64)
