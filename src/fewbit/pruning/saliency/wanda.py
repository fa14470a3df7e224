"""Weights times the size of what they multiply: Sun et al., "A Simple and Effective Pruning Approach for Large
Language Models" (Wanda, arXiv 2306.11695); an output's weights are compared with each other."""

from torch import Tensor

from fewbit.pruning.saliency import Weight

NEEDS = {"inputs"}
PER_OUTPUT = True


def scores(weight: Weight) -> Tensor:
    """Absolute weight times the root mean square of its input."""
    assert weight.inputs is not None
    return weight.rows(weight.inputs).abs() * weight.inputs.double().sqrt()[:, None]
