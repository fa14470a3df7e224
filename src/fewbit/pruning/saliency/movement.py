"""Weights that training moves towards zero leave first: Sanh et al., "Movement Pruning" (arXiv 2005.07683)."""

from torch import Tensor

from fewbit.pruning.saliency import Weight

NEEDS = {"training"}


def scores(weight: Weight) -> Tensor:
    """The weight times how far the last training moved it, which is what the gradients' products add up to."""
    assert weight.before is not None
    value = weight.value.detach().double()
    return value * (value - weight.before.double())
