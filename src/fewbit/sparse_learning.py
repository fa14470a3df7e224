"""Learning to need fewer channels: a penalty on groups of channels during training, so that pruning them loses little.

The growing group penalty of "DepGraph: Towards Any Structural Pruning" (arXiv 2301.12900), over all weights that leave
with a channel, as a group lasso ("Model Selection and Estimation in Regression with Grouped Variables", Yuan and Lin).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import ModelError, RecipeError, TrainingError
from fewbit.normalise import as_graph
from fewbit.pruning.criteria import parameters
from fewbit.pruning.groups import couple, find_groups

_SMALLEST = 1e-12  # added to squares: the length of a unit at zero has no derivative


@dataclass(frozen=True)
class Part:
    """Where a group's units lie in a parameter, by any of its names: ``indices`` [units, each] of dimension ``dim``."""

    names: tuple[str, ...]
    dim: int
    indices: Tensor


class GroupLasso:
    """The lengths of all units' weights, each times a factor; differentiable. Made by `group_lasso`.

    The factor is ``strength`` for a group's longest unit and ``strength * growth`` for its shortest, a power of what
    lies between for the others: what is needed least shrinks most.
    """

    def __init__(self, groups: Sequence[Sequence[Part]], strength: float, growth: float) -> None:
        self.groups, self.strength, self.growth = groups, strength, growth

    def __call__(self, module: nn.Module) -> Tensor:
        """Of a module in training that has the parameters of the model. Raises TrainingError where some are missing."""
        tensors = dict(module.named_parameters(remove_duplicate=False))
        terms = []
        for parts in self.groups:
            squares = torch.stack([_squares(part, tensors) for part in parts]).sum(0)
            lengths = (squares + _SMALLEST).sqrt()
            terms.append((self._factors(lengths.detach()) * lengths).sum())
        return torch.stack(terms).sum()

    def _factors(self, lengths: Tensor) -> Tensor:
        longest, shortest = lengths.max(), lengths.min()
        place = (longest - lengths) / (longest - shortest).clamp(min=_SMALLEST)
        return self.strength * self.growth**place


def group_lasso(
    model: Any,
    example: Tensor | tuple[Tensor, ...] | None = None,
    *,
    strength: float = 1e-3,
    growth: float = 16.0,
) -> GroupLasso:
    """A penalty for ``fewbit.finetune(model, train, penalty=...)`` that makes channels shrink which are needed least.

    ``model``: what ``fewbit.prune`` takes; ``example``: one input, or a tuple of them. A unit is all weights, biases
    and norms that leave with a channel, hidden unit or head. ``strength``: the weight of a long unit's length in the
    loss; ``growth``: how many times that a group's shortest unit has. Raises ``ModelError`` where no channels could
    leave, ``DataError`` or ``RecipeError``.
    """
    if strength <= 0 or growth < 1:
        raise RecipeError(f"strength={strength:g}, growth={growth:g}: expected more than 0, and at least 1")
    gm, _ = as_graph(model, example)
    groups = [group for group in find_groups(couple(gm)) if group.reason is None]
    if not groups:
        raise ModelError("the model has no channels that could leave: there is nothing to shrink")
    parts = [[Part(tuple(m.slot.names), m.dim, m.indices) for m in parameters(group)] for group in groups]
    return GroupLasso(parts, strength, growth)


def _squares(part: Part, tensors: dict[str, nn.Parameter]) -> Tensor:
    """The squared length of each unit in one parameter: [units]."""
    tensor = next((tensors[name] for name in part.names if name in tensors), None)
    if tensor is None:
        raise TrainingError(
            f"the penalty knows {part.names[0]!r}, which the module in training lacks: make it for the model that is "
            "trained; quantized models have no such parameters"
        )
    sums = tensor.square().movedim(part.dim, 0).reshape(tensor.shape[part.dim], -1).sum(1)
    return sums[part.indices.to(sums.device)].sum(1)
