"""Pruning from the outside: fewer channels or fewer weights, in a model that stays an ordinary network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any, get_args

from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit import channels, sparsify
from fewbit.channels import Thinning, thinned
from fewbit.data import Batches, as_batches
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.latency_budget import seconds_of
from fewbit.model.graph import refresh
from fewbit.model.readers import as_module
from fewbit.model.simulate import QuantizedModel
from fewbit.normalise import standard
from fewbit.pipeline import quantize
from fewbit.pruning.allocation import Scope
from fewbit.pruning.evidence import Loss
from fewbit.pruning.patterns import Pattern
from fewbit.registry import nearest
from fewbit.sparsify import Sparsifying, sparsified
from fewbit.training.model import TrainableModel

_CHECKED = 4  # samples on which the smaller model is compared with the masked one


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
    block: tuple[int, int] = (4, 4),
    criterion: str | None = None,
    data: object = None,
    loss: Loss | None = None,
    repair: bool | None = None,
    scope: Scope = "global",
    least: float | None = None,
    multiple: int | None = None,
    ignore: tuple[str, ...] = (),
    steps: int = 1,
    schedule: str = "cubic",
    rewind: nn.Module | Mapping[str, Tensor] | None = None,
    train: Callable[[nn.Module], nn.Module] | None = None,
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
    each, which gives the model back; ``lambda m: fewbit.finetune(m, data, epochs=1, teacher=model)`` for instance.

    Or single weights: ``sparsity``, the share of them that become zero, with ``structure`` "unstructured", "block"
    (``block`` outputs x inputs leave together) or "N:M", which says the share itself. ``criterion`` is then one of
    weights, "magnitude" by default; ``least`` of each layer stays, a hundredth. ``schedule``: how ``steps`` come to the
    share: "cubic", "linear" or "geometric". ``rewind``: a model or its state, from early in training, to which the
    weights that stay go back after each step (lottery tickets). Zeros stay zero when the model is fine-tuned, quantized
    and exported; the shapes stay, too, so that the file gets smaller, and nothing faster by itself.

    The result is a graph of ordinary layers under their old names, which trains, quantizes and exports like any other.
    Before it is given, it is compared with the whole model whose pruned channels nothing reads.
    ``result.meta["pruning"]`` says what every group kept and why some had to stay, ``result.meta["sparsity"]`` where
    zeros are. A network that is trained in codes (``quantize(..., trainable=True)``) is pruned in its latent weights
    and quantized again by its own recipe, on ``data``. Raises ``ModelError``, ``DataError`` or ``RecipeError``.
    """
    if scope not in get_args(Scope) or steps < 1:
        raise RecipeError(
            f"scope={scope!r}, steps={steps}: expected {' or '.join(get_args(Scope))}, and a step at least"
        )
    budgets = {"speedup": speedup, "macs": macs, "parameters": parameters, "latency": seconds_of(latency)}
    structure = structure or ("channels" if sparsity is None else "unstructured")
    how: Thinning | Sparsifying
    if structure == "channels":
        _for_channels(sparsity, rewind)
        how = Thinning(
            _budget(budgets), criterion or "l2", scope, channels.LEAST if least is None else least, multiple, ignore,
            steps, loss, train,
        )  # fmt: skip
    else:
        _for_weights(structure, budgets)
        pattern = Pattern(structure, block)
        state = rewind.state_dict() if isinstance(rewind, nn.Module) else rewind
        how = Sparsifying(
            pattern, _share(pattern, sparsity), criterion or "magnitude", scope,
            sparsify.LEAST if least is None else least, ignore, steps, schedule, loss, train, state,
        )  # fmt: skip
    trainable = model if isinstance(model, TrainableModel) else None
    if trainable is not None:
        _in_one_step(how)
        example = example if example is not None else trainable.example
        model = trainable.latent_model()
    gm, examples, batches = _read(model, example, data, how, bool(repair), batch_size)
    if repair is None:
        repair = batches is not None and rewind is None
    if isinstance(how, Thinning):
        timed_on = tuple(x[:1] for x in examples) if example is None else example
        timed_on = (timed_on,) if isinstance(timed_on, Tensor) else timed_on
        small = thinned(gm, examples, timed_on, batches, how, repair, seed, progress)
    else:
        small = sparsified(gm, examples, batches, how, repair, seed, progress)
    return small if trainable is None else _in_codes(small, trainable, data, batch_size, seed, progress)


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


def _in_one_step(how: Thinning | Sparsifying) -> None:
    if how.steps > 1 or how.train is not None:
        raise RecipeError(
            "a network that is trained in codes is pruned in one step: call prune and finetune in turn, or leave "
            "steps= and train= to the float model"
        )


def _for_channels(sparsity: float | None, rewind: object) -> None:
    if sparsity is not None or rewind is not None:
        raise RecipeError(
            "sparsity= and rewind= are for single weights: structure='unstructured', '2:4' or 'block'; channels take "
            "speedup=, macs=, parameters= or latency="
        )


def _for_weights(structure: str, budgets: Mapping[str, float | None]) -> None:
    given = [name for name, value in budgets.items() if value is not None]
    if given:
        raise RecipeError(
            f"{', '.join(given)}: zeros among weights save no work by themselves; give sparsity= for structure="
            f"{structure!r}, or leave the structure out"
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
    module = as_module(model)
    examples = (example,) if isinstance(example, Tensor) else example
    batches = None
    if data is not None:
        batches = as_batches(data, what="pruning", like=examples, labels=None, batch_size=batch_size)
        examples = examples or batches.peek()[0]
    elif how.sees or repair:
        what = f"criterion {how.criterion!r}" if how.sees else "repair"
        raise DataError(f"{what} has to see data: call prune(model, data=..., ...)")
    examples = examples or getattr(module, "meta", {}).get("example")
    if examples is None:
        raise DataError(
            "pruning follows channels through the model and needs an input: prune(model, example, ...)"
        )
    examples = tuple(x[:_CHECKED] for x in examples)
    gm = standard(module, examples)
    refresh(gm, examples)
    layers = [name for name, _ in gm.named_modules() if name]
    for pattern in how.ignore:
        if not any(fnmatch(layer, pattern) for layer in layers):
            raise RecipeError(f"ignore={pattern!r} matches no layer: {nearest(pattern, layers)}")
    return gm, examples, batches
