"""Multiply-accumulates, bit operations and activation memory: counts by hand, and torch's own counter."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fewbit.errors import ModelError
from fewbit.evaluation.costs import LayerCost, activation_bits, bits_of, bops, macs
from fewbit.evaluation.memory import activation_peak_bytes
from fewbit.model.graph import refresh

aten = torch.ops.aten


def graph(
    modules: dict[str, nn.Module], build: Callable[[fx.Graph, list[fx.Node]], Any], *inputs: Tensor
) -> fx.GraphModule:
    """A graph in standard form by hand: sizes of its nodes as the reader sets them."""
    g = fx.Graph()
    g.output(build(g, [g.placeholder(f"x{i}") for i in range(len(inputs))]))
    gm = fx.GraphModule(modules, g)
    refresh(gm, inputs)
    return gm


def single(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return graph({"layer": module}, lambda g, x: g.call_module("layer", tuple(x)), *inputs)


def function(
    target: Any, *inputs: Tensor, args: Callable[[list[fx.Node]], tuple[Any, ...]] = tuple
) -> fx.GraphModule:
    return graph({}, lambda g, x: g.call_function(target, args(x)), *inputs)


BY_HAND: dict[str, tuple[fx.GraphModule, str, int, int]] = {
    # 16 x 16 outputs of 8 channels, each a sum of 3 x 3 x 3
    "conv2d": (
        single(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 16, 16)),
        "conv",
        256 * 8 * 27,
        8 * 27 + 8,
    ),
    # stride 2: 8 x 8 outputs
    "strided": (
        single(nn.Conv2d(3, 8, 3, 2, 1, bias=False), torch.zeros(1, 3, 16, 16)),
        "conv",
        64 * 8 * 27,
        216,
    ),
    "depthwise": (
        single(nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.zeros(1, 6, 4, 4)),
        "conv",
        16 * 6 * 9,
        60,
    ),
    "grouped": (
        single(nn.Conv2d(6, 4, (1, 3), groups=2), torch.zeros(1, 6, 4, 6)),
        "conv",
        4 * 4 * 4 * 3 * 3,
        40,
    ),
    "conv1d": (single(nn.Conv1d(2, 5, 4), torch.zeros(1, 2, 10)), "conv", 7 * 5 * 2 * 4, 45),
    "conv3d": (single(nn.Conv3d(2, 5, 2), torch.zeros(1, 2, 3, 3, 3)), "conv", 8 * 5 * 2 * 8, 85),
    # every input number meets out_channels / groups x kernel weights
    "transposed": (
        single(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.zeros(1, 4, 5, 5)),
        "conv_transpose",
        25 * 4 * 3 * 9,
        4 * 3 * 9 + 6,
    ),
    "linear": (single(nn.Linear(10, 7), torch.zeros(1, 10)), "linear", 70, 77),
    "linear on a sequence": (single(nn.Linear(10, 7), torch.zeros(1, 5, 10)), "linear", 350, 77),
    # 4 gates of 6 units see 3 inputs and 6 states, at each of 5 steps
    "lstm": (
        single(nn.LSTM(3, 6, batch_first=True), torch.zeros(1, 5, 3)),
        "lstm",
        5 * 4 * 6 * (3 + 6),
        4 * 6 * (3 + 6 + 2),
    ),
    # two directions; the second layer sees both; a projection of 6 to 2 makes the state
    "lstm, deep and projected": (
        single(nn.LSTM(3, 6, 2, batch_first=True, bidirectional=True, proj_size=2), torch.zeros(1, 5, 3)),
        "lstm",
        5 * 2 * ((24 * (3 + 2) + 12) + (24 * (4 + 2) + 12)),
        2 * ((24 * (3 + 2 + 2) + 12) + (24 * (4 + 2 + 2) + 12)),
    ),
    "gru": (single(nn.GRU(3, 6), torch.zeros(5, 1, 3)), "gru", 5 * 3 * 6 * 9, 3 * 6 * 11),
    "embedding": (single(nn.Embedding(9, 4), torch.zeros(1, 5, dtype=torch.int64)), "embedding", 0, 36),
    "batch norm": (single(nn.BatchNorm2d(3), torch.zeros(1, 3, 2, 2)), "batchnorm2d", 0, 6),
    "matmul": (
        function(aten.matmul.default, torch.zeros(1, 4, 3, 5), torch.zeros(5, 7)),
        "matmul",
        4 * 3 * 7 * 5,
        0,
    ),
    "bmm": (function(aten.bmm.default, torch.zeros(1, 3, 5), torch.zeros(1, 5, 7)), "matmul", 105, 0),
    "addmm": (
        function(aten.addmm.default, torch.zeros(1, 7), torch.zeros(1, 5), torch.zeros(5, 7)),
        "matmul",
        35,
        0,
    ),
    "conv with weights as input": (
        function(aten.conv2d.default, torch.zeros(1, 3, 8, 8), torch.zeros(5, 3, 3, 3)),
        "conv",
        36 * 5 * 27,
        0,
    ),
    # 2 heads, 4 queries, 6 keys of 5, values of 3
    "attention": (
        function(
            aten.scaled_dot_product_attention.default,
            torch.zeros(1, 2, 4, 5),
            torch.zeros(1, 2, 6, 5),
            torch.zeros(1, 2, 6, 3),
        ),
        "sdpa",
        2 * 4 * 6 * (5 + 3),
        0,
    ),
    "einsum": (
        function(
            aten.einsum.default,
            torch.zeros(1, 4, 5),
            torch.zeros(5, 7),
            args=lambda x: ("...ij, jk -> ...ik", x),
        ),
        "einsum",
        4 * 5 * 7,
        0,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_layer_by_hand(name: str) -> None:
    gm, op, count, params = BY_HAND[name]
    (cost,) = macs(gm)
    assert (cost.op, cost.macs, cost.params) == (op, count, params)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = nn.Linear(4, 10)


def _small(g: fx.Graph, x: list[fx.Node]) -> fx.Node:
    node = g.call_module("conv", (x[0],))
    node = g.call_function(aten.relu.default, (node,))
    node = g.call_module("up", (g.call_module("depthwise", (node,)),))
    return g.call_module("head", (g.call_function(aten.mean.dim, (node, [2, 3])),))


def test_a_network_agrees_with_torchs_flop_counter_at_any_batch_size() -> None:
    net = Small()
    modules = dict(net.named_children())
    for batch in (1, 5):
        x = torch.zeros(batch, 3, 12, 12)
        gm = graph(modules, _small, x)
        with FlopCounterMode(display=False) as counter:
            gm(x)
        costs = macs(gm)
        assert sum(each.macs for each in costs) * batch * 2 == counter.get_total_flops()
        assert sum(each.params for each in costs) == sum(p.numel() for p in net.parameters())
        assert [each.layer for each in costs] == ["conv", "depthwise", "up", "head"]


def test_shared_parameters_count_once_and_calls_count_twice() -> None:
    layer = nn.Linear(4, 4)

    def twice(g: fx.Graph, x: list[fx.Node]) -> fx.Node:
        return g.call_module("tied", (g.call_module("a", (g.call_module("a", (x[0],)),)),))

    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    costs = macs(graph({"a": layer, "tied": tied}, twice, torch.zeros(1, 4)))
    assert costs == [
        LayerCost("a", "linear", 16, 20),
        LayerCost("a", "linear", 16, 0),
        LayerCost("tied", "linear", 16, 4),
    ]


def test_a_parameter_outside_layers_counts() -> None:
    root = nn.Module()
    root.gamma = nn.Parameter(torch.ones(3))
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(g.call_function(aten.mul.Tensor, (x, g.get_attr("gamma"))))
    gm = fx.GraphModule(root, g)
    refresh(gm, (torch.zeros(2, 3),))
    assert macs(gm) == [LayerCost("gamma", "parameter", 0, 3)]


def test_bit_operations() -> None:
    costs = [LayerCost("a", "conv", 100, 1), LayerCost("b", "linear", 10, 1), LayerCost("norm", "x", 0, 1)]
    found = bops(costs, {"a": (4, 8)})
    assert [(each.layer, each.bops) for each in found] == [("a", 100 * 4 * 8), ("b", 10 * 32 * 32)]


class _Format:
    def __init__(self, bits: int) -> None:
        self.bits = bits


class FakeQuantize(nn.Module):
    """Stands for the quantize-dequantize step, of which only the scheme's bits matter here."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.scheme = type("Scheme", (), {"spec": _Format(bits)})

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_bits_are_those_of_the_codes_that_reach_a_layer() -> None:
    def build(g: fx.Graph, x: list[fx.Node]) -> fx.Node:
        first = g.call_module("conv", (g.call_module("quantize_x", (x[0],)),))
        flat = g.call_function(aten.flatten.using_ints, (g.call_module("quantize_conv", (first,)), 1))
        second = g.call_module("integer_linear", (flat,))
        return g.call_module("float_linear", (second,))

    modules: dict[str, nn.Module] = {
        "conv": nn.Conv2d(1, 1, 1),
        "quantize_x": FakeQuantize(8),
        "quantize_conv": FakeQuantize(6),
        "integer_linear": nn.Linear(4, 4),
        "float_linear": nn.Linear(4, 4),
    }
    gm = graph(modules, build, torch.zeros(1, 1, 2, 2))

    class Codes(dict[str, Any]):
        names = dict.keys

    model = nn.Module()
    model.graph = gm
    model.integer = {"conv", "integer_linear"}
    scheme = type("Q", (), {"scheme": type("Scheme", (), {"spec": _Format(4)})})
    model.qtensors = Codes({"conv.weight": scheme, "integer_linear.weight": scheme})  # type: ignore[assignment]
    # The convolution's output is stored as codes, and the flattened ones are the same; the rest is float.
    assert activation_bits(model) == {
        "x0": 8,
        "quantize_x": 8,
        "conv": 6,
        "quantize_conv": 6,
        "flatten_using_ints": 6,
    }
    assert activation_peak_bytes(gm, activation_bits(model)).nbytes == 4 * (
        4 + 4
    )  # both linear layers' outputs
    bits = bits_of(model)
    assert bits["conv"] == (4, 8) and bits["integer_linear"] == (4, 6) and bits["float_linear"] == (32, 32)
    assert bits_of(nn.Linear(1, 1)) == activation_bits(nn.Linear(1, 1)) == {}


