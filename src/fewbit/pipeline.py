"""The main job, step by step: read, normalise, plan, calibrate, round, and hand out a model that answers as deployed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fewbit.calibrate import calibrate
from fewbit.data import Batches, as_batches
from fewbit.errors import CalibrationError, DataError, FewbitError, ModelError
from fewbit.model.integer_forms import FIXED_UNIT
from fewbit.model.lowering import lower
from fewbit.model.readers.torch import read
from fewbit.model.simulate import FakeQuantize, QuantizedModel, insert_dynamic, insert_quantizer
from fewbit.model.sites import WEIGHTED, Placement, display_name, find_sites, place, rescale_factor
from fewbit.model.ties import separate_ties
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, qparams
from fewbit.observers import make_observer, observer_names
from fewbit.passes import run as run_pass
from fewbit.plan import Plan, Recipe, Row, resolve
from fewbit.rounding import round_weight, rounding_names
from fewbit.targets import Target, adapt_and_check, get_target


def quantize(
    model: nn.Module,
    calibration: object = None,
    *,
    example: Tensor | tuple[Tensor, ...] | None = None,
    recipe: Recipe | str | Path = "int8",
    target: str = "onnx",
    batch_size: int = 64,
    **overrides: Any,
) -> QuantizedModel:
    """A quantized copy of ``model`` that answers as the deployed file will.

    ``model``: an ``nn.Module`` (left as it is) or a graph that ``fewbit.load`` gave. ``calibration``: a few hundred
    typical inputs without labels: tensor, array, iterable of batches, ``Dataset``, ``DataLoader``, ``.npy`` or ``.npz``
    path; needed where activations are quantized statically. ``example``: one input (or a tuple of them), by default the
    first calibration batch. ``recipe``: a preset's name, a TOML file or a ``Recipe``; further keywords replace its
    values, as in ``quantize(model, data, weights="int4", equalize=True)``. ``target``: the runtime it is meant for.

    Raises ``ModelError``, ``DataError``, ``CalibrationError``, ``RecipeError`` or ``PlanError``, by layer name.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    chosen = chosen.replace(**overrides) if overrides else chosen
    chosen.validate(observer_names(), rounding_names())
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    examples = _as_tuple(example)
    batches = None
    if calibration is not None:
        batches = as_batches(calibration, what="calibration", like=examples, labels=False, batch_size=batch_size)
        examples = examples or batches.peek()[0]
    if examples is None:
        raise DataError(
            f"recipe {chosen.name!r} needs calibration data, or an example input where it is dynamic or weight-only: "
            "call quantize(model, calibration=data) or quantize(model, example=x, ...)"
        )
    gm = model if isinstance(model, GraphModule) else read(model, examples)
    gm.eval()
    return _quantize(gm, chosen, batches, examples, target)


def _quantize(
    gm: GraphModule, recipe: Recipe, batches: Batches | None, example: tuple[Tensor, ...], target: str
) -> QuantizedModel:
    run_pass("fold_batch_norm", gm, example)
    if recipe.equalize:
        run_pass("equalize", gm, example)
    runtime = get_target(target)
    placement = place(gm, recipe.mode)
    plan = resolve(recipe, find_sites(gm, placement))
    plan = adapt_and_check(plan, runtime, target)
    if placement.born and batches is None:
        raise CalibrationError(
            f"recipe {recipe.name!r} quantizes activations statically and needs calibration data: "
            'call quantize(model, calibration=data), or use activations="dynamic"'
        )
    codings = _activation_codings(gm, placement, plan, batches)
    qtensors = _round_weights(gm, plan, _weight_limits(gm, recipe, placement, codings, runtime))
    for node, quantizer in codings.items():
        insert_quantizer(gm, node, quantizer)
    for node in placement.dynamic:
        insert_dynamic(gm, node)
    gm.recompile()
    integer = frozenset(n.name for n in (*placement.forms, *placement.dynamic))
    model = QuantizedModel(gm, plan, qtensors, integer, example, target)
    separate_ties(model)
    return model


