"""Rounds the weights of a plan: range estimation, the limits that integer kernels set, the rounding itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fewbit.errors import CalibrationError, FewbitError
from fewbit.model.simulate import FakeQuantize
from fewbit.model.sites import WEIGHTED, Placement, rescale_factor
from fewbit.model.zeros import keep_zeros, sparse_names
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.observers import make_observer
from fewbit.plan import Plan, Recipe, Row
from fewbit.rounding import round_weight
from fewbit.statistics import Statistics
from fewbit.targets import Target

Limit = Callable[[Tensor, Tensor, Tensor, Scheme], tuple[Tensor, Tensor]]
_BIAS_BITS = 23  # a bias of more bits would no longer be exact in the float32 step of requantization


def weight_limits(
    gm: GraphModule, recipe: Recipe, placement: Placement, codings: dict[Node, FakeQuantize], runtime: Target
) -> dict[str, Limit]:
    """By layer, how its weights' ranges must be widened for the integer kernel that will run it."""
    limits: dict[str, Limit] = {}
    for node, form in (*placement.forms.items(), *placement.dynamic.items()):
        if form.kind not in WEIGHTED:
            continue
        module = gm.get_submodule(str(node.target))
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        # ONNX Runtime's kernel for 2-d depthwise convolutions adds in 32 bits.
        depthwise = (
            isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels
        )
        scale = None
        if node in placement.forms:
            scale = _input_scale(form.inputs[0], gm, codings)
        limits[str(node.target)] = _limit(module.bias, scale, runtime, recipe.portable and not depthwise)
    return limits


def _limit(bias: Tensor | None, scale: float | None, runtime: Target, portable: bool) -> Limit:
    def widen(weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        if portable:
            lo, hi = runtime.portable_bounds(weight, lo, hi, scheme)
        if bias is not None and scale is not None and scheme.granularity != "group":
            # A nearly dead channel has tiny weights and an ordinary bias, which must fit the accumulator.
            least = bias.detach().abs() / (scale * 2.0**_BIAS_BITS) / (scheme.spec.unit or 1.0)
            least = least if scheme.granularity == "channel" else least.max().reshape(1)
            if scheme.symmetric:
                lo, hi = torch.minimum(lo, -least * scheme.qmax), torch.maximum(hi, least * scheme.qmax)
            else:
                hi = torch.maximum(hi, lo + least * (scheme.qmax - scheme.qmin))
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


def round_weights(
    gm: GraphModule, plan: Plan, limits: dict[str, Limit], statistics: Statistics
) -> dict[str, QTensor]:
    """Every weight of the plan rounded, and its new values written into the graph; by site."""
    qtensors: dict[str, QTensor] = {}
    sparse = set(sparse_names(gm))
    for row in plan.weights():
        if row.scheme is None:
            continue
        layer, name = row.site.rsplit(".", 1)
        parameter = getattr(gm.get_submodule(layer), name)
        shared = row.shared_with
        q = (
            qtensors[shared]
            if shared in qtensors
            else _round_weight(row, parameter.detach(), limits.get(layer), statistics.of(row.site))
        )
        if row.site in sparse:
            keep_zeros(row.site, parameter.detach(), q.dequantize(), row.scheme.format)
        qtensors[row.site] = q
        with torch.no_grad():
            parameter.copy_(q.dequantize())
    return qtensors


def _round_weight(row: Row, weight: Tensor, limit: Limit | None, statistics: dict[str, Tensor]) -> QTensor:
    assert row.scheme is not None and row.observer is not None and row.rounding is not None
    observer = make_observer(row.observer, row.scheme)
    try:
        lo, hi = observer.bounds_of(weight, statistics)
        if limit is not None:
            lo, hi = limit(weight, lo, hi, row.scheme)
        return round_weight(row.rounding, weight, row.scheme, lo, hi, statistics)
    except FewbitError as error:
        raise CalibrationError(f"{row.site}: {error}") from error


def dead_channels(gm: GraphModule, plan: Plan) -> list[str]:
    """A sentence for each layer with output channels whose weights are all nearly zero (before rounding)."""
    found = []
    for row in plan.weights():
        if row.scheme is None or row.shared_with is not None:
            continue
        layer, name = row.site.rsplit(".", 1)
        weight = getattr(gm.get_submodule(layer), name).detach().movedim(row.scheme.axis, 0).flatten(1)
        largest = weight.abs().amax(dim=1)
        dead = (largest <= largest.max() * 1e-6).nonzero().flatten().tolist()
        if dead:
            listed = ", ".join(map(str, dead[:8])) + (" ..." if len(dead) > 8 else "")
            found.append(
                f"{layer}: {len(dead)} of {len(largest)} channels are dead (all weights nearly zero): {listed}; "
                "they cost time and bytes for nothing"
            )
    return found
