"""GPTQ: weights are rounded one input after another, and those still to come make up for the error so far.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323). No inverse is formed: with H = L L^T, what GPTQ computes is Babai's nearest plane, one
Cholesky factor and one triangular product (Chen et al., "The Geometry of LLM Quantization", arXiv 2507.18553).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import CalibrationError

Nearest = Callable[[Tensor, int], Tensor]
"""Nearest representable weights [O] for real ones [O], of the input that is rounded in that place."""

DAMPING = 0.01  # of the Hessian's mean diagonal, added to the diagonal
_GROWTH = 10.0
_MOST = 1e3  # a Hessian that needs more is no Hessian
_BLOCK = 128  # inputs whose corrections come from one matrix product
_SMALL = 16  # and within such a block, from a small one


@dataclass(frozen=True)
class Factor:
    """A Hessian, factored in the order in which inputs are rounded: the last comes first.

    Attributes:
        order: int64 [I], inputs by rising second moment: those that matter most are rounded first, when all the
            others can still make up for them.
        lower: [I, I], the Cholesky factor of the permuted Hessian with `damping` on its diagonal.
        damping: what was added.
    """

    order: Tensor
    lower: Tensor
    damping: float


def factor(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Order and factor a Hessian; one that is singular gets ten times the damping until it is not.

    Args:
        hessian: float32 or float64 [I, I], symmetric.
        damping: the least damping, as a fraction of the mean of the diagonal.

    Raises:
        CalibrationError: the Hessian has numbers that are not finite, or is far from positive semidefinite.
    """
    diagonal = hessian.diagonal()
    order = diagonal.argsort(stable=True)
    permuted = hessian.index_select(0, order).index_select(1, order).to(torch.float64)
    mean = float(diagonal.to(torch.float64).mean())
    if not bool(torch.isfinite(permuted.sum())):
        raise CalibrationError(
            "the second moments of the layer's inputs are not finite: look for NaN in the data"
        )
    plain = permuted.diagonal().clone()
    while damping < _MOST:
        added = damping * (mean or 1.0)  # all inputs are dead: any damping will do
        permuted.diagonal().copy_(plain + added)
        lower, info = torch.linalg.cholesky_ex(permuted)
        if not int(info):
            return Factor(order, lower.to(hessian.dtype), added)
        damping *= _GROWTH
    raise CalibrationError("the second moments of the layer's inputs are no Hessian: damping does not help")


def round_inputs(weight: Tensor, factored: Factor, nearest: Nearest) -> tuple[Tensor, Tensor]:
    """Weights rounded in the factor's order, each to the nearest of what makes up best for the errors before it.

    Args:
        weight: [I, O], inputs already in `factored.order`.
        nearest: the quantizer; its index counts in that order, too.

    Returns:
        rounded weights [I, O], and the loss e^T H e of each output [O], as in `losses`.
    """
    steps = factored.lower.diagonal()
    share = factored.lower / steps  # what an error costs another input, in that input's own units
    rounded, error = torch.empty_like(weight), torch.zeros_like(weight)
    loss = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for top in range(len(weight), 0, -_BLOCK):
        low = max(0, top - _BLOCK)
        goals = torch.addmm(weight[low:top], share[top:, low:top].T, error[top:])
        for high in range(top, low, -_SMALL):
            start = max(low, high - _SMALL)
            part = goals[start - low : high - low].addmm_(share[high:top, start:high].T, error[high:top])
            for i in reversed(range(start, high)):
                goal = part[i - start]
                goal.addmv_(error[i + 1 : high].T, share[i + 1 : high, i])
                rounded[i] = nearest(goal, i)
                torch.sub(weight[i], rounded[i], out=error[i])
                goal -= rounded[i]
        goals *= steps[low:top].unsqueeze(1)
        loss += goals.square_().sum(dim=0, dtype=torch.float64)
    return rounded, loss - damped_away(error, factored)


def losses(error: Tensor, factored: Factor, enough: Tensor | None = None) -> Tensor:
    """e^T H e of each output, without the damping's share: float64 [O], of errors [I, O] in order.

    enough: [O], where a loss beyond it need not be exact: it is then a lower bound that lies beyond it, too.
    """
    share = damped_away(error, factored)
    total = -share
    limit = torch.full_like(total, torch.inf) if enough is None else enough
    some = torch.arange(len(total), device=error.device)
    # Inputs with large second moments come first: their part of the loss is large, and cheap to compute.
    for top in range(len(error), 0, -_BLOCK):
        low = max(0, top - _BLOCK)
        part = factored.lower[low:, low:top].T @ error[low:]
        total[some] += part.square_().sum(dim=0, dtype=torch.float64)
        still = total[some] <= limit[some]
        if 2 * int(still.sum()) < len(some):  # fewer would not pay for the copy
            some, error = some[still], error[:, still]
    return total


def damped_away(error: Tensor, factored: Factor) -> Tensor:
    """What the damping adds to each output's loss: float64 [O]."""
    squares = [part.square().sum(dim=0, dtype=torch.float64) for part in error.split(_BLOCK)]
    return torch.stack(squares).sum(dim=0) * factored.damping
