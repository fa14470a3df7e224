"""Weights stored as float16 or bfloat16: simulation, saved folder, ONNX file and reference agree; half the bytes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.errors import CalibrationError, PlanError
from fewbit.model.lowering import lower
from fewbit.model.reference import Reference

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Net(nn.Module):
    """One of each layer whose weights can be stored narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(50, 24)
        self.conv = nn.Conv1d(24, 32, 3)
        self.up = nn.ConvTranspose1d(32, 24, 2)
        self.lstm = nn.LSTM(24, 20, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(40, 20, batch_first=True)
        self.flat = nn.Linear(20, 64)
        self.head = nn.Linear(64 * 9, 30)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.conv(self.rows(tokens).transpose(1, 2)).relu())
        x = self.gru(self.lstm(x.transpose(1, 2))[0])[0]
        return self.head(self.flat(x).relu().flatten(1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


TOKENS = torch.randint(0, 50, (4, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fmt", ["float16", "bfloat16"])
def test_one_model_in_every_form(net: nn.Module, fmt: str, tmp_path: Path) -> None:
    quantized = fewbit.quantize(net, example=TOKENS, recipe="float16", weights=fmt)
    weights = [row for row in quantized.plan.weights() if row.scheme is not None]
    assert len(weights) == 11 and all(row.scheme and row.scheme.format == fmt for row in weights)
    for row in weights:
        stored = quantized.qtensors[row.site]
        original = net.get_parameter(row.site)
        assert torch.equal(stored.codes, original.detach().to(DTYPES[fmt])), row.site
        assert torch.equal(quantized.graph.get_parameter(row.site), original.to(DTYPES[fmt]).float())
    answer = quantized(TOKENS)
    assert 0 < float((answer - net(TOKENS)).abs().max()) < 0.01
    assert torch.equal(Reference(lower(quantized))(TOKENS), answer)

    fewbit.save(quantized, tmp_path / "saved")
    again = fewbit.load(tmp_path / "saved")
    assert torch.equal(again(TOKENS), answer)
    assert all(torch.equal(again.qtensors[r.site].codes, quantized.qtensors[r.site].codes) for r in weights)

    artifact = fewbit.export(quantized, tmp_path / "half.onnx")
    floating = fewbit.export(net, tmp_path / "float.onnx", example=TOKENS)
    assert artifact.verification is not None and artifact.verification.exact
    assert artifact.verification.output_error < 1e-5
    assert artifact.size < 0.6 * floating.size
    graph = onnx.load(tmp_path / "half.onnx").graph
    narrow = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[fmt]
    assert sum(i.data_type == narrow for i in graph.initializer) >= len(weights) - 4  # LSTM's are joined


def test_the_file_holds_the_codes_themselves(tmp_path: Path) -> None:
    linear, path = nn.Linear(6, 5, bias=False), tmp_path / "m.onnx"
    fewbit.export(fewbit.quantize(linear, example=torch.randn(2, 6), recipe="float16"), path)
    (stored,) = onnx.load(path).graph.initializer
    array = onnx.numpy_helper.to_array(stored)
    assert array.dtype == np.float16
    assert np.array_equal(array, linear.weight.detach().numpy().astype(np.float16))


def test_a_weight_that_does_not_fit_is_named() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight[1, 2] = 1e5
    with pytest.raises(
        CalibrationError, match=r"1\.weight: 100000 at index \(1, 2\) is beyond float16.*bfloat16"
    ):
        fewbit.quantize(net, example=torch.randn(2, 3), recipe="float16")
    fewbit.quantize(net, example=torch.randn(2, 3), weights="bfloat16", activations="float")


def test_float16_with_integer_activations_is_refused() -> None:
    with pytest.raises(PlanError, match="float16 weights have no integer kernel"):
        fewbit.quantize(nn.Linear(3, 3), torch.randn(40, 3), weights="float16")


def test_groups_need_a_scale() -> None:
    with pytest.raises(PlanError, match="float16 has no scales to give to groups"):
        fewbit.quantize(
            nn.Linear(32, 3), example=torch.randn(2, 32), recipe="float16", granularity="group", group_size=16
        )
