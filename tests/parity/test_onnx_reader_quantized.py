"""Quantized ONNX files, ours and ONNX Runtime's: read as float graphs with the weights that the codes stand for."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx_made import answers, made, saved
from torch import Tensor, nn

import fewbit
from fewbit.model.readers.onnx import read_file


class Small(nn.Module):
    """Convolutions with a clamp that quantizers fuse away, a pooled copy of codes, a linear layer."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv1, self.act, self.pool = nn.Conv2d(3, 8, 3, padding=1), activation, nn.MaxPool2d(2)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.conv1(x) * 3))
        return self.fc((self.conv2(x) + x).relu().flatten(1))


def _exported(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(2, 3, 8, 8),),
            path,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )
    return path


def _near(actual: Tensor, expected: Tensor, share: float) -> None:
    assert (actual - expected).norm() <= share * expected.norm()


OURS = [("int8", nn.ReLU()), ("int8", nn.ReLU6()), ("int8", nn.Hardtanh()), ("int8", nn.Hardswish()),
        ("int8-dynamic", nn.ReLU()), ("int4-weights", nn.ReLU6())]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "activation"), OURS, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
def test_our_own_file(recipe: str, activation: nn.Module, tmp_path: Path) -> None:
    module, x = Small(activation).eval(), torch.randn(64, 3, 8, 8)
    quantized = fewbit.quantize(module, x, recipe=recipe, progress=False)
    fewbit.export(quantized, tmp_path / "m.onnx", time=False)
    gm = read_file(tmp_path / "m.onnx")
    _near(gm(x), module(x), 0.15 if "4" in recipe else 0.03)
    record = gm.meta["quantization"]["conv1.weight"]
    codes = (
        gm.get_submodule("conv1").weight.detach() / torch.tensor(record["scale"]).reshape(-1, 1, 1, 1)
    ).numpy()
    np.testing.assert_allclose(codes, codes.round(), atol=1e-3)
    assert record["format"] == ("int4" if "4" in recipe else "int8")
    assert np.abs(codes).max() > (6.5 if "4" in recipe else 62)
    assert not any("quantize" in str(n.target) for n in gm.graph.nodes)
    assert any("rounding of activations" in note for note in gm.meta["notes"])


def test_a_second_quantization_of_our_own_file(tmp_path: Path) -> None:
    module, x = Small(nn.ReLU6()).eval(), torch.randn(64, 3, 8, 8)
    fewbit.export(fewbit.quantize(module, x, progress=False), tmp_path / "m.onnx", time=False)
    again = fewbit.quantize(read_file(tmp_path / "m.onnx"), x, progress=False)
    fewbit.export(again, tmp_path / "again.onnx", time=False)
    _near(again(x), module(x), 0.03)


class _Data:
    def __init__(self) -> None:
        self.items = iter(
            [{"x": np.random.default_rng(i).standard_normal((8, 3, 8, 8), np.float32)} for i in range(8)]
        )

    def get_next(self) -> Any:
        return next(self.items, None)


@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_onnx_runtimes_static_file(kind: str, per_channel: bool, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    module = Small(nn.ReLU()).eval()
    _exported(module, tmp_path / "float.onnx")
    quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "q.onnx", _Data(), quant_format=quantization.QuantFormat[kind],
        per_channel=per_channel,
    )  # fmt: skip
    gm, x = read_file(tmp_path / "q.onnx"), torch.randn(32, 3, 8, 8)
    _near(gm(x), module(x), 0.03)
    record = gm.meta["quantization"]["conv1.weight"]
    assert isinstance(record["scale"], list) == per_channel
    assert (gm.get_submodule("conv1").weight - module.conv1.weight).abs().max() <= 0.51 * np.max(
        record["scale"]
    )


def test_onnx_runtimes_dynamic_file(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    module = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.randn(2, 12),), tmp_path / "f.onnx", dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    quantization.quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx")
    gm, x = read_file(tmp_path / "q.onnx"), torch.randn(32, 12)
    _near(gm(x), module(x), 0.02)
    assert [type(m) for m in gm.modules() if isinstance(m, nn.Linear)] == [nn.Linear] * 2
    assert all(n.target is not torch.ops.aten.mul.Tensor for n in gm.graph.nodes)


def test_quantizers_of_a_weight_are_folded(tmp_path: Path) -> None:
    """Files of quantization-aware training hold float weights, a quantizer and a dequantizer."""
    weight, scale = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32), np.float32(0.11)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["rounded"]),
        helper.make_node("MatMul", ["x", "rounded"], ["y"]),
    ]
    model = made(nodes, {"x": ("n", 6)}, ["y"], {"w": weight, "s": scale, "z": np.int8(3)})
    gm, x = read_file(saved(model, tmp_path)), torch.randn(3, 6)
    codes = np.clip(np.rint(weight / scale) + 3, -128, 127)
    torch.testing.assert_close(gm(x).detach(), x @ torch.from_numpy((codes - 3).astype(np.float32) * scale))
    assert gm.meta["quantization"]["w"] == {
        "scale": pytest.approx(0.11), "zero_point": 3, "format": "int8", "axis": None
    }  # fmt: skip


def test_codes_that_are_read_with_another_scale(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "t", "u"], ["y"]),
    ]
    constants = {"s": np.float32(0.05), "z": np.uint8(120), "t": np.float32(0.1), "u": np.uint8(100)}
    path = saved(made(nodes, {"x": ("n", 6)}, ["y"], constants), tmp_path)
    x = torch.rand(3, 6)
    np.testing.assert_allclose(read_file(path)(x), answers(path, [x])[0], atol=0.051)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_precision_is_read_in_float32(dtype: int, tmp_path: Path) -> None:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weight = np.random.default_rng(0).standard_normal((6, 5)).astype(kind)
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=dtype),
        helper.make_node("MatMul", ["low", "w"], ["product"]),
        helper.make_node("Add", ["product", "half"], ["y"]),
    ]
    constants = {"w": weight, "half": np.full(5, 0.5, kind)}
    model = made(nodes, {"x": ("n", 6)}, ["y"], constants)
    gm, x = read_file(saved(model, tmp_path)), torch.randn(3, 6)
    assert gm(x).dtype == torch.float32
    torch.testing.assert_close(gm(x).detach(), x @ torch.from_numpy(weight).float() + 0.5)


def test_packed_weights_of_four_bits(tmp_path: Path) -> None:
    codes = np.arange(-8, 7).reshape(3, 5)
    stored = helper.make_tensor("w", TensorProto.INT4, (3, 5), codes.reshape(-1))
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["weight"], axis=0, block_size=2),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    scale = np.random.default_rng(0).uniform(0.1, 1, (2, 5)).astype(np.float32)
    model = made(nodes, {"x": ("n", 3)}, ["y"], {"s": scale})
    model.graph.initializer.append(stored)
    gm, x = read_file(saved(model, tmp_path)), torch.randn(3, 3)
    expected = x @ torch.from_numpy((codes * scale[[0, 0, 1]]).astype(np.float32))
    torch.testing.assert_close(gm(x).detach(), expected)
    record = gm.meta["quantization"]["w"]
    assert record["format"] == "int4" and record["block_size"] == 2
