"""The passes that a recipe asks for, in order: before the plan on the float graph, after rounding on the biases."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.data import Batches
from fewbit.errors import CalibrationError, DataError, ModelError
from fewbit.model.graph import refresh
from fewbit.model.readers import as_module
from fewbit.model.readers.torch import read
from fewbit.model.zeros import SPARSE, sparse_parameters
from fewbit.passes import run
from fewbit.plan import Recipe

_READ_WITH = 4  # samples that reading and the passes prove themselves on


def standard(model: nn.Module, examples: tuple[Tensor, ...]) -> GraphModule:
    """The model as a graph of our own, in eval mode."""
    few = tuple(x[:_READ_WITH] for x in examples)
    gm = copy.deepcopy(model) if isinstance(model, GraphModule) else read(model, few)
    gm.eval()
    return gm


def as_inputs(example: Any) -> tuple[Tensor, ...] | None:
    """An example, or several in a tuple, as tensors of the graph's dtypes: floats in float32."""
    if example is None:
        return None
    each = example if isinstance(example, tuple | list) else (example,)
    tensors = (torch.as_tensor(x).detach().cpu() for x in each)
    return tuple(x.float() if x.is_floating_point() else x for x in tensors)


def as_graph(
    model: Any, example: Any, batches: Batches | None = None
) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """A model as a graph of our own, on the CPU, and a few inputs: those of ``example``, the data, or its own reading.

    Raises ``DataError`` where there are none, ``ModelError`` for what is no model.
    """
    examples = as_inputs(example)
    module = as_module(model, examples)
    if examples is None and batches is not None:
        examples = batches.peek()[0]
    examples = examples or as_inputs(getattr(module, "meta", {}).get("example"))
    if examples is None:
        raise DataError(
            "pruning follows channels through the model and needs an input: prune(model, example, ...), or data=..."
        )
    examples = tuple(x[:_READ_WITH] if x.dim() else x for x in examples)
    gm = standard(module, examples).cpu()
    refresh(gm, examples)
    return gm, examples


def retrained(
    train: Callable[[nn.Module], Any], gm: GraphModule, examples: tuple[Tensor, ...]
) -> GraphModule:
    """What the user's training made of a graph, whose zeros must have stayed; None stands for the graph itself."""
    zeros = {name: parameter == 0 for name, parameter in sparse_parameters(gm).items()}
    names = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    made = train(gm)
    again = standard(gm if made is None else as_module(made), examples).cpu()
    found = dict(again.named_parameters(remove_duplicate=False))
    if found.keys() != names:
        raise ModelError(
            f"train= gave a model without {sorted(names - found.keys())[:3]}: expected the network that it was given, "
            "trained; take it out of what was put around it (.module, ._orig_mod)"
        )
    for name, gone in zeros.items():
        if bool((found[name][gone] != 0).any()):
            raise ModelError(
                f"{name}: training moved zeros away: in a loop of your own, train inside of fewbit.hold_zeros(model)"
            )
    if zeros:
        again.meta[SPARSE] = tuple(zeros)
    return again


def moves_weights(recipe: Recipe) -> bool:
    """Whether a pass of the recipe changes weights beyond the folding of batch norms."""
    return bool(recipe.equalize or recipe.absorb_bias) or recipe.smooth_quant is not False


def normalised(model: nn.Module, examples: tuple[Tensor, ...], recipe: Recipe) -> GraphModule:
    """The model as a graph of our own, in eval mode, batch norm folded, weights equalized if the recipe says so."""
    few = tuple(x[:_READ_WITH] for x in examples)
    gm = standard(model, examples)
    run("fold_batch_norm", gm, few)
    if recipe.equalize:
        run("equalize", gm, few)
    return gm


def adapted_to_data(
    gm: GraphModule, examples: tuple[Tensor, ...], recipe: Recipe, batches: Batches | None
) -> list[str]:
    """The passes that look at calibration data, in place; what they did. They change values, and never the plan."""
    few = tuple(x[:_READ_WITH] for x in examples)
    notes: list[str] = []
    if recipe.smooth_quant is not False:
        if batches is None:
            raise CalibrationError(
                f"recipe {recipe.name!r}: smooth_quant measures the layers' inputs: give calibration data"
            )
        alpha = 0.5 if recipe.smooth_quant is True else float(recipe.smooth_quant)
        notes += run("smooth_quant", gm, few, batches=_inputs(batches, "smooth_quant"), alpha=alpha)
    if recipe.absorb_bias:
        inputs = None if batches is None else _inputs(batches, "absorb_bias")
        notes += run("absorb_bias", gm, few, batches=inputs)
    return notes


def corrected(
    float_gm: GraphModule,
    gm: GraphModule,
    layers: Sequence[str],
    recipe: Recipe,
    batches: Batches | None,
    examples: tuple[Tensor, ...],
) -> list[str]:
    """Bias correction as the recipe says: on the calibration data, or the example without any; or from batch norms."""
    few = tuple(x[:_READ_WITH] for x in examples)
    if recipe.bias_correction == "analytic":
        return run("analytic_bias_correction", gm, few, reference=float_gm, layers=layers)
    inputs = [examples] if batches is None else _inputs(batches, "bias_correction")
    return run("bias_correction", gm, few, reference=float_gm, batches=inputs, layers=layers)


def _inputs(batches: Batches, purpose: str) -> "_InputsOnly":
    if batches.one_shot:
        raise DataError(
            f"{purpose} reads the calibration data several times, and a generator can be read once: "
            "give a list, a DataLoader or arrays instead"
        )
    return _InputsOnly(batches)


class _InputsOnly:
    """Batches without their labels, readable again and again."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (inputs for inputs, _ in self.batches)
