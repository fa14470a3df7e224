"""Weights times the size of what they multiply: Sun et al., "A Simple and Effective Pruning Approach for Large
Language Models" (Wanda, arXiv 2306.11695); an output's weights are compared with each other."""

from torch import Tensor

from fewbit.pruning.saliency import Weight

NEEDS = {"hessian"}
PER_OUTPUT = True


def scores(weight: Weight) -> Tensor:
    """Absolute weight times the root mean square of its input."""
    assert weight.hessian is not None
    size = weight.hessian.diagonal(dim1=1, dim2=2).double().sqrt()
    return weight.rows().abs() * size[:, None]
