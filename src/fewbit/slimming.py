"""Pruning from the outside: fewer channels or fewer weights, in a model that stays an ordinary network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any, get_args

from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit import channels, sparsify
from fewbit.channels import Thinning, thinned
from fewbit.data import Batches, as_batches
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.latency_budget import seconds_of
from fewbit.model.readers import as_module
from fewbit.model.simulate import QuantizedModel
from fewbit.normalise import as_graph, as_inputs, standard
from fewbit.pipeline import quantize
from fewbit.pruning.allocation import Scope
from fewbit.pruning.evidence import Loss
from fewbit.pruning.patterns import Pattern
from fewbit.registry import nearest
from fewbit.sparsify import Sparsifying, sparsified
from fewbit.training.model import TrainableModel


def prune(
    model: Any,
    example: Tensor | tuple[Tensor, ...] | None = None,
    *,
    speedup: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    latency: str | float | None = None,
    sparsity: float | None = None,
    structure: str | None = None,
    block: tuple[int, int] | None = None,
    criterion: str | None = None,
    data: object = None,
    loss: Loss | None = None,
    repair: bool | None = None,
    scope: Scope = "global",
    least: float | None = None,
    multiple: int | None = None,
    ignore: tuple[str, ...] = (),
    steps: int = 1,
    schedule: str | None = None,
    rewind: nn.Module | Mapping[str, Tensor] | None = None,
    train: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Any:
    """A smaller copy of a model: channels, hidden units and heads that it needs least are gone.

    ``model``: an ``nn.Module``, a ``keras.Model`` or a graph that ``fewbit.load`` gave; left as it is. ``example``: one
    input, or a tuple of them; by default of ``data``. One budget: ``speedup`` (multiply-accumulates fall to one part in
    so many), ``macs`` (of one sample), ``parameters`` or ``latency`` (seconds, or a text such as "3 ms", of one call on
    ``example`` with its batch size, one sample without it: ONNX Runtime on one thread, measured; this takes a while).
    ``criterion``: how need is measured (see docs/pruning.md); ``data``: inputs, with labels if there are any, for those
    that have to see some; ``loss(output, target)``: by default cross entropy. ``repair``: fit the weights that are left
    so that each layer gives what it gave (`refit`); by default where there is ``data``. ``scope``: "global" compares
    all layers, "uniform" takes the same share of each. ``least``: the share of a group that stays in any case, by
    default a tenth; ``multiple``: of which its size has to be one, by default 8 for ``latency`` and else 1. ``ignore``:
    layers that keep their channels. ``steps`` reaches the budget in so many parts, and calls ``train(model)`` after
    each, which gives the model back or trains it in place; ``lambda m: fewbit.finetune(m, data, epochs=1,
    teacher=model)`` for instance.

    Or single weights: ``sparsity``, the share of them that become zero, with ``structure`` "unstructured", "block"
    (``block`` outputs x inputs leave together, (4, 4)) or "N:M", which says the share itself. ``criterion`` is then one
    of weights, "magnitude" by default; ``least`` of each layer stays, a hundredth. ``schedule``: how ``steps`` come to
    the share: "cubic" by default, "linear" or "geometric". ``rewind``: a model or its state, from early in training, to
    which the weights that stay go back after each step (lottery tickets). Zeros stay zero when the model is fine-tuned,
    quantized and exported; the shapes stay, too, so that the file gets smaller, and nothing faster by itself.

    The result is a graph of ordinary layers under their old names, on the CPU and in eval mode, which trains, quantizes
    and exports like any other. Before it is given, it is compared with the whole model whose pruned channels nothing
    reads. ``result.meta["pruning"]`` says what every group kept and why some had to stay, ``meta["sparsity"]`` where
    zeros are. A network that is trained in codes (``quantize(..., trainable=True)``) is pruned in its latent weights
    and quantized again by its own recipe, on ``data``. Raises ``ModelError``, ``DataError`` or ``RecipeError``.
    """
    how = settings(
        speedup=speedup, macs=macs, parameters=parameters, latency=latency, sparsity=sparsity, structure=structure,
        block=block, criterion=criterion, loss=loss, scope=scope, least=least, multiple=multiple, ignore=ignore,
        steps=steps, schedule=schedule, train=train,
    )  # fmt: skip
    trainable = model if isinstance(model, TrainableModel) else None
    known = example
    if trainable is not None:
        _check_in_codes(how, data)
        known = trainable.example if example is None else example
        model = trainable.latent_model()
    gm, examples, batches = _read(model, known, data, how, bool(repair), batch_size)
    if isinstance(how, Thinning):
        if rewind is not None:
            raise RecipeError("rewind= is for single weights: give sparsity=")
        repairs = repair if repair is not None else batches is not None
        timed_on = as_inputs(example) or tuple(x[:1] for x in examples)
        small = thinned(gm, examples, timed_on, batches, how, repairs, seed, progress)
    else:
        how = _rewinding(how, rewind, bool(repair), examples)
        repairs = repair if repair is not None else batches is not None and rewind is None
        small = sparsified(gm, examples, batches, how, repairs, seed, progress)
    return small if trainable is None else _in_codes(small, trainable, data, batch_size, seed, progress)


def settings(
    *,
    speedup: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    latency: str | float | None = None,
    sparsity: float | None = None,
    structure: str | None = None,
    block: tuple[int, int] | None = None,
    criterion: str | None = None,
    loss: Loss | None = None,
    scope: Scope = "global",
    least: float | None = None,
    multiple: int | None = None,
    ignore: tuple[str, ...] = (),
    steps: int = 1,
    schedule: str | None = None,
    train: Callable[[nn.Module], Any] | None = None,
) -> Thinning | Sparsifying:
    """What ``prune``'s keywords ask for, checked. Raises ``RecipeError``."""
    if scope not in get_args(Scope) or type(steps) is not int or steps < 1:
        raise RecipeError(
            f"scope={scope!r}, steps={steps!r}: expected {' or '.join(get_args(Scope))}, and a step at least"
        )
    budgets = {"speedup": speedup, "macs": macs, "parameters": parameters, "latency": seconds_of(latency)}
    structure = structure or ("channels" if sparsity is None else "unstructured")
    if structure == "channels":
        _not_for(structure, {"sparsity": sparsity, "block": block, "schedule": schedule})
        return Thinning(
            _budget(budgets), criterion or "l2", scope, channels.LEAST if least is None else least, multiple,
            tuple(ignore), steps, loss, train,
        )  # fmt: skip
    _not_for(
        structure, {**budgets, "multiple": multiple, **({} if structure == "block" else {"block": block})}
    )
    pattern = Pattern(structure, block or (4, 4))
    return Sparsifying(
        pattern, _share(pattern, sparsity), criterion or "magnitude", scope,
        sparsify.LEAST if least is None else least, tuple(ignore), steps, schedule or "cubic", loss, train,
    )  # fmt: skip


