"""What the graph that is read looks like: names, fused biases, free sizes, shared weights, notes; and its proof."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from onnx_made import made, saved
from torch import fx, nn

from fewbit.errors import ModelError
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_convert import OPERATORS
from fewbit.model.onnx_names import dotted, identifier, layer_name, scope
from fewbit.model.readers.onnx import read_file

N = helper.make_node


def _f(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _targets(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op in ("call_module", "call_function")]


@pytest.mark.parametrize(
    ("node", "op", "weight", "bias", "expected"),
    [
        ("/layer1/layer1.0/conv1/Conv", "Conv", "layer1.0.conv1.weight", "", "layer1.0.conv1"),
        ("/layer1/layer1.0/conv1/Conv", "Conv", "onnx::Conv_43", "onnx::Conv_44", "layer1.0.conv1"),
        ("/fc/MatMul", "MatMul", "onnx::MatMul_7", "fc.bias", "fc"),
        ("node_Conv_12", "Conv", "stem.weight", "stem.bias", "stem"),
        ("conv1/Conv", "Conv", "conv1.weight", "", "conv1"),
        (
            "sequential/conv2d/BiasAdd",
            "Conv",
            "sequential/conv2d/Conv2D/ReadVariableOp:0",
            "",
            "sequential.conv2d.BiasAdd",
        ),
        ("model/dense/MatMul", "MatMul", "model/dense/kernel:0", "", "model.dense"),
        ("", "Gemm", "W", "", "W"),
        ("/attn/MatMul", "MatMul", "attn.in_proj_weight", "", "attn.in_proj"),
        ("42", "Conv", "17", "", "42"),
    ],
)
def test_the_name_of_a_layer(node: str, op: str, weight: str, bias: str, expected: str) -> None:
    assert layer_name(node, op, weight, bias) == expected


def test_the_names_of_functions_and_inputs() -> None:
    assert scope("/layer1/layer1.0/relu/Relu", "Relu") == "layer1.0.relu"
    assert scope("/layer1/layer1.0/relu/Relu_1", "Relu") == "layer1.0.relu"
    assert scope("/layer1/layer1.0/Add", "Add") == "layer1.0.add"
    assert scope("node_add_35", "Add") == "add_35"
    assert dotted("a//b c/../d:0") == "a.b_c.d_0"
    assert [identifier(n) for n in ("input_1:0", "0x", "class", "self", "")] == [
        "input_1_0", "input_0x", "class_", "self_", "input"
    ]  # fmt: skip


def test_inputs_keep_their_names(tmp_path: Path) -> None:
    model = made([N("Add", ["serving:0", "mask"], ["y"])], {"serving:0": ("N", 3), "mask": ("N", 3)}, ["y"])
    gm = read_file(saved(model, tmp_path))
    assert list(gm.meta["dynamic"]) == ["serving_0", "mask"]


def test_a_bias_that_is_added_afterwards_belongs_to_the_layer(tmp_path: Path) -> None:
    nodes = [
        N("Conv", ["x", "w"], ["a"], name="conv"),
        N("Add", ["b", "a"], ["c"], name="shift"),
        N("Flatten", ["c"], ["d"]),
        N("MatMul", ["d", "m"], ["e"], name="fc"),
        N("Add", ["e", "k"], ["y"]),
    ]
    constants = {"w": _f(5, 3, 1, 1), "b": _f(1, 5, 1, 1), "m": _f(5 * 25, 4), "k": _f(4)}
    gm = read_file(saved(made(nodes, {"x": ("N", 3, 5, 5)}, ["y"], constants), tmp_path))
    assert torch.ops.aten.add.Tensor not in [n.target for n in gm.graph.nodes]
    layers = [m for m in gm.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [layer.bias.tolist() for layer in layers] == [_f(5).tolist(), _f(4).tolist()]


@pytest.mark.parametrize("shape", [(5,), (1, 1, 1, 5), (5, 1), (2, 5, 1, 1)])
def test_what_is_added_along_another_axis_is_no_bias(shape: tuple[int, ...], tmp_path: Path) -> None:
    nodes = [N("Conv", ["x", "w"], ["a"], name="conv"), N("Add", ["a", "b"], ["y"], name="shift")]
    model = made(nodes, {"x": (2, 3, 5, 5)}, ["y"], {"w": _f(5, 3, 1, 1), "b": _f(*shape)})
    gm = read_file(saved(model, tmp_path))
    assert torch.ops.aten.add.Tensor in [n.target for n in gm.graph.nodes]


def test_a_bias_that_is_also_read_elsewhere_is_not_absorbed(tmp_path: Path) -> None:
    nodes = [N("MatMul", ["x", "w"], ["a"], name="fc"), N("Add", ["a", "b"], ["c"]), N("Relu", ["a"], ["d"]),
             N("Add", ["c", "d"], ["y"])]  # fmt: skip
    gm = read_file(saved(made(nodes, {"x": ("N", 6)}, ["y"], {"w": _f(6, 5), "b": _f(5)}), tmp_path))
    assert next(m for m in gm.modules() if isinstance(m, nn.Linear)).bias is None


def test_a_layer_that_is_used_twice_is_one_layer(tmp_path: Path) -> None:
    nodes = [
        N("MatMul", ["x", "w"], ["a"], name="first"),
        N("Relu", ["a"], ["b"]),
        N("MatMul", ["b", "w"], ["y"], name="second"),
    ]
    gm = read_file(saved(made(nodes, {"x": ("N", 6)}, ["y"], {"w": _f(6, 6)}), tmp_path))
    assert len([m for m in gm.modules() if isinstance(m, nn.Linear)]) == 1


def test_constants_are_numbers_or_named_tensors(tmp_path: Path) -> None:
    nodes = [
        N("Mul", ["x", "half"], ["a"]),
        N("Div", ["a", "eight"], ["b"]),
        N("Add", ["b", "places.weight"], ["y"]),
    ]
    constants = {"half": np.float32(0.5), "eight": np.full(1, 8, np.float32), "places.weight": _f(4, 6)}
    gm = read_file(saved(made(nodes, {"x": ("N", 4, 6)}, ["y"], constants), tmp_path))
    numbers = [n.args[1] for n in gm.graph.nodes if n.op == "call_function"][:2]
    assert numbers == [0.5, 8.0]
    assert list(dict(gm.named_parameters())) == ["places_weight"]


def test_arithmetic_of_shapes_is_folded(tmp_path: Path) -> None:
    zero, one = np.array(0), np.array([0])
    nodes = [
        N("Shape", ["x"], ["s"]), N("Gather", ["s", "zero"], ["n"]), N("Unsqueeze", ["n", "front"], ["n1"]),
        N("Gather", ["s", "two"], ["h"]), N("Div", ["h", "pair"], ["h2"]), N("Unsqueeze", ["h2", "front"], ["h3"]),
        N("Concat", ["n1", "h3", "rest"], ["shape"], axis=0), N("Reshape", ["x", "shape"], ["y"]),
    ]  # fmt: skip
    constants = {"zero": zero, "two": np.array(2), "pair": np.array(2), "front": one, "rest": np.array([-1])}
    gm = read_file(saved(made(nodes, {"x": ("N", 3, 8)}, ["y"], constants), tmp_path))
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert len(calls) == 1
    assert calls[0].args[1] == [-1, 4, 6]


def test_free_sizes_that_the_operators_do_not_have_are_told(tmp_path: Path) -> None:
    nodes = [N("Flatten", ["x"], ["a"]), N("MatMul", ["a", "w"], ["y"])]
    model = made(nodes, {"x": ("N", "H", 2)}, ["y"], {"w": _f(32, 3)})
    gm = read_file(saved(model, tmp_path))
    assert gm.meta["dynamic"]["x"][1:] == (16, 2)
    assert any("'x'" in note and "size 1 at 16" in note for note in gm.meta["notes"])


def test_a_negative_size_is_a_free_one(tmp_path: Path) -> None:
    gm = read_file(saved(made([N("Relu", ["x"], ["y"])], {"x": (-1, 3)}, ["y"]), tmp_path))
    assert gm.meta["example"][0].shape == (4, 3)
    assert isinstance(gm.meta["dynamic"]["x"][0], str)


def test_integers_that_are_made_up_fit_the_table(tmp_path: Path) -> None:
    nodes = [N("Cast", ["i"], ["j"], to=7), N("Gather", ["table", "j"], ["y"])]
    model = made(nodes, {"i": ("N", 300)}, ["y"], {"table": _f(3, 4)}, types={"i": "int32"})
    example = read_file(saved(model, tmp_path)).meta["example"][0]
    assert example.dtype == torch.int32
    assert set(example.unique().tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("scale", "zero", "limits"), [(6 / 255, 0, (0.0, 6.0)), (2 / 255, 128, (-1.0, 1.0))])
def test_an_activation_that_a_quantizer_left_out_comes_back(
    scale: float, zero: int, limits: tuple[float, float], tmp_path: Path
) -> None:
    nodes = [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["y"])]
    model = made(nodes, {"x": ("N", 6)}, ["y"], {"s": np.float32(scale), "z": np.uint8(zero)})
    x = torch.randn(5, 6) * 9
    torch.testing.assert_close(read_file(saved(model, tmp_path))(x), x.clamp(*limits))


def test_a_graph_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(c: Call) -> Any:
        return c.apply(F.silu, c[0])

    path = saved(made([N("Relu", ["x"], ["y"])], {"x": ("N", 3)}, ["y"]), tmp_path)
    monkeypatch.setitem(OPERATORS, "Relu", wrong)
    with pytest.raises(ModelError, match="differs from ONNX Runtime's result"):
        read_file(path)


@pytest.mark.parametrize("wrong", [False, True])
def test_rounding_where_large_numbers_cancel_is_no_difference(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum of 4000 large numbers less the same sum in another order: float32 leaves few digits of the rest."""
    weight = np.abs(_f(4000))
    nodes = [
        N("MatMul", ["x", "w"], ["a"]), N("Gather", ["x", "order"], ["turned"], axis=1),
        N("MatMul", ["turned", "v"], ["b"]), N("Sub", ["a", "b"], ["c"]), N("Add", ["c", "rest"], ["y"]),
    ]  # fmt: skip
    order = np.random.default_rng(1).permutation(4000)
    constants = {"w": weight[:, None], "v": weight[order][:, None], "order": order, "rest": np.float32(0.5)}
    path = saved(made(nodes, {"x": ("N", 4000)}, ["y"], constants), tmp_path)
    if wrong:
        monkeypatch.setitem(OPERATORS, "Sub", lambda c: c.apply(lambda a, b: a - b + 0.01, c[0], c[1]))
        with pytest.raises(ModelError, match="differs from ONNX Runtime's result"):
            read_file(path)
    else:
        assert any("cancel" in note for note in read_file(path).meta["notes"])


