"""How much a model needs each unit: one criterion a file, with a function `scores`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewbit.pruning.groups import Group, Member
from fewbit.registry import Registry

registry = Registry("fewbit.pruning.criteria", "criterion")


@dataclass
class Evidence:
    """What was seen of a model on data; empty where the criterion needs none.

    ``first``: the mean square, over batches, of the sum of parameter x gradient of each unit; ``second``: the mean of
    the sum of their squares; both [units], by the group's first label. ``inputs``: for each index of a weight's
    dimension 1 the root mean square of what it multiplies, by the weight's name.
    """

    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Units:
    """A group's units, as criteria see them. All tensors are float64 [units, n], a row for each unit."""

    group: Group
    evidence: Evidence
    generator: torch.Generator

    def __len__(self) -> int:
        return len(self.group)

    def weights(self) -> list[Tensor]:
        """The weights that make the units and those that read them, biases and norms left out."""
        return [rows(m, m.slot.tensor) for m in parameters(self.group) if m.slot.tensor.dim() > 1]

    def makers(self) -> list[Tensor]:
        """The weights that make the units: a filter, the rows of a linear layer, the gates of a hidden unit."""
        made = [rows(m, m.slot.tensor) for m in parameters(self.group) if m.slot.makes == m.dim]
        return made or self.weights()

    def readers(self) -> list[tuple[Tensor, Tensor | None]]:
        """The weights that read the units, and the root mean square of what each multiplies (None: not seen)."""
        found = []
        for member in parameters(self.group):
            tensor, seen = member.slot.tensor, self.evidence.inputs.get(member.slot.names[0])
            if member.slot.makes not in (None, member.dim):
                shape = [-1 if dim == member.dim else 1 for dim in range(tensor.dim())]
                size = None if seen is None else rows(member, seen.reshape(shape).expand(tensor.shape))
                found.append((rows(member, tensor), size))
        return found

    def factors(self) -> list[Tensor]:
        """The factors of the norms behind the units."""
        return [rows(m, m.slot.tensor) for m in parameters(self.group) if m.slot.factors]

    def first_order(self) -> Tensor:
        """Float64 [units]: see `Evidence`."""
        return self.evidence.first[self.group.labels[0]]

    def second_order(self) -> Tensor:
        """Float64 [units]: see `Evidence`."""
        return self.evidence.second[self.group.labels[0]]


def parameters(group: Group) -> list[Member]:
    """Where a group's units lie in what is trained."""
    return [m for m in group.members if isinstance(m.slot.tensor, nn.Parameter)]


def rows(member: Member, tensor: Tensor) -> Tensor:
    """What belongs to each unit in a tensor of the member's shape: float64 [units, n]."""
    return tensor.detach().movedim(member.dim, 0)[member.indices].flatten(1).double()


def criterion_names() -> list[str]:
    """Names of all criteria."""
    return registry.names()


def needs(name: str) -> frozenset[str]:
    """What a criterion has to see on data: any of "gradients" and "inputs"."""
    return frozenset(getattr(registry.module(name), "NEEDS", ()))


def comparable(name: str) -> bool:
    """Whether a criterion's scores are in one unit for all groups."""
    return bool(getattr(registry.module(name), "COMPARABLE", False))


def scores(name: str, group: Group, evidence: Evidence, generator: torch.Generator) -> Tensor:
    """How much each unit of a group is needed: float64 [units], not negative. RecipeError for an unknown name."""
    found: Tensor = registry.module(name).scores(Units(group, evidence, generator))
    return found
