"""Pruning from the outside: fewer channels or fewer weights, in a model that stays an ordinary network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fewbit.data import Batch, Batches, as_batches
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.model.graph import in_eval_mode, refresh
from fewbit.model.readers import as_module
from fewbit.model.simulate import QuantizedModel
from fewbit.normalise import standard
from fewbit.progress import shown
from fewbit.pruning.allocation import Bounds, Scope, allocate
from fewbit.pruning.coupling import Coupling
from fewbit.pruning.criteria import comparable, needs, scores
from fewbit.pruning.evidence import Loss, gather
from fewbit.pruning.groups import Group, couple, find_groups, macs_without, parameters_without
from fewbit.pruning.patterns import Pattern
from fewbit.pruning.slicing import masked, without
from fewbit.refit import refit
from fewbit.registry import nearest
from fewbit.sparsify import LEAST, Sparsifying, sparsified
from fewbit.tables import text_table
from fewbit.training.model import TrainableModel

LEAST_CHANNELS = 0.1
_CHECKED = 4  # samples on which the smaller model is compared with the masked one
_TOLERANCE = 1e-3  # of the largest output; float32 sums in another order differ by less


@dataclass(frozen=True)
class Kept:
    """A group of channels: how many it had and has, and why all had to stay where they had to."""

    layer: str
    before: int
    after: int
    reason: str | None


@dataclass(frozen=True)
class Pruning:
    """What pruning did; in ``model.meta["pruning"]``. Multiply-accumulates are of one sample."""

    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    groups: tuple[Kept, ...]

    def __str__(self) -> str:
        head = (
            f"MACs {self.macs_before:,} -> {self.macs:,} ({self.macs_before / self.macs:.2f} x fewer), "
            f"parameters {self.parameters_before:,} -> {self.parameters:,}"
        )
        rows = [[g.layer, str(g.before), str(g.after), g.reason or ""] for g in self.groups]
        return f"{head}\n{text_table(['channels of', 'before', 'after', 'all stay because'], rows)}"


def prune(
    model: Any,
    example: Tensor | tuple[Tensor, ...] | None = None,
    *,
    speedup: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    sparsity: float | None = None,
    structure: str | None = None,
    block: tuple[int, int] = (4, 4),
    criterion: str | None = None,
    data: object = None,
    loss: Loss | None = None,
    repair: bool | None = None,
    scope: Scope = "global",
    least: float | None = None,
    multiple: int = 1,
    ignore: tuple[str, ...] = (),
    steps: int = 1,
    schedule: str = "cubic",
    rewind: nn.Module | Mapping[str, Tensor] | None = None,
    train: Callable[[nn.Module], nn.Module] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> GraphModule:
    """A smaller copy of a model: channels, hidden units and heads that it needs least are gone.

    ``model``: an ``nn.Module``, a ``keras.Model`` or a graph that ``fewbit.load`` gave; left as it is. ``example``: one
    input, or a tuple of them; by default of ``data``. One budget: ``speedup`` (multiply-accumulates fall to one part in
    so many), ``macs`` (of one sample) or ``parameters``. ``criterion``: how need is measured (see docs/pruning.md);
    ``data``: inputs, with labels if there are any, for those that have to see some; ``loss(output, target)``: by
    default cross entropy. ``repair``: fit the weights that are left so that each layer gives what it gave (`refit`);
    by default where there is ``data``. ``scope``: "global" compares all layers, "uniform" takes the same share of each.
    ``least``: the share of a group that stays in any case, by default a tenth; ``multiple``: of which its size has to
    be one. ``ignore``: layers that keep their channels. ``steps`` reaches the budget in so many parts, and calls
    ``train(model)`` after each, which gives the model back; ``lambda m: fewbit.finetune(m, data, epochs=1,
    teacher=model)`` for instance.

    Or single weights: ``sparsity``, the share of them that become zero, with ``structure`` "unstructured", "block"
    (``block`` outputs x inputs leave together) or "N:M", which says the share itself. ``criterion`` is then one of
    weights, "magnitude" by default; ``least`` of each layer stays, a hundredth. ``schedule``: how ``steps`` come to the
    share: "cubic", "linear" or "geometric". ``rewind``: a model or its state, from early in training, to which the
    weights that stay go back after each step (lottery tickets). Zeros stay zero when the model is fine-tuned, quantized
    and exported; the shapes stay, too, so that the file gets smaller, and nothing faster by itself.

    The result is a graph of ordinary layers under their old names, which trains, quantizes and exports like any other.
    Before it is given, it is compared with the whole model whose pruned channels nothing reads.
    ``result.meta["pruning"]`` says what every group kept and why some had to stay, ``result.meta["sparsity"]`` where
    zeros are. Raises ``ModelError``, ``DataError``
    or ``RecipeError``.
    """
    if scope not in get_args(Scope) or steps < 1:
        raise RecipeError(
            f"scope={scope!r}, steps={steps}: expected {' or '.join(get_args(Scope))}, and a step at least"
        )
    structure = structure or ("channels" if sparsity is None else "unstructured")
    if structure != "channels":
        _only(structure, speedup=speedup, macs=macs, parameters=parameters)
        pattern = Pattern(structure, block)
        state = rewind.state_dict() if isinstance(rewind, nn.Module) else rewind
        how = Sparsifying(
            pattern, _share(pattern, sparsity), criterion or "magnitude", scope, LEAST if least is None else least,
            ignore, steps, schedule, loss, train, state,
        )  # fmt: skip
        gm, examples, batches = _read(model, example, data, how.criterion, how.sees, bool(repair), batch_size)
        _known(ignore, gm)
        repairs = repair if repair is not None else batches is not None and rewind is None
        return sparsified(gm, examples, batches, how, repairs, seed, progress)
    if sparsity is not None or rewind is not None:
        raise RecipeError(
            "sparsity= and rewind= are for single weights: structure='unstructured', '2:4' or 'block'; channels take "
            "speedup=, macs= or parameters="
        )
    name, value = _budget(speedup=speedup, macs=macs, parameters=parameters)
    criterion = criterion or "l2"
    gm, examples, batches = _read(model, example, data, criterion, needs(criterion), bool(repair), batch_size)
    bounds = Bounds(LEAST_CHANNELS if least is None else least, multiple)
    generator = torch.Generator().manual_seed(seed)
    first = couple(gm)
    count = parameters_without if name == "parameters" else macs_without
    whole, samples = count(first, set()), len(examples[0])
    budget = {"speedup": whole / value, "macs": value * samples, "parameters": value}[name]
    if budget >= whole:
        raise RecipeError(f"{name}={value:g} asks for no less than the model has")
    _known(ignore, gm)
    if all(g.reason for g in find_groups(first)):
        raise RecipeError("the model has no channels that could leave: " + _reasons(first))
    for step in range(1, steps + 1):
        c = couple(gm)
        groups = [g for g in find_groups(c) if g.reason is None and not _ignored(g, ignore)]
        evidence = gather(c, groups, needs(criterion), _seen(batches, progress), generator, loss)
        found = {g.labels[0]: scores(criterion, g, evidence, generator) for g in groups}
        part = whole * (budget / whole) ** (step / steps)
        gone = allocate(groups, found, partial(count, c), part, scope, bounds, comparable(criterion))
        smaller = without(c, gone, examples)
        _check(c, gone, smaller, examples)
        if repair if repair is not None else batches is not None:
            refit(c, gone, smaller, batches or (), progress)
        gm = smaller if train is None else standard(train(smaller), examples)
    last = couple(gm)
    gm.meta["pruning"] = Pruning(
        macs_without(first, set()) // samples, macs_without(last, set()) // samples,
        parameters_without(first, set()), parameters_without(last, set()), _kept(first, last),
    )  # fmt: skip
    return gm


def _share(pattern: Pattern, sparsity: float | None) -> float:
    """The share of zeros: what is asked for, or what N:M says."""
    if pattern.ratio is None:
        if sparsity is None:
            raise RecipeError(
                f"structure={pattern.structure!r} needs sparsity=, the share of zeros, such as 0.8"
            )
        return sparsity
    n, m = pattern.ratio
    if sparsity not in (None, 1 - n / m):
        raise RecipeError(
            f"sparsity={sparsity:g}: {n}:{m} makes {1 - n / m:g} of the weights zero; leave it out"
        )
    return 1 - n / m


def _only(structure: str, **budgets: float | None) -> None:
    given = [name for name, value in budgets.items() if value is not None]
    if given:
        raise RecipeError(
            f"{', '.join(given)}: zeros among weights save no work by themselves; give sparsity= for structure="
            f"{structure!r}, or leave the structure out"
        )


def _budget(**asked: float | None) -> tuple[str, float]:
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise RecipeError(f"expected one of {', '.join(asked)}, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if value <= 0 or (name == "speedup" and value < 1):
        raise RecipeError(
            f"{name}={value:g}: expected {'at least 1' if name == 'speedup' else 'a positive number'}"
        )
    return name, value


def _read(
    model: Any,
    example: Any,
    data: object,
    criterion: str,
    sees: frozenset[str],
    repair: bool,
    batch_size: int,
) -> tuple[GraphModule, tuple[Tensor, ...], Batches | None]:
    """The model as a graph, inputs to run it on, and the data."""
    if isinstance(model, QuantizedModel | TrainableModel):
        raise ModelError(
            "the model is quantized already: prune the float model that it came from, then quantize"
        )
    module = as_module(model)
    examples = (example,) if isinstance(example, Tensor) else example
    batches = None
    if data is not None:
        batches = as_batches(data, what="pruning", like=examples, labels=None, batch_size=batch_size)
        examples = examples or batches.peek()[0]
    elif sees or repair:
        what = f"criterion {criterion!r}" if sees else "repair"
        raise DataError(f"{what} has to see data: call prune(model, data=..., ...)")
    examples = examples or getattr(module, "meta", {}).get("example")
    if examples is None:
        raise DataError(
            "pruning follows channels through the model and needs an input: prune(model, example, ...)"
        )
    examples = tuple(x[:_CHECKED] for x in examples)
    gm = standard(module, examples)
    refresh(gm, examples)
    return gm, examples, batches


def _known(ignore: tuple[str, ...], gm: GraphModule) -> None:
    layers = [name for name, _ in gm.named_modules() if name]
    for pattern in ignore:
        if not any(fnmatch(layer, pattern) for layer in layers):
            raise RecipeError(f"ignore={pattern!r} matches no layer: {nearest(pattern, layers)}")


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