def test_a_graph_without_sizes_is_refused() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ModelError, match="node 'input_1' has no shape: count a graph that fewbit has read"):
        macs(gm)
    with pytest.raises(ModelError, match="node 'input_1' has no shape"):
        activation_peak_bytes(gm)


def test_activation_peak_of_a_chain_and_of_a_residual() -> None:
    def chain(g: fx.Graph, x: list[fx.Node]) -> fx.Node:
        a = g.call_module("wide", (x[0],))
        return g.call_module("narrow", (g.call_function(aten.relu.default, (a,)),))

    layers: dict[str, nn.Module] = {"wide": nn.Linear(10, 100), "narrow": nn.Linear(100, 10)}
    x = torch.zeros(1, 10)
    peak = activation_peak_bytes(graph(layers, chain, x))
    assert (peak.nbytes, peak.node) == (4 * 200, "relu_default")  # wide and relu's output
    assert activation_peak_bytes(graph(layers, chain, x), bits=8).nbytes == 200
    assert activation_peak_bytes(graph(layers, chain, x), bits=3).nbytes == 2 * 38  # each rounded up to bytes
    assert activation_peak_bytes(graph(layers, chain, x), bits={"wide": 8}).nbytes == 100 + 400

    def residual(g: fx.Graph, x: list[fx.Node]) -> fx.Node:
        a = g.call_module("wide", (x[0],))
        a = g.call_function(aten.relu.default, (a,))
        return g.call_function(aten.add.Tensor, (g.call_module("narrow", (a,)), x[0]))

    peak = activation_peak_bytes(graph(layers, residual, x))
    assert (peak.nbytes, peak.node) == (4 * 210, "relu_default")  # the input waits for the addition


