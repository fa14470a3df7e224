"""Channels pruned: a budget, the groups that leave, weights fitted again, training in between; each step is proven."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fewbit.data import Batch, Batches
from fewbit.errors import ModelError, RecipeError
from fewbit.evaluation.size import size_by_tensor
from fewbit.latency_budget import MULTIPLE, LatencyBudget
from fewbit.model.graph import in_eval_mode
from fewbit.normalise import retrained
from fewbit.progress import shown
from fewbit.pruned import Kept, Pruning
from fewbit.pruning.allocation import Bounds, Scope, allocate
from fewbit.pruning.coupling import Coupling
from fewbit.pruning.criteria import comparable, needs, scores
from fewbit.pruning.evidence import Loss, gather
from fewbit.pruning.groups import Group, couple, find_groups, macs_without, parameters_without
from fewbit.pruning.slicing import masked, without
from fewbit.refit import refit

LEAST = 0.1
_TOLERANCE = 1e-3  # of the largest output; float32 sums in another order differ by less


@dataclass(frozen=True)
class Thinning:
    """How channels are to be pruned; see ``fewbit.prune`` for the meaning of each. ``budget``: its name and value."""

    budget: tuple[str, float]
    criterion: str
    scope: Scope
    least: float
    multiple: int | None
    ignore: tuple[str, ...]
    steps: int
    loss: Loss | None = None
    train: Callable[[nn.Module], Any] | None = None

    def __post_init__(self) -> None:
        name, value = self.budget
        if not 0 < value < math.inf or (name == "speedup" and value < 1):
            raise RecipeError(
                f"{name}={value:g}: expected {'at least 1' if name == 'speedup' else 'a positive number'}"
            )
        self.check()

    def check(self) -> None:
        """RecipeError for an unknown criterion, or bounds that cannot be."""
        needs(self.criterion)
        Bounds(self.least, self.multiple or 1)

    @property
    def sees(self) -> frozenset[str]:
        """What the criterion has to see on data."""
        return needs(self.criterion)

    @property
    def bounds(self) -> Bounds:
        """How far groups may shrink."""
        return Bounds(self.least, self.multiple or (MULTIPLE if self.budget[0] == "latency" else 1))


def thinned(
    gm: GraphModule,
    examples: tuple[Tensor, ...],
    timed_on: tuple[Tensor, ...],
    batches: Batches | None,
    how: Thinning,
    repair: bool,
    seed: int,
    progress: bool,
) -> GraphModule:
    """The graph without the channels it needs least. ``timed_on``: what a latency is of. Raises as ``fewbit.prune``."""
    name, value = how.budget
    bounds, generator = how.bounds, torch.Generator().manual_seed(seed)
    first = couple(gm)
    count = parameters_without if name == "parameters" else macs_without
    whole: float = count(first, set())
    samples, budget, timed = len(examples[0]), value, None
    if name == "latency":
        timed = LatencyBudget(first, timed_on, bounds, progress)
        whole = timed.whole
    elif name != "parameters":
        budget = whole / value if name == "speedup" else value * samples
    if budget >= whole:
        raise RecipeError(f"{name}={value:g} asks for no less than the model has ({whole:.4g})")
    if all(g.reason for g in find_groups(first)):
        raise RecipeError("the model has no channels that could leave: " + _reasons(first))
    for step in range(1, how.steps + 1):
        c = couple(gm)
        groups = [g for g in find_groups(c) if g.reason is None and not _ignored(g, how.ignore)]
        evidence = gather(c, groups, how.sees, _seen(batches, progress), generator, how.loss)
        found = {g.labels[0]: scores(how.criterion, g, evidence, generator) for g in groups}
        part = whole * (budget / whole) ** (step / how.steps)
        choose = partial(allocate, cost=partial(count, c)) if timed is None else partial(timed.choose, c)
        gone = choose(
            groups, found, budget=part, scope=how.scope, bounds=bounds, comparable=comparable(how.criterion)
        )
        smaller = without(c, gone, examples)
        _check(c, gone, smaller, examples)
        if repair:
            refit(c, gone, smaller, batches or (), progress)
        gm = smaller if how.train is None else retrained(how.train, smaller, examples)
    last = couple(gm)
    gm.meta.pop("sparsity", None)  # what it says was of other shapes
    gm.meta["pruning"] = Pruning(
        macs_without(first, set()) // samples, macs_without(last, set()) // samples,
        parameters_without(first, set()), parameters_without(last, set()), _kept(first, last),
        size_by_tensor(first.gm), size_by_tensor(gm), None if timed is None else timed.report(),
    )  # fmt: skip
    return gm


def _ignored(group: Group, ignore: tuple[str, ...]) -> bool:
    """Whether a layer that makes these channels is to keep them."""
    return any(fnmatch(maker, pattern) for maker in group.makers for pattern in ignore)


def _seen(batches: Batches | None, progress: bool) -> Iterator[Batch]:
    if batches is not None:
        yield from shown(batches, batches.length, "measuring channels", progress)


def _reasons(c: Coupling) -> str:
    return "; ".join(f"{g.name}: {g.reason}" for g in find_groups(c) if g.makers)


def _check(c: Coupling, gone: set[int], smaller: GraphModule, examples: tuple[Tensor, ...]) -> None:
    """The smaller model gives what the whole one gives when nothing reads the channels that left."""
    with torch.no_grad(), in_eval_mode(smaller), in_eval_mode(c.gm):
        found, expected = tree_leaves(smaller(*examples)), tree_leaves(masked(c, gone, examples))
    for a, b in zip(found, expected, strict=True):
        error = float((a - b).abs().max()) if a.shape == b.shape else math.inf
        if not error <= _TOLERANCE * max(float(b.abs().max()), 1e-6):
            raise ModelError(
                f"the pruned model's outputs differ by {error:.3g} from those of the model with these channels masked: "
                "an operator of it is not known well enough; name the layers around it in ignore= and report it"
            )


def _kept(first: Coupling, last: Coupling) -> tuple[Kept, ...]:
    after = {_places(group): len(group) for group in find_groups(last)}
    groups = [g for g in find_groups(first) if g.makers]
    return tuple(Kept(g.name, len(g), after.get(_places(g), 1), g.reason) for g in groups)


def _places(group: Group) -> tuple[object, ...]:
    """Where a group lies, which pruning does not change."""
    return tuple((m.slot.names[0], m.dim, m.indices.shape[1]) for m in group.members)
