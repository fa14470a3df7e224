"""Weights that read a unit times the size of what it gives: Wanda's measure (arXiv 2306.11695), of whole units."""

import torch
from torch import Tensor

from fewbit.pruning.criteria import Units

NEEDS = ("inputs",)
COMPARABLE = True


def scores(units: Units) -> Tensor:
    found = [rows.abs() if size is None else rows.abs() * size for rows, size in units.readers()]
    return torch.stack([rows.mean(1) for rows in found or [rows.abs() for rows in units.makers()]]).sum(0)
