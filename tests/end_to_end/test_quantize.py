"""The main job on many kinds of models: quantized, exported, verified, and still a normal module."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.calibrate import CalibrationWarning
from fewbit.errors import CalibrationError, DataError, ModelError
from fewbit.model.readers.torch import read
from fewbit.observers import observer_names


class Small(nn.Module):
    """Convolutions with a residual, batch norm, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.conv2(x))
        return self.head(self.dropout(x.mean((2, 3))))


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def exported(model: nn.Module, path: Any) -> Any:
    artifact = fewbit.export(model, path / "model.onnx", time=False)
    assert artifact.verification.exact
    return artifact


def test_the_simulation_answers_nearly_as_the_model(small: nn.Module, images: Tensor, tmp_path: Any) -> None:
    quantized = fewbit.quantize(small, images)
    reference, answer = small(images), quantized(images)
    assert (answer - reference).abs().max() < 0.05 * reference.abs().max()
    assert exported(quantized, tmp_path).verification.covered("conv") == (2, 2)


def test_a_model_in_train_mode_is_left_in_it(small: nn.Module, images: Tensor, tmp_path: Any) -> None:
    small.train()
    before = copy.deepcopy(small.state_dict())
    exported(fewbit.quantize(small, images), tmp_path)
    assert small.training and small.bn1.training
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())


def test_half_precision(small: nn.Module, images: Tensor, tmp_path: Any) -> None:
    exported(fewbit.quantize(small.to(torch.bfloat16), images), tmp_path)


def test_several_inputs_and_outputs(tmp_path: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            joined = torch.cat((self.left(a), self.right(b)), dim=1)
            return {"joined": joined, "sum": self.left(a) + self.right(b)}

    torch.manual_seed(0)
    data = (torch.randn(48, 6), torch.randn(48, 4))
    model = Two()
    by_tuple = fewbit.quantize(model, data, example=data)
    by_name = fewbit.quantize(model, {"a": data[0], "b": data[1]}, example=data)
    assert set(by_tuple(*data)) == {"joined", "sum"}
    assert torch.equal(by_tuple(*data)["sum"], by_name(*data)["sum"])
    exported(by_tuple, tmp_path)


def test_a_module_used_twice_and_tied_weights(tmp_path: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, 8)
            self.mix = nn.Linear(8, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(self.mix(torch.relu(self.mix(self.table(tokens))))))

    torch.manual_seed(0)
    tokens = torch.randint(0, 12, (40, 5))
    quantized = fewbit.quantize(Tied(), tokens)
    assert quantized.plan.row("head.weight").constraint == "shared with table.weight"
    exported(quantized, tmp_path)


def test_it_is_a_normal_module(small: nn.Module, images: Tensor) -> None:
    quantized = fewbit.quantize(small, images)
    answer = quantized(images)
    assert torch.equal(copy.deepcopy(quantized).to("cpu")(images), answer)
    other = fewbit.quantize(small, images * 2)
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(images), answer)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(quantized, (images,), dynamic_shapes={"inputs": (batch,)})
    assert torch.equal(program.module()(images[:5]), quantized(images[:5]))


def test_a_graph_is_not_changed(small: nn.Module, images: Tensor) -> None:
    graph = read(small, (images[:4],))
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    fewbit.quantize(graph, images)
    assert all(torch.equal(before[key], value) for key, value in graph.state_dict().items())


@pytest.mark.parametrize("observer", observer_names())
def test_every_observer(small: nn.Module, images: Tensor, tmp_path: Any, observer: str) -> None:
    quantized = fewbit.quantize(small, images, observer=observer, weight_observer=observer)
    assert quantized.plan.row("conv1.output").observer == observer
    exported(quantized, tmp_path)


