"""What leaving costs when the other weights make up for it: Hassibi and Stork, "Second order derivatives for network
pruning: Optimal Brain Surgeon" (NIPS 1992), layer by layer as in SparseGPT (arXiv 2301.00774).

The squared error of a sum counts by how much the loss feels it in that layer: the Kronecker-factored Hessian of
Martens and Grosse (arXiv 1503.05671), of its second factor the mean of the diagonal.
"""

from torch import Tensor

from fewbit.pruning.saliency import Weight

NEEDS = {"hessian", "gradients"}
_DAMPING = 0.01


def scores(weight: Weight) -> Tensor:
    """Half of w**2 / [H^-1]_ii, times the layer's importance."""
    assert weight.hessian is not None
    curvature = weight.inverse(_DAMPING).diagonal(dim1=1, dim2=2)
    error = weight.rows(weight.hessian).square() / curvature[:, None] / 2
    return error.flatten(0, 1) * weight.importance()
