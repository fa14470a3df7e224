"""The channels of a model that can leave it, in groups that leave alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fewbit.pruning import layers, products, shapes  # noqa: F401  (they say which operators they know)
from fewbit.pruning.coupling import Coupling, Slot
from fewbit.pruning.labels import Axis


@dataclass(frozen=True)
class Member:
    """Where the units of a group lie in a tensor: ``indices`` [units, each] of dimension ``dim``."""

    slot: Slot
    dim: int
    indices: Tensor


@dataclass(frozen=True)
class Group:
    """Units that lie alike in the same tensors: any of them can leave, all its indices at once.

    ``name``: the layer that makes them. ``labels``: one for each unit. ``reason``: why all have to stay, None where
    they need not.
    """

    name: str
    labels: tuple[int, ...]
    members: tuple[Member, ...]
    reason: str | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def makers(self) -> list[str]:
        """The layers that make the units; none where these are inputs of the model, or a parameter by itself."""
        return [m.slot.names[0].rpartition(".")[0] for m in self.members if m.slot.makes == m.dim]


def couple(gm: fx.GraphModule) -> Coupling:
    """Find which channels of a graph with shapes belong together.

    Where an axis becomes several, heads and their lengths for instance, that one gets the labels with which most
    parameters can leave.
    """
    best = Coupling(gm).run()
    for key, candidates in list(best.open_choices.items()):
        for candidate in candidates:
            trial = Coupling(gm, {**best.choices, key: candidate}).run()
            if _freedom(trial) > _freedom(best):
                best = trial
    return best


def _freedom(c: Coupling) -> tuple[float, int]:
    """How many parameters could leave, and in how many units."""
    total, units = 0.0, set()
    for slot in c.slots.values():
        for axis in slot.axes:
            free = [label for label in axis or () if c.labels.reason(label) is None]
            total += slot.tensor.numel() * len(free) / max(len(axis or ()), 1)
            units |= {c.labels.find(label) for label in free}
    return total, len(units)


def find_groups(c: Coupling) -> list[Group]:
    """All units of a coupling in groups, in the order of the graph; also those that have to stay."""
    places: dict[int, dict[tuple[int, int], list[int]]] = {}
    slots = list(c.slots.values())
    for number, slot in enumerate(slots):
        for dim, axis in enumerate(slot.axes):
            for index, label in enumerate(axis or ()):
                places.setdefault(c.labels.find(label), {}).setdefault((number, dim), []).append(index)
    alike: dict[tuple[object, ...], list[int]] = {}
    for label, where in places.items():
        key = (*((place, len(indices)) for place, indices in where.items()), c.labels.reason(label))
        alike.setdefault(key, []).append(label)
    groups = []
    for labels in alike.values():
        members = tuple(
            Member(slots[number], dim, torch.tensor([places[label][number, dim] for label in labels]))
            for number, dim in places[labels[0]]
        )
        name = members[0].slot.names[0].rpartition(".")[0] or members[0].slot.names[0]
        groups.append(Group(name, tuple(labels), members, c.labels.reason(labels[0])))
    return groups


def count_kept(c: Coupling, axis: Axis, gone: set[int]) -> int:
    """How many indices of an axis stay when these labels leave."""
    return sum(c.labels.find(label) not in gone for label in axis or ())


def work_without(c: Coupling, gone: set[int]) -> dict[fx.Node, int]:
    """Multiply-accumulates of each node on the example when these labels leave."""
    found: dict[fx.Node, int] = {}
    for work in c.work:
        macs = work.macs
        for axis in work.axes:
            if axis is not None:
                macs = macs // len(axis) * count_kept(c, axis, gone)
        found[work.node] = found.get(work.node, 0) + macs
    return found


def macs_without(c: Coupling, gone: set[int]) -> int:
    """Multiply-accumulates on the example when these labels leave."""
    return sum(work_without(c, gone).values())


def parameters_without(c: Coupling, gone: set[int]) -> int:
    """Parameters that stay when these labels leave."""
    total = 0
    for slot in c.slots.values():
        if isinstance(slot.tensor, nn.Parameter):
            sizes = zip(slot.axes, slot.tensor.shape, strict=True)
            total += math.prod(size if axis is None else count_kept(c, axis, gone) for axis, size in sizes)
    return total