@pytest.mark.parametrize("weights", ["int2", "int3", "int4", "int7", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_width(small: nn.Module, images: Tensor, tmp_path: Any, weights: str, granularity: str) -> None:
    quantized = fewbit.quantize(small, images, weights=weights, activations="int6", granularity=granularity)
    bits = int(weights.removeprefix("int"))
    assert quantized.qtensors["conv2.weight"].codes.unique().numel() <= 2**bits - 1
    exported(quantized, tmp_path)


def test_equalization_and_bias_correction_recover_accuracy(small: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        small.conv1.weight.mul_(
            torch.logspace(-2, 0, 8).reshape(-1, 1, 1, 1)
        )  # channels of very different range
    expected = small(images)
    plain = fewbit.quantize(small, images, weights="int4", granularity="tensor")
    better = fewbit.quantize(
        small, images, weights="int4", granularity="tensor", equalize=True, bias_correction=True
    )
    assert (better(images) - expected).square().mean() < 0.5 * (plain(images) - expected).square().mean()


def test_rules_choose_by_layer(small: nn.Module, images: Tensor, tmp_path: Any) -> None:
    rules = [{"match": "conv1", "activations": "float"}, {"match": "head", "weights": "int4"}]
    quantized = fewbit.quantize(small, images, rules=rules)
    assert quantized.plan.row("head.weight").scheme.format == "int4"
    assert "conv1" not in quantized.integer and "conv2" in quantized.integer
    exported(quantized, tmp_path)


def test_tensorrt_is_symmetric_and_structurally_sound(
    small: nn.Module, images: Tensor, tmp_path: Any
) -> None:
    import onnx

    from fewbit.targets.tensorrt import structure

    quantized = fewbit.quantize(small, images, target="tensorrt")
    assert quantized.plan.row("conv1.output").scheme.format == "int8"
    artifact = fewbit.export(quantized, tmp_path / "model.onnx", time=False)
    assert artifact.target == "tensorrt" and artifact.verification.exact
    assert structure(onnx.load(str(artifact.path))) == []
    plain = fewbit.export(fewbit.quantize(small, images), tmp_path / "plain.onnx", time=False)
    assert structure(onnx.load(str(plain.path))) != []


def test_calibration_tells_what_it_saw(small: nn.Module, images: Tensor) -> None:
    facts = fewbit.quantize(small, images, batch_size=24).facts
    assert (facts["samples"], facts["batches"]) == (64, 3)
    assert facts["peak_bytes"] > 2**20 and facts["seconds"] > 0 and facts["warnings"] == []


def test_warnings_name_the_layer(small: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        small.conv2.weight[3] = 0
        small.conv1.weight.zero_()
        small.conv1.bias.fill_(-1)
        small.bn1.bias.fill_(-1)
    with pytest.warns(CalibrationWarning) as caught:
        quantized = fewbit.quantize(small, images[:8])
    text = "\n".join(quantized.facts["warnings"])
    assert {str(w.message) for w in caught} == set(quantized.facts["warnings"])
    assert "only 8 calibration samples" in text
    assert "conv1.output: always zero on the calibration data" in text
    assert "conv2: 1 of 8 channels are dead (all weights nearly zero): 3" in text


def test_held_out_data_that_is_clipped_is_told(small: nn.Module, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fewbit.quantize(small, images, held_out=images.flip(0))
    with pytest.warns(
        CalibrationWarning, match=r"input:x: \d+\.\d% of its values on held-out data are clipped"
    ):
        fewbit.quantize(small, images, held_out=images + 2 * torch.randn_like(images))


def test_what_is_missing_is_said(small: nn.Module, images: Tensor) -> None:
    with pytest.raises(DataError, match="needs calibration data, or an example input"):
        fewbit.quantize(small)
    with pytest.raises(CalibrationError, match="quantizes activations statically and needs calibration data"):
        fewbit.quantize(small, example=images)
    with pytest.raises(ModelError, match=r"the model is a int: expected a torch\.nn\.Module"):
        fewbit.quantize(3, images)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="quantized already"):
        fewbit.quantize(fewbit.quantize(small, images), images)
    with pytest.raises(DataError, match="generator can be read once"):
        fewbit.quantize(small, (batch for batch in images.split(16)), bias_correction=True)


def test_the_simulation_adds_the_biases_of_the_program(small: nn.Module, images: Tensor) -> None:
    from fewbit.model.lowering import lower

    quantized = fewbit.quantize(small, images)
    program = lower(quantized)
    ops = [op for op in program.integer_ops() if "bias" in op.constants]
    assert len(ops) == 3
    for op in ops:
        unit = program.codings[op.inputs[0]].scale * op.constants["weight_scale"].double()
        steps = quantized.graph.get_submodule(op.layer).bias.double() / unit
        assert (steps - op.constants["bias"]).abs().max() < 1e-3


def test_float_outputs_come_from_a_last_layer_that_computes_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x = torch.randn(64, 3, 8, 8)
    quantized = fewbit.quantize(model, x, outputs="float", progress=False)
    assert quantized.plan.row("3.output").scheme is None and quantized.plan.row("3.weight").scheme is not None
    with torch.no_grad():
        assert quantized(x).unique().numel() > 300  # of 320: no codes
    artifact = fewbit.export(quantized, tmp_path / "m.onnx")
    kernels = {kernel.layer: kernel.integer for kernel in artifact.verification.kernels}
    assert kernels == {"0": True, "3": False}