def _as_tuple(example: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    return (example,) if isinstance(example, Tensor) else example


def site_name(node: Node, placement: Placement) -> str:
    """The plan's name of the codes born at a node."""
    if node.op == "placeholder":
        return display_name(node)
    owner = next((n for n, carrier in placement.carrier.items() if carrier is node and n in placement.forms), node)
    return f"{display_name(owner)}.output"


def _activation_codings(
    gm: GraphModule, placement: Placement, plan: Plan, batches: Batches | None
) -> dict[Node, FakeQuantize]:
    rows = {node: plan.row(site_name(node, placement)) for node in placement.born}
    rows = {node: row for node, row in rows.items() if row.scheme is not None}
    observers = {
        node: (row.site, make_observer(row.observer, row.scheme))
        for node, row in rows.items()
        if row.observer is not None and row.scheme is not None
    }
    if observers and batches is not None:
        calibrate(gm, batches, observers)
    quantizers = {}
    for node, row in rows.items():
        assert row.scheme is not None
        if node in observers:
            try:
                scale, zero_point = qparams(*observers[node][1].bounds(), row.scheme)
            except FewbitError as error:
                raise CalibrationError(f"{row.site}: {error}") from error
        else:
            scale, zero_point = fixed_coding(row.scheme)
        quantizers[node] = FakeQuantize(row.scheme, scale, zero_point)
    return quantizers


def fixed_coding(scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an output in [0, 1] (softmax, sigmoid)."""
    if scheme.qmin < 0:
        return torch.tensor([1.0 / scheme.qmax]), torch.zeros(1, dtype=torch.int32)
    return torch.tensor([FIXED_UNIT * 256 / (scheme.qmax + 1)]), torch.zeros(1, dtype=torch.int32)


Limit = Callable[[Tensor, Tensor, Tensor, Scheme], tuple[Tensor, Tensor]]
_BIAS_BITS = 23  # a bias of more bits would no longer be exact in the float32 step of requantization


def _weight_limits(
    gm: GraphModule, recipe: Recipe, placement: Placement, codings: dict[Node, FakeQuantize], runtime: Target
) -> dict[str, Limit]:
    """By layer, how its weights' ranges must be widened for the integer kernel that will run it."""
    limits: dict[str, Limit] = {}
    for node, form in (*placement.forms.items(), *placement.dynamic.items()):
        if form.kind not in WEIGHTED:
            continue
        module = gm.get_submodule(str(node.target))
        depthwise = getattr(module, "groups", 1) == module.weight.shape[0] > 1 and module.weight.shape[1] == 1
        scale = None
        if node in placement.forms:
            scale = _input_scale(form.inputs[0], gm, codings)
        limits[str(node.target)] = _limit(module.bias, scale, runtime, recipe.portable and not depthwise)
    return limits


def _limit(bias: Tensor | None, scale: float | None, runtime: Target, portable: bool) -> Limit:
    def widen(weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        if portable:
            lo, hi = runtime.portable_bounds(weight, lo, hi, scheme)
        if bias is not None and scale is not None and scheme.symmetric:
            # A nearly dead channel has tiny weights and an ordinary bias, which must fit the accumulator.
            least = bias.detach().abs() / (scale * 2.0**_BIAS_BITS) * scheme.qmax
            least = least if scheme.granularity == "channel" else least.max().reshape(1)
            if scheme.granularity != "group":
                lo, hi = torch.minimum(lo, -least), torch.maximum(hi, least)
        return lo, hi

    return widen


def _input_scale(node: Node, gm: GraphModule, codings: dict[Node, FakeQuantize]) -> float:
    """The scale of the codes that a node will see."""
    factor = 1.0
    while node not in codings:
        factor *= rescale_factor(node, gm) or 1.0
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return float(codings[node].scale) * factor


def _round_weights(gm: GraphModule, plan: Plan, limits: dict[str, Limit]) -> dict[str, QTensor]:
    qtensors: dict[str, QTensor] = {}
    for row in plan.weights():
        if row.scheme is None:
            continue
        layer, name = row.site.rsplit(".", 1)
        parameter = getattr(gm.get_submodule(layer), name)
        shared = row.shared_with
        q = qtensors[shared] if shared in qtensors else _round_weight(row, parameter.detach(), limits.get(layer))
        qtensors[row.site] = q
        with torch.no_grad():
            parameter.copy_(q.dequantize())
    return qtensors


def _round_weight(row: Row, weight: Tensor, limit: Limit | None) -> QTensor:
    assert row.scheme is not None and row.observer is not None and row.rounding is not None
    observer = make_observer(row.observer, row.scheme)
    try:
        observer.update(weight)
        lo, hi = observer.bounds()
        if limit is not None:
            lo, hi = limit(weight, lo, hi, row.scheme)
        return round_weight(row.rounding, weight, row.scheme, lo, hi)
    except FewbitError as error:
        raise CalibrationError(f"{row.site}: {error}") from error


__all__ = ["lower", "quantize"]
