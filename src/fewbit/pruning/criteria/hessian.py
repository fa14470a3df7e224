"""The change of the loss to second order: Theis et al. (arXiv 1801.05787), after LeCun et al. (1989).

The diagonal of the Hessian is that of the Fisher information: squared gradients.
"""

from torch import Tensor

from fewbit.pruning.criteria import Units

NEEDS = ("gradients",)
COMPARABLE = True


def scores(units: Units) -> Tensor:
    return units.second_order() / 2
