"""The passes that a recipe asks for, in order: before the plan on the float graph, after rounding on the biases."""

import copy
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.data import Batches
from fewbit.errors import CalibrationError, DataError
from fewbit.model.readers.torch import read
from fewbit.passes import run
from fewbit.plan import Recipe

_READ_WITH = 4  # samples that reading and the passes prove themselves on


def standard(model: nn.Module, examples: tuple[Tensor, ...]) -> GraphModule:
    """The model as a graph of our own, in eval mode."""
    few = tuple(x[:_READ_WITH] for x in examples)
    gm = copy.deepcopy(model) if isinstance(model, GraphModule) else read(model, few)
    gm.eval()
    return gm


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
