"""Weights of few bits with zero points run in integer kernels: the codes that are stored have theirs subtracted."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit.model.lowering import lower
from fewbit.model.reference import Reference
from fewbit.targets import get_target

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    with torch.no_grad():
        net[0].weight.abs_()  # far from symmetric: every channel needs its zero point
    return net


CASES = [("onnx", "int2"), ("onnx", "int4"), ("onnx", "int6"), ("litert", "int2"), ("executorch", "int2")]


@pytest.mark.parametrize(("target", "weights"), CASES)
def test_the_file_computes_what_the_simulation_does(target: str, weights: str, tmp_path: Path) -> None:
    pytest.importorskip({"litert": "ai_edge_litert", "onnx": "onnxruntime"}.get(target, target))
    options = {"weights": weights, "weight_symmetric": False, "weight_observer": "mse", "target": target}
    quantized = fewbit.quantize(model(), X, progress=False, **options)
    q = quantized.qtensors["0.weight"]
    assert int(q.zero_point.abs().max()) > 0
    program = lower(quantized)
    op = next(op for op in program.ops if op.layer == "0" and "weight" in op.constants)
    stored = op.constants["weight"].float() * op.constants["weight_scale"].reshape(-1, 1, 1, 1)
    assert op.constants["weight"].dtype == torch.int8 and torch.equal(stored, q.dequantize())
    fewbit.export(quantized, tmp_path / f"m{get_target(target).SUFFIX}", target=target)
    with torch.no_grad():
        simulated, exact = quantized(X), Reference(program)(X)
    assert float((simulated - exact).norm() / exact.norm()) < 0.02