def _rewinding(how: Sparsifying, rewind: Any, repair: bool, examples: tuple[Tensor, ...]) -> Sparsifying:
    """With the state to go back to, read as the model itself is."""
    if rewind is None:
        return how
    if repair:
        raise RecipeError("repair=True fits weights, and rewind= takes them back: leave one of them out")
    if not isinstance(rewind, Mapping):
        rewind = standard(as_module(rewind, examples), examples).state_dict()
    return replace(how, rewind=rewind)


def _in_codes(
    small: GraphModule, before: TrainableModel, data: object, batch_size: int, seed: int, progress: bool
) -> TrainableModel:
    """Quantized again as the network was that it came from."""
    assert before.recipe is not None
    made: TrainableModel = quantize(
        small, data, recipe=before.recipe, target=before.target, trainable=before.training_with, example=before.example,
        batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    return made


def _check_in_codes(how: Thinning | Sparsifying, data: object) -> None:
    if how.steps > 1 or how.train is not None:
        raise RecipeError(
            "a network that is trained in codes is pruned in one step: call prune and finetune in turn, or leave "
            "steps= and train= to the float model"
        )
    if data is None:
        raise DataError(
            "a network that is trained in codes gets new ranges: call prune(model, data=..., ...)"
        )


def _not_for(structure: str, values: Mapping[str, object]) -> None:
    given = [name for name, value in values.items() if value is not None]
    if given and structure == "channels":
        raise RecipeError(
            f"{', '.join(given)}: for single weights (structure='unstructured', '2:4' or 'block'); channels take "
            "speedup=, macs=, parameters= or latency="
        )
    if given:
        raise RecipeError(
            f"{', '.join(given)}: not for structure={structure!r}; zeros among weights save no work by themselves: "
            "give sparsity=, or prune channels"
        )


def _budget(asked: Mapping[str, float | None]) -> tuple[str, float]:
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise RecipeError(f"expected one of {', '.join(asked)}, got {', '.join(given) or 'none'}")
    return next(iter(given.items()))


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


def _read(
    model: Any, example: Any, data: object, how: Thinning | Sparsifying, repair: bool, batch_size: int
) -> tuple[GraphModule, tuple[Tensor, ...], Batches | None]:
    """The model as a graph, inputs to run it on, and the data."""
    if isinstance(model, QuantizedModel):
        raise ModelError(
            "the model is quantized already: prune the float model that it came from, then quantize"
        )
    batches = None
    if data is not None:
        like = as_inputs(example)
        batches = as_batches(data, what="pruning", like=like, labels=None, batch_size=batch_size)
        if batches.one_shot and (how.steps > 1 or how.sees):
            raise DataError("pruning reads the data several times: give arrays, a list, a data set or a file")
    elif how.sees or repair:
        what = f"criterion {how.criterion!r}" if how.sees else "repair"
        raise DataError(f"{what} has to see data: call prune(model, data=..., ...)")
    gm, examples = as_graph(model, example, batches)
    layers = [name for name, _ in gm.named_modules() if name]
    for pattern in how.ignore:
        if not any(fnmatch(layer, pattern) for layer in layers):
            raise RecipeError(f"ignore={pattern!r} matches no layer: {nearest(pattern, layers)}")
    return gm, examples, batches
