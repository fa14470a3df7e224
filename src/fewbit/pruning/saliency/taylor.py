"""The loss's change to first order: Molchanov et al., "Importance Estimation for Neural Network Pruning"
(arXiv 1906.10771)."""

from torch import Tensor

from fewbit.pruning.saliency import Weight

NEEDS = {"gradients"}


def scores(weight: Weight) -> Tensor:
    """The mean square of weight times gradient."""
    assert weight.squares is not None
    return weight.value.detach().double().square() * weight.squares
