"""The range of a weight that minimises the squared error of what the layer computes, inputs taken as independent.

Each weight's squared error counts as much as the second moment of the input that it is multiplied by: the diagonal of
the layer's Hessian, as in llama.cpp's importance matrices and in Choi et al., "Towards the Limit of Network
Quantization" (arXiv 1612.01543).
"""

from fewbit.observers._squared_error import SquaredErrorObserver


class Observer(SquaredErrorObserver):
    """Saturating range of a weight: least sum of importance * (w - Q(w))**2, over the weights themselves.

    Of numbers that come in batches, whose importance nobody knows, it is the range of least squared error.
    """

    STATISTICS = frozenset({"importance"})