def test_views_take_no_memory_and_keep_their_source_alive() -> None:
    def build(g: fx.Graph, x: list[fx.Node]) -> fx.Node:
        a = g.call_function(aten.relu.default, (x[0],))
        view = g.call_function(aten.reshape.default, (a, [100]))
        other = g.call_function(aten.sum.default, (x[0],))
        return g.call_function(aten.add.Tensor, (view, other))

    peak = activation_peak_bytes(graph({}, build, torch.zeros(4, 25)))
    assert (peak.nbytes, peak.node) == (4 * 201, "sum_default")


def test_the_parts_of_a_tuple_are_its_size() -> None:
    def build(g: fx.Graph, x: list[fx.Node]) -> fx.Node:
        out = g.call_module("lstm", (x[0],))
        return g.call_function(operator.getitem, (out, 0))

    gm = graph({"lstm": nn.LSTM(3, 6, batch_first=True)}, build, torch.zeros(1, 5, 3))
    assert activation_peak_bytes(gm).nbytes == 4 * (15 + 30)


def test_numbers_that_only_compute_sizes_take_no_memory() -> None:
    def build(g: fx.Graph, x: list[fx.Node]) -> fx.Node:
        size = g.call_function(aten.sym_size.int, (x[0], 0))
        return g.call_function(aten.reshape.default, (x[0], [g.call_function(operator.mul, (size, 2)), -1]))

    assert activation_peak_bytes(graph({}, build, torch.zeros(3, 4))).nbytes == 4 * 12
