"""Weights in OpenVINO files: as many bits as the recipe says, and what the runtime multiplies with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.model.lowering import lower
from fewbit.model.reference import Reference
from fewbit.targets import get_target

pytest.importorskip("openvino")
TARGET = get_target("openvino")


class Net(nn.Module):
    """A convolution, a linear layer on rows of tokens, and one on the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 64, 3, padding=1)
        self.rows, self.head = nn.Linear(64, 128), nn.Linear(128 * 8, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).transpose(1, 2)
        return self.head(torch.relu(self.rows(x)).flatten(1))


class Recurrent(nn.Module):
    """A recurrent layer, in both directions if it is a GRU, and a linear one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        both = kind == "GRU"
        self.layer = getattr(nn, kind)(24, 32, batch_first=True, bidirectional=both)
        self.head = nn.Linear(64 if both else 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


def parts(net: nn.Module) -> tuple[int, int]:
    """How many numbers its weights and its biases have."""
    counts = [(p.dim() > 1, p.numel()) for p in net.parameters()]
    return sum(n for weight, n in counts if weight), sum(n for weight, n in counts if not weight)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


X = torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("bits", "recipe"),
    [
        (8, {"weights": "int8"}),
        (8, {"weights": "uint8", "weight_symmetric": False}),
        (4, {"weights": "int4"}),
        (4, {"weights": "int4", "granularity": "group", "group_size": 16}),
        (4, {"weights": "uint4", "granularity": "group", "group_size": 16, "weight_symmetric": False}),
        (16, {"weights": "float16"}),
        (16, {"weights": "bfloat16"}),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v),
)
def test_weights_alone(net: nn.Module, bits: int, recipe: dict[str, Any], tmp_path: Path) -> None:
    """The answer is that of the stored weights in float32: nothing else is rounded."""
    path = tmp_path / "m.xml"
    quantized = fewbit.quantize(net, example=X, activations="float", target="openvino", **recipe)
    artifact = fewbit.export(quantized, path, time=False)
    assert artifact.verification is not None and artifact.verification.exact
    (answer,), expected = TARGET.open(path)(X), quantized(X)
    assert float((answer - expected).abs().max()) < 2e-6 * float(expected.abs().max())
    weights, biases = parts(net)
    scales = 5 * weights // 16 if "group_size" in recipe else 6 * 224 if bits < 16 else 0
    stored = path.with_suffix(".bin").stat().st_size
    assert 0 <= stored - (weights * bits // 8 + 4 * biases) <= scales + 500


def test_four_bits_under_integer_kernels(net: nn.Module, tmp_path: Path) -> None:
    path, data = tmp_path / "m.xml", torch.randn(64, 16, 8)
    quantized = fewbit.quantize(net, data, weights="int4", target="openvino")
    artifact = fewbit.export(quantized, path, time=False)
    check = artifact.verification
    assert check is not None and check.covered("conv") == (1, 1) and check.covered("linear") == (2, 2)
    program, found = lower(quantized), TARGET.describe(path).program
    assert found is not None
    assert all(torch.equal(found.tensors()[key], t) for key, t in program.tensors().items())
    weights, biases = parts(net)
    assert path.with_suffix(".bin").stat().st_size < weights / 2 + 4 * 4 * biases + 500


def test_ranges_at_run_time(net: nn.Module, tmp_path: Path) -> None:
    """They are OpenVINO's own, of groups of 32: near the reference, and clearly not float."""
    path = tmp_path / "m.xml"
    quantized = fewbit.quantize(net, example=X, activations="dynamic", target="openvino")
    fewbit.export(quantized, path, time=False)
    assert "DYNAMIC_QUANTIZATION_GROUP_SIZE" in path.read_text()
    (answer,), expected = TARGET.open(path)(X), Reference(lower(quantized))(X)
    error = float((answer - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.02
    weights, biases = parts(net)
    assert path.with_suffix(".bin").stat().st_size < weights + 8 * biases + 500
    result = fewbit.verify(path, X)
    assert result.exact and result.output_total == 8 * 32


@pytest.mark.parametrize(
    ("kind", "fmt", "bits", "activations", "error"),
    [
        ("LSTM", "int8", 8, "int8", 0.02),
        ("LSTM", "float16", 16, "float", 1e-5),
        ("GRU", "int4", 4, "float", 1e-5),
    ],
)
def test_recurrent_layers(
    kind: str, fmt: str, bits: int, activations: str, error: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x, path = Recurrent(kind).eval(), torch.randn(36, 7, 24), tmp_path / "m.xml"
    quantized = fewbit.quantize(net, x, weights=fmt, activations=activations, target="openvino")
    fewbit.export(quantized, path, time=False)
    expected = quantized(x).detach()
    assert float((TARGET.open(path)(x)[0] - expected).abs().max()) < error
    weights, biases = parts(net)
    assert path.with_suffix(".bin").stat().st_size < weights * bits / 8 + 8 * biases + 600


def test_a_float_model_is_written_in_float(net: nn.Module, tmp_path: Path) -> None:
    artifact = fewbit.export(net, tmp_path / "m.xml", example=X)
    assert artifact.verification is not None and artifact.verification.output_error < 1e-5


def test_additions_of_a_float_model_need_no_integer_kernel(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x)) + self.b(x)

    x = torch.rand(4, 16)
    for model in (Sum(), fewbit.quantize(Sum(), example=x, recipe="int8-weight-only", target="openvino")):
        artifact = fewbit.export(model, tmp_path / "m.xml", example=x, time=False)
        assert artifact.verification is not None
        assert [k.kind for k in artifact.verification.kernels] == ["Linear", "Linear"]
