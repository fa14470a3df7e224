"""Pruning from the outside: fewer channels, in a model that stays an ordinary network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fewbit.data import Batch, Batches, as_batches
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.evaluation.size import size_by_tensor
from fewbit.latency_budget import MULTIPLE, LatencyBudget, seconds_of
from fewbit.model.graph import in_eval_mode, refresh
from fewbit.model.readers import as_module
from fewbit.model.simulate import QuantizedModel
from fewbit.normalise import standard
from fewbit.progress import shown
from fewbit.pruned import Kept, Pruning
from fewbit.pruning.allocation import Bounds, Scope, allocate
from fewbit.pruning.coupling import Coupling
from fewbit.pruning.criteria import comparable, needs, scores
from fewbit.pruning.evidence import Loss, gather
from fewbit.pruning.groups import Group, couple, find_groups, macs_without, parameters_without
from fewbit.pruning.slicing import masked, without
from fewbit.refit import refit
from fewbit.registry import nearest
from fewbit.training.model import TrainableModel

_CHECKED = 4  # samples on which the smaller model is compared with the masked one
_TOLERANCE = 1e-3  # of the largest output; float32 sums in another order differ by less


def prune(
    model: Any,
    example: Tensor | tuple[Tensor, ...] | None = None,
    *,
    speedup: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    latency: str | float | None = None,
    criterion: str = "l2",
    data: object = None,
    loss: Loss | None = None,
    repair: bool | None = None,
    scope: Scope = "global",
    least: float = 0.1,
    multiple: int | None = None,
    ignore: tuple[str, ...] = (),
    steps: int = 1,
    train: Callable[[nn.Module], nn.Module] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> GraphModule:
    """A smaller copy of a model: channels, hidden units and heads that it needs least are gone.

    ``model``: an ``nn.Module``, a ``keras.Model`` or a graph that ``fewbit.load`` gave; left as it is. ``example``: one
    input, or a tuple of them; by default of ``data``. One budget: ``speedup`` (multiply-accumulates fall to one part in
    so many), ``macs`` (of one sample), ``parameters`` or ``latency`` (seconds, or a text such as "3 ms", of one call on
    ``example`` with its batch size, one sample without it: ONNX Runtime on one thread, measured; this takes a while).
    ``criterion``: how need is measured (see docs/pruning.md); ``data``: inputs, with labels if there are any, for those
    that have to see some; ``loss(output, target)``: by default cross entropy. ``repair``: fit the weights that are left
    so that each layer gives what it gave (`refit`); by default where there is ``data``. ``scope``: "global" compares
    all layers, "uniform" takes the same share of each. ``least``: the share of a group that stays in any case;
    ``multiple``: of which its size has to be one, by default 8 for ``latency`` and else 1. ``ignore``: layers that keep
    their channels. ``steps`` reaches the budget in so many parts, and calls ``train(model)`` after each, which gives
    the model back; ``lambda m: fewbit.finetune(m, data, epochs=1, teacher=model)`` for instance.

    The result is a graph of ordinary layers under their old names, which trains, quantizes and exports like any other.
    Before it is given, it is compared with the whole model whose pruned channels nothing reads.
    ``result.meta["pruning"]`` says what every group kept and why some had to stay. Raises ``ModelError``, ``DataError``
    or ``RecipeError``.
    """
    name, value = _budget(speedup=speedup, macs=macs, parameters=parameters, latency=seconds_of(latency))
    gm, examples, batches = _read(model, example, data, criterion, bool(repair), batch_size)
    if scope not in get_args(Scope) or steps < 1:
        raise RecipeError(
            f"scope={scope!r}, steps={steps}: expected {' or '.join(get_args(Scope))}, and a step at least"
        )
    bounds, generator = (
        Bounds(least, multiple or (MULTIPLE if name == "latency" else 1)),
        torch.Generator().manual_seed(seed),
    )
    first = couple(gm)
    count = parameters_without if name == "parameters" else macs_without
    whole: float = count(first, set())
    samples, budget, timed = len(examples[0]), value, None
    if name == "latency":
        inputs = tuple(x[:1] for x in examples) if example is None else example
        timed = LatencyBudget(first, (inputs,) if isinstance(inputs, Tensor) else inputs, bounds, progress)
        whole = timed.whole
    elif name != "parameters":
        budget = whole / value if name == "speedup" else value * samples
    if budget >= whole:
        raise RecipeError(f"{name}={value:g} asks for no less than the model has ({whole:.4g})")
    _known(ignore, gm)
    if all(g.reason for g in find_groups(first)):
        raise RecipeError("the model has no channels that could leave: " + _reasons(first))
    for step in range(1, steps + 1):
        c = couple(gm)
        groups = [g for g in find_groups(c) if g.reason is None and not _ignored(g, ignore)]
        evidence = gather(c, groups, needs(criterion), _seen(batches, progress), generator, loss)
        found = {g.labels[0]: scores(criterion, g, evidence, generator) for g in groups}
        part = whole * (budget / whole) ** (step / steps)
        choose = partial(allocate, cost=partial(count, c)) if timed is None else partial(timed.choose, c)
        gone = choose(
            groups, found, budget=part, scope=scope, bounds=bounds, comparable=comparable(criterion)
        )
        smaller = without(c, gone, examples)
        _check(c, gone, smaller, examples)
        if repair if repair is not None else batches is not None:
            refit(c, gone, smaller, batches or (), progress)
        gm = smaller if train is None else standard(train(smaller), examples)
    last = couple(gm)
    gm.meta["pruning"] = Pruning(
        macs_without(first, set()) // samples, macs_without(last, set()) // samples,
        parameters_without(first, set()), parameters_without(last, set()), _kept(first, last),
        size_by_tensor(first.gm), size_by_tensor(gm), None if timed is None else timed.report(),
    )  # fmt: skip
    return gm


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
    model: Any, example: Any, data: object, criterion: str, repair: bool, batch_size: int
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
    elif needs(criterion) or repair:
        what = f"criterion {criterion!r}" if needs(criterion) else "repair"
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
