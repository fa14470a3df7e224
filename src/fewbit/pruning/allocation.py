"""Decides which units leave: as few as reach a budget, those that are needed least first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.errors import RecipeError
from fewbit.pruning.groups import Group

_NOTHING = 1e-9  # of the whole cost
Scope = Literal["global", "uniform"]
Cost = Callable[[set[int]], float]  # of the model without these labels


@dataclass(frozen=True)
class Bounds:
    """How far a group may shrink: to ``least`` of its units (a share), and at that to a multiple of ``multiple``."""

    least: float = 0.1
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1 or self.multiple < 1:
            raise RecipeError(
                f"least={self.least}, multiple={self.multiple}: expected a share from 0 to 1, and 1 or more"
            )

    def kept(self, group: Group, wanted: int) -> int:
        """Units that stay when ``wanted`` would."""
        size = len(group)
        wanted = max(wanted, 1, -int(-self.least * size // 1))
        return min(size, -(-wanted // self.multiple) * self.multiple)


def allocate(
    groups: Sequence[Group],
    scores: Mapping[int, Tensor],
    cost: Cost,
    budget: float,
    scope: Scope,
    bounds: Bounds,
    comparable: bool,
) -> set[int]:
    """The labels that leave, so that the cost is within the budget; ``scores`` by each group's first label.

    "uniform" takes the same share of each group. "global" takes units in one order: by their score for each part of the
    cost that leaves with them where scores are ``comparable`` across groups, otherwise by their score divided by the
    mean of their group. Raises RecipeError where even the smallest model costs more.
    """
    ranks = _ranks(groups, scores)
    order = _order(groups, scores, {g.labels[0]: _saved(g, cost) if comparable else None for g in groups})

    def gone(step: int) -> set[int]:
        counts = {g.labels[0]: 0 for g in groups}
        if scope == "uniform":
            counts = {g.labels[0]: len(g) * step // len(order) for g in groups}
        else:
            for key in order[:step]:
                counts[key] += 1
        return _leaving(groups, ranks, counts, bounds)

    least = cost(gone(len(order)))
    if least > budget:
        raise RecipeError(
            f"the budget of {budget:.4g} is out of reach: with {bounds.least:.0%} of each group's channels the model "
            f"still costs {least:.4g}; ask for less, or allow more with least="
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(gone(middle)) <= budget else (middle + 1, high)
    return gone(low)


def smallest(groups: Sequence[Group], scores: Mapping[int, Tensor], bounds: Bounds) -> set[int]:
    """The labels that leave when as many do as may."""
    return _leaving(groups, _ranks(groups, scores), {g.labels[0]: len(g) for g in groups}, bounds)


def _ranks(groups: Sequence[Group], scores: Mapping[int, Tensor]) -> dict[int, list[int]]:
    """The units of each group, the one that is needed least first."""
    return {g.labels[0]: torch.argsort(scores[g.labels[0]], stable=True).tolist() for g in groups}


def _leaving(
    groups: Sequence[Group], ranks: Mapping[int, list[int]], counts: Mapping[int, int], bounds: Bounds
) -> set[int]:
    """The first so many units of each group, or as many as may leave."""
    labels: set[int] = set()
    for group in groups:
        leave = len(group) - bounds.kept(group, len(group) - counts[group.labels[0]])
        labels.update(group.labels[unit] for unit in ranks[group.labels[0]][:leave])
    return labels


def _saved(group: Group, cost: Cost) -> float:
    """What the cost falls by when one of these units leaves."""
    whole = cost(set())
    return max(whole - cost({group.labels[0]}), _NOTHING * whole)


def _order(
    groups: Sequence[Group], scores: Mapping[int, Tensor], saved: Mapping[int, float | None]
) -> list[int]:
    """The first label of the group of each unit, the unit that is needed least first."""
    pairs = []
    for number, group in enumerate(groups):
        found = scores[group.labels[0]]
        relative = found / (saved[group.labels[0]] or found.mean().clamp(min=1e-30))
        pairs += [(score, number) for score in sorted(relative.tolist())]
    return [groups[number].labels[0] for _, number in sorted(pairs)]
