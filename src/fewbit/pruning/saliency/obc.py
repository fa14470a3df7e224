"""Weight after weight leaves an output, each time the one whose leaving costs least, and the others make up for it.

Frantar et al., "Optimal Brain Compression" (arXiv 2208.11580). Takes I**3 steps for each output of I inputs.
"""

import torch
from torch import Tensor

from fewbit.errors import RecipeError
from fewbit.pruning.saliency import Weight

NEEDS = {"hessian", "gradients"}
_DAMPING = 0.01
_MOST_WORK = 2e13
_ROWS = 4  # whose inverses fit into a processor's cache together


def scores(weight: Weight) -> Tensor:
    """What each leaving cost, times the layer's importance; never less than what left before.

    Raises RecipeError for a layer so large that it would take hours.
    """
    assert weight.hessian is not None
    rows, inverse = weight.rows(weight.hessian), weight.inverse(_DAMPING)
    groups, outputs, inputs = rows.shape
    if groups * outputs * inputs**3 > _MOST_WORK:
        raise RecipeError(
            f"criterion 'obc' takes hours for a weight of shape {tuple(weight.value.shape)}: use 'obs'"
        )
    found = [_costs(part, inverse[g]) for g in range(groups) for part in rows[g].split(_ROWS)]
    return torch.cat(found) * weight.importance()


def _costs(rows: Tensor, inverse: Tensor) -> Tensor:
    """rows [n, I], inverse [I, I]: half the squared error that each leaving adds, [n, I]."""
    rows, inverses = rows.clone(), inverse.expand(len(rows), -1, -1).clone()
    found = torch.zeros_like(rows)
    left = torch.ones_like(rows, dtype=torch.bool)
    lines = torch.arange(len(rows))
    most = torch.zeros(len(rows), dtype=rows.dtype)
    for _ in range(rows.shape[1]):
        diagonal = inverses.diagonal(dim1=1, dim2=2).clamp(min=1e-30)
        cost = torch.where(left, rows.square() / diagonal / 2, torch.inf)
        least, index = cost.min(1)
        most = torch.maximum(most, least)
        found[lines, index] = most
        left[lines, index] = False
        column = inverses[lines, :, index] / diagonal[lines, index].sqrt()[:, None]
        rows -= column * (rows[lines, index] / diagonal[lines, index].sqrt())[:, None]
        rows[lines, index] = 0.0
        inverses.baddbmm_(column[:, :, None], column[:, None, :], alpha=-1.0)
    return found
