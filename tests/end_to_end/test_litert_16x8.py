"""16-bit activations with 8-bit weights in LiteRT, end to end: exact from the file alone, and nearly float."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

import fewbit
from fewbit.errors import ArtifactError, PlanError, TargetError, VerificationError
from fewbit.model.lowering import lower
from fewbit.targets import get_target
from fewbit.targets._litert.model import load


class Residual(nn.Module):
    """Convolutions with a residual sum, a depthwise one, pooling, concatenation, a mean and a linear layer."""

    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.last = nn.Linear(16, 10)
        self.end = end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        b = torch.nn.functional.leaky_relu(a + self.second(a), 0.1)
        c = torch.nn.functional.relu6(self.depthwise(torch.nn.functional.max_pool2d(b, 2)))
        d = torch.nn.functional.avg_pool2d(c * c, 2)
        e = torch.cat([d, torch.nn.functional.max_pool2d(c, 2)], 1)
        return self.end(self.last(e.mean((2, 3))))


def network(end: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return Residual(end).eval()


def quantized(net: nn.Module, **options: Any) -> Any:
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {"activations": "int16"} | options
    return fewbit.quantize(net, x, target="litert", progress=False, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, path = quantized(network()), tmp_path_factory.mktemp("wide") / "net.tflite"
    fewbit.export(model, path, time=False)
    return model, path


def test_every_code_is_the_references(written: tuple[Any, Path]) -> None:
    """From the file alone, on inputs up to the ends of its range and beyond."""
    _, path = written
    x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 3
    check = fewbit.verify(path, x)
    assert check.whole_network == "bit for bit" and check.output_differing == 0
    assert sum(layer.differing for layer in check.layers) == 0
    assert {layer.kind for layer in check.layers} >= {
        "conv",
        "linear",
        "add",
        "mul",
        "avg_pool",
        "leaky_relu",
    }


def test_the_file_holds_16_bit_codes_and_64_bit_biases(written: tuple[Any, Path]) -> None:
    model = load(written[1])
    computed = {t.kind for t in model.tensors if t.data is None}
    assert computed == {"FLOAT32", "INT16"}
    assert not any(t.zero_points.any() for t in model.tensors)
    assert {t.kind for t in model.tensors if t.name.endswith("/bias")} == {"INT64"}
    assert {t.kind for t in model.tensors if t.name.endswith("/weight")} == {"INT8"}
    assert [op.name for op in model.operators].count("DEQUANTIZE") == 1  # at the end


def test_far_nearer_to_float_than_8_bits(written: tuple[Any, Path], tmp_path: Path) -> None:
    """Float weights on the 8-bit grid, so that only the activations' rounding is left."""
    net = network()
    for layer in (net.first, net.second, net.depthwise, net.last):
        flat = layer.weight.detach().flatten(1)
        scale = flat.abs().amax(1, keepdim=True) / 127
        layer.weight.data = ((flat / scale).round() * scale).reshape(layer.weight.shape)
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    errors = {}
    for name in ("int8", "int16"):
        fewbit.export(quantized(net, activations=name), tmp_path / f"{name}.tflite", time=False)
        answer = get_target("litert").open_exact(tmp_path / f"{name}.tflite")(x)[0]
        errors[name] = float((answer - net(x)).abs().max() / net(x).abs().max())
    assert errors["int16"] < 1e-3 < errors["int8"]


def test_codes_handed_over(written: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = written
    path = tmp_path / "codes.tflite"
    check = fewbit.export(model, path, time=False, io="int16").verification
    assert check is not None and check.output_differing == 0
    file = load(path)
    assert {file.tensors[i].kind for i in (*file.inputs, *file.outputs)} == {"INT16"}
    with pytest.raises(TargetError, match="int16 codes"):
        fewbit.export(model, tmp_path / "wrong.tflite", io="int8")


@pytest.mark.parametrize("end", [nn.Softmax(-1), nn.Sigmoid(), nn.GELU(), nn.Hardswish()])
def test_functions_run_in_float_between_codes(end: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.tflite"
    check = fewbit.export(quantized(network(end)), path, time=False).verification
    assert check is not None and check.whole_network.startswith("float in 1 places")
    assert sum(layer.differing for layer in check.layers) == 0 and check.output_error < 1e-3
    assert any(k.kind != "conv" and not k.integer and "16 bits" in k.cause for k in check.kernels)


def test_attention_multiplies_codes(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 4.0, -1)
            return weights @ self.v(x)

    torch.manual_seed(0)
    x = torch.randn(64, 6, 16)
    model = fewbit.quantize(Attention().eval(), x, target="litert", progress=False, activations="int16")
    check = fewbit.export(model, tmp_path / "net.tflite", time=False).verification
    assert check is not None and sum(layer.differing for layer in check.layers) == 0
    assert [layer.kind for layer in check.layers].count("matmul") == 2


def test_a_wrong_bias_is_found(written: tuple[Any, Path], tmp_path: Path) -> None:
    """One bias of the file moved by half a unit of the output: the model disagrees with it."""
    model, path = written
    program = get_target("litert").prepare(lower(model))
    linear = next(op for op in program.ops if op.kind == "linear")
    bias = linear.constants["bias"].numpy().tobytes()
    moved = (linear.constants["bias"] + 2**16).numpy().tobytes()
    damaged = tmp_path / "damaged.tflite"
    content = path.read_bytes()
    assert content.count(bias) == 1
    damaged.write_bytes(content.replace(bias, moved))
    with pytest.raises(VerificationError, match="linear"):
        fewbit.verify(damaged, model=model)


def test_other_widths_are_refused() -> None:
    with pytest.raises(PlanError, match="int12 activations have no integer kernel"):
        quantized(network(), activations="int12")
    with pytest.raises(PlanError, match="int16"):
        fewbit.quantize(
            network(), torch.randn(8, 3, 16, 16), target="onnx", activations="int16", progress=False
        )


def test_mixed_widths_are_refused(tmp_path: Path) -> None:
    rules = [{"match": "second", "activations": "int8"}]
    with pytest.raises(
        TargetError, match="second: reads int16 and gives int8, which no kernel of LiteRT does"
    ):
        fewbit.export(quantized(network(), rules=rules), tmp_path / "net.tflite")


def test_other_peoples_files_with_tables_are_not_read(written: tuple[Any, Path], tmp_path: Path) -> None:
    """A softmax of 16-bit codes answers from tables that fewbit does not reproduce."""
    from fewbit.targets._litert.builder import Builder

    coding = lower(written[0]).codings[lower(written[0]).ops[0].output]
    b = Builder()
    b.tensor("x", (1, 4), "int16", coding)
    b.tensor("y", (1, 4), "int16", coding)
    b.operator("SOFTMAX", ["x"], ["y"], ("SoftmaxOptions", {"beta": 1.0}), 3)
    path = tmp_path / "theirs.tflite"
    path.write_bytes(b.finish(["x"], ["y"], {}))
    assert get_target("litert").describe(path).program is None
    with pytest.raises(ArtifactError):
        fewbit.verify(path)
