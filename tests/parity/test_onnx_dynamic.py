"""ONNX files whose ranges are taken at run time: smaller, and verified from the file alone."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit.model.lowering import lower
from fewbit.targets import get_target


def net(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10, bias=False)).eval(), torch.randn(
            9, 48
        )
    layers = [nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 4, 5)).eval(), torch.randn(9, 3, 8, 8)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_file_carries_what_verifying_it_needs(kind: str, weights: str, tmp_path: Path) -> None:
    module, x = net(kind)
    quantized = fewbit.quantize(module, example=x, weights=weights, activations="dynamic")
    path = tmp_path / "m.onnx"
    fewbit.export(quantized, path, time=False)
    found = get_target("onnx").describe(path).program
    assert found is not None
    for key, tensor in lower(quantized).tensors().items():
        assert torch.equal(found.tensors()[key], tensor), key
    result = fewbit.verify(path, x)
    assert result.exact and result.output_error < 1e-5 and result.output_total > 0
    assert all(k.integer for k in result.kernels) and len(result.kernels) == (2 if kind == "linear" else 3)
