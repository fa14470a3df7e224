"""Errors layer by layer against the definition, over batches, in other node orders, with in-place readers."""

import json
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.evaluation.layers import layer_errors

aten = torch.ops.aten


class Rounded(nn.Module):
    """Rounds to multiples of a step: the quantize-dequantize step of these tests."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x / self.step) * self.step


def networks(step: float = 0.1) -> tuple[fx.GraphModule, fx.GraphModule]:
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {
        "first": nn.Linear(6, 5),
        "second": nn.Linear(5, 3),
        "round": Rounded(step),
    }

    def build(quantized: bool) -> fx.GraphModule:
        g = fx.Graph()
        node = g.call_module("first", (g.placeholder("x"),))
        node.name = "first"
        node = g.call_function(aten.relu.default, (node,))
        if quantized:
            node = g.call_module("round", (node,))
            node.name = "relu_default_quantized"
        node = g.call_module("second", (node,))
        node.name = "second"
        g.output(node)
        return fx.GraphModule(modules, g)

    return build(False), build(True)


def batches(count: int = 3) -> list[tuple[tuple[Tensor, ...], None]]:
    rng = torch.Generator().manual_seed(1)
    return [((torch.randn(4 + i, 6, generator=rng),), None) for i in range(count)]


def test_errors_are_those_of_all_batches_together() -> None:
    left, right = networks()
    found = {each.node: each for each in layer_errors(left, right, batches()).layers}
    x = torch.cat([inputs[0] for inputs, _ in batches()])
    hidden = torch.relu(left.first(x)).double()
    rounded = right.round(hidden.float()).double()
    assert list(found) == ["first", "relu_default", "second"]
    assert found["first"].sqnr_db == math.inf and found["first"].max_abs == 0.0
    expected = 10 * torch.log10(hidden.square().sum() / (hidden - rounded).square().sum())
    assert found["relu_default"].sqnr_db == pytest.approx(expected.item(), rel=1e-6)
    assert found["relu_default"].max_abs == pytest.approx((hidden - rounded).abs().max().item())
    assert found["relu_default"].mean_abs == pytest.approx((hidden - rounded).abs().mean().item())
    a, b = left.second(hidden.float()).double(), left.second(rounded.float()).double()
    expected = 10 * torch.log10(a.square().sum() / (a - b).square().sum())
    assert found["second"].sqnr_db == pytest.approx(expected.item(), rel=1e-4)


def test_worst_come_first_and_everything_prints_and_is_json() -> None:
    errors = layer_errors(*networks(step=0.5), batches())
    assert [each.node for each in errors.worst(2)] == sorted(
        ["relu_default", "second"], key=lambda name: {e.node: e.sqnr_db for e in errors.layers}[name]
    )
    data = json.loads(json.dumps(errors.to_json(), allow_nan=False))
    assert data[0]["sqnr_db"] is None and data[1]["sqnr_db"] == errors.layers[1].sqnr_db
    assert len(str(errors).splitlines()) == 3 and "dB" in str(errors)


def test_names_choose_what_is_compared() -> None:
    left, right = networks()
    raw = layer_errors(left, right, batches(), names={"relu_default": "relu_default"}).layers
    assert [each.node for each in raw] == ["relu_default"] and raw[0].sqnr_db == math.inf
    for names, message in (
        ({"relu": "second"}, "the float graph has no node 'relu' to compare"),
        ({"second": "third"}, "the quantized graph has no node 'third' to compare"),
        ({"first": "second", "second": "second"}, "`names` maps two nodes to the same node"),
        (
            {"first": "second"},
            r"layer 'first' gives shape \(4, 3\) in the quantized graph and \(4, 5\) in the float",
        ),
        ({}, "the float and the quantized graph have no node name in common: pass names"),
    ):
        with pytest.raises(ModelError, match=message):
            layer_errors(left, right, batches(), names=names)
    with pytest.raises(ModelError, match="no layer was compared"):
        layer_errors(left, right, [])


def test_a_failing_layer_is_named() -> None:
    left, right = networks()
    with pytest.raises(ModelError, match="layer 'first' failed: mat1 and mat2 shapes cannot be multiplied"):
        layer_errors(left, right, [((torch.zeros(1, 7),), None)])


def test_another_order_of_independent_nodes_does_not_matter() -> None:
    def build(order: list[str]) -> fx.GraphModule:
        g = fx.Graph()
        x = g.placeholder("x")
        nodes = {}
        for name in order:
            nodes[name] = g.call_function(getattr(aten, name).default, (x,))
            nodes[name].name = name
        g.output((nodes["relu"], nodes["tanh"], nodes["sigmoid"]))
        return fx.GraphModule({}, g)

    left, right = build(["relu", "tanh", "sigmoid"]), build(["sigmoid", "tanh", "relu"])
    errors = layer_errors(left, right, batches())
    assert [each.sqnr_db for each in errors.layers] == [math.inf] * 3


def test_an_in_place_reader_does_not_change_what_is_compared() -> None:
    def build(in_place: bool) -> fx.GraphModule:
        g = fx.Graph()
        x = g.placeholder("x")
        if not in_place:
            relu = g.call_function(aten.relu.default, (x,))
        negative = g.call_function(aten.neg.default, (x,))
        if in_place:
            # The graph that is ahead has overwritten `negative` when it is asked for.
            doubled = g.call_function(aten.mul_.Tensor, (negative, 2.0))
            relu = g.call_function(aten.relu.default, (x,))
        else:
            doubled = g.call_function(aten.mul.Tensor, (negative, 2.0))
        g.output((relu, doubled))
        return fx.GraphModule({}, g)

    errors = layer_errors(build(False), build(True), batches())
    assert [(each.node, each.sqnr_db) for each in errors.layers] == [
        ("relu_default", math.inf),
        ("neg_default", math.inf),
    ]


class Watch(nn.Module):
    """Counts the tensors it has given out that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[weakref.ref[Any]] = []
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        result = x + 1
        self.given.append(weakref.ref(result))
        self.most = max(self.most, sum(each() is not None for each in self.given))
        return result


def test_memory_does_not_grow_with_layers_or_batches() -> None:
    watch = Watch()
    g = fx.Graph()
    node = g.placeholder("x")
    for _ in range(20):
        node = g.call_module("watch", (node,))
    g.output(node)
    gm = fx.GraphModule({"watch": watch}, g)
    layer_errors(gm, gm, batches(4))
    assert len(watch.given) == 2 * 20 * 4
    assert watch.most <= 5


def test_training_modes_are_restored() -> None:
    left, right = networks()
    left.train()
    left.second.eval()
    layer_errors(left, right, batches())
    assert left.training and left.first.training and not left.second.training
