"""ONNX files as exporters write them: read, equal to ONNX Runtime, under the names that the user knows."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit
from fewbit.model.readers.onnx import read_file


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class Residual(nn.Module):
    """A small residual network that takes a shape from its input, as old code does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2))
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.layer1(F.relu(self.stem(x))), 2)
        return self.fc(x.view(x.size(0), -1))


def _exported(
    module: nn.Module, x: Tensor, path: Path, dynamo: bool, free: bool = True, **settings: object
) -> Path:
    if dynamo:
        pytest.importorskip("onnxscript")
        settings["dynamic_shapes"] = ({0: torch.export.Dim("batch")},) if free else None
    else:
        settings |= {"input_names": ["image"], "dynamic_axes": {"image": {0: "batch"}} if free else None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=dynamo, verbose=False, **settings)
    return path


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_residual_network_of_torchs_exporters(dynamo: bool, tmp_path: Path) -> None:
    module, x = Residual().eval(), torch.randn(2, 3, 16, 16)
    gm = read_file(_exported(module, x, tmp_path / "m.onnx", dynamo))
    torch.testing.assert_close(gm(x), module(x), rtol=1e-4, atol=1e-5)
    names = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    assert names[:2] == ["stem", "layer1.0.conv1"]
    assert {"layer1.1.conv2", "layer1.0.down.0", "fc"} <= set(names)
    assert isinstance(next(iter(gm.meta["dynamic"].values()))[0], str)
    assert gm.meta["example"][0].shape == (4, 3, 16, 16)
    assert "m.onnx" in gm.meta["source"]


def test_a_training_export_keeps_each_batch_norm(tmp_path: Path) -> None:
    """Exporters store equal tensors once; untrained norms are all equal, and still layers of their own."""
    module, x = Residual().eval(), torch.randn(2, 3, 16, 16)
    settings = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    gm = read_file(_exported(module, x, tmp_path / "m.onnx", False, **settings))
    norms = [m for m in gm.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6 == len({id(n.weight) for n in norms})
    assert {"layer1.0.bn1", "layer1.0.bn2"} <= {name for name, _ in gm.named_modules()}


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_freed_where_samples_are_on_their_own(
    batch: int, dynamo: bool, tmp_path: Path
) -> None:
    module, x = Residual().eval(), torch.randn(batch, 3, 16, 16)
    gm = read_file(_exported(module, x, tmp_path / "m.onnx", dynamo, free=False))
    other = torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(gm(other), module(other), rtol=1e-4, atol=1e-5)
    assert any("any" in note for note in gm.meta["notes"])


class OverTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def test_a_fixed_batch_stays_fixed_where_samples_depend_on_each_other(tmp_path: Path) -> None:
    gm = read_file(_exported(OverTheBatch(), torch.randn(3, 5), tmp_path / "m.onnx", False, free=False))
    assert gm.meta["dynamic"] == {"image": (3, 5)}


def test_quantize_works_on_what_was_read(tmp_path: Path) -> None:
    module, x = Residual().eval(), torch.randn(8, 3, 16, 16)
    gm = read_file(_exported(module, x, tmp_path / "m.onnx", False))
    quantized = fewbit.quantize(gm, x, progress=False)
    assert F.cosine_similarity(quantized(x).flatten(), module(x).flatten(), 0) > 0.99
    fewbit.export(quantized, tmp_path / "q.onnx", time=False)


def test_our_own_float_file_is_read_back(tmp_path: Path) -> None:
    module, x = Residual().eval(), torch.randn(2, 3, 16, 16)
    fewbit.export(module, tmp_path / "m.onnx", example=x, time=False)
    gm = read_file(tmp_path / "m.onnx")
    torch.testing.assert_close(gm(x), module(x), rtol=1e-4, atol=1e-5)
    assert "layer1.1.conv2" in {name for name, _ in gm.named_modules()}
