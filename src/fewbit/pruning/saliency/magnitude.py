"""Small weights leave first: Han et al., "Learning both Weights and Connections" (arXiv 1506.02626)."""

from torch import Tensor

from fewbit.pruning.saliency import Weight


def scores(weight: Weight) -> Tensor:
    """The weights' absolute values."""
    return weight.value.detach().abs()
