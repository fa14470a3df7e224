"""The length of a unit's weights, those that make it and those that read it (as DepGraph, arXiv 2301.12900)."""

from torch import Tensor

from fewbit.pruning.criteria import Units


def scores(units: Units) -> Tensor:
    return sum(rows.square().mean(1) for rows in units.weights()).sqrt()  # type: ignore[union-attr]
