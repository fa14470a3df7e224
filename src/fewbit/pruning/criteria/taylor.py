"""The squared change of the loss to first order: Molchanov et al. (arXiv 1906.10771), over all parameters of a unit."""

from torch import Tensor

from fewbit.pruning.criteria import Units

NEEDS = ("gradients",)
COMPARABLE = True


def scores(units: Units) -> Tensor:
    return units.first_order()