def test_several_outputs_are_a_tuple_in_the_files_order(tmp_path: Path) -> None:
    nodes = [N("Relu", ["x"], ["b"]), N("Sigmoid", ["x"], ["a"]), N("Shape", ["x"], ["s"])]
    gm, x = read_file(saved(made(nodes, {"x": ("N", 3)}, ["a", "b", "s"]), tmp_path)), torch.randn(7, 3)
    a, b, s = gm(x)
    torch.testing.assert_close((a, b), (torch.sigmoid(x), x.relu()))
    assert s.tolist() == [7, 3]


def test_sigmoids_times_their_inputs_are_one_function(tmp_path: Path) -> None:
    nodes = [
        N("Sigmoid", ["x"], ["a"]), N("Mul", ["a", "x"], ["b"], name="swish"),
        N("HardSigmoid", ["b"], ["c"], alpha=1 / 6, beta=0.5), N("Mul", ["b", "c"], ["d"], name="hard"),
        N("Sigmoid", ["d"], ["e"]), N("Mul", ["e", "x"], ["y"], name="gate"),
    ]  # fmt: skip
    gm = read_file(saved(made(nodes, {"x": ("N", 3)}, ["y"]), tmp_path))
    aten = torch.ops.aten
    called = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert called == [aten.silu.default, aten.hardswish.default, aten.sigmoid.default, aten.mul.Tensor]


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("parts", [0, 1, 2])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_layer_norm_in_pieces_is_one_layer(opset: int, parts: int, square: str, tmp_path: Path) -> None:
    axes: Any = ([], {"axes": [-1]}) if opset < 18 else (["last"], {})
    nodes = [
        N("ReduceMean", ["x", *axes[0]], ["mean"], **axes[1]), N("Sub", ["x", "mean"], ["d"]),
        N(square, ["d", "d" if square == "Mul" else "two"], ["dd"]),
        N("ReduceMean", ["dd", *axes[0]], ["v"], **axes[1]),
        N("Add", ["v", "eps"], ["ve"]), N("Sqrt", ["ve"], ["s"]), N("Div", ["d", "s"], ["n0"]),
        N("Mul", ["n0", "norm.weight"], ["n1"]), N("Add", ["norm.bias", "n1"], ["n2"]), N("Relu", [f"n{parts}"], ["y"]),
    ]  # fmt: skip
    constants = {"two": np.float32(2), "eps": np.float32(1e-3), "norm.weight": _f(6), "norm.bias": _f(6) + 1}
    constants |= {"last": np.array([-1])} if opset >= 18 else {}
    gm = read_file(saved(made(nodes, {"x": ("N", 4, 6)}, ["y"], constants, opset), tmp_path))
    (norm,) = (m for m in gm.modules() if isinstance(m, nn.LayerNorm))
    assert (norm.weight is not None, norm.bias is not None, norm.eps) == (
        parts > 0,
        parts > 1,
        pytest.approx(1e-3),
    )
    assert len([n for n in gm.graph.nodes if n.op == "call_function"]) == 1


def test_a_quotient_that_is_no_layer_norm_stays_one(tmp_path: Path) -> None:
    nodes = [
        N("ReduceMean", ["x"], ["mean"], axes=[1]), N("Sub", ["x", "mean"], ["d"]), N("Mul", ["d", "d"], ["dd"]),
        N("ReduceMean", ["dd"], ["v"], axes=[-1]), N("Add", ["v", "eps"], ["ve"]), N("Sqrt", ["ve"], ["s"]),
        N("Div", ["d", "s"], ["y"]),
    ]  # fmt: skip
    model = made(nodes, {"x": ("N", 4, 6)}, ["y"], {"eps": np.float32(1e-3)}, 13)
    gm = read_file(saved(model, tmp_path))
    assert not [m for m in gm.modules() if isinstance(m, nn.LayerNorm)]
