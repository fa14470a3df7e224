"""Every number format as weights: an ONNX file whose weights are, bit for bit, what the codes stand for; and saved."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import fewbit
from fewbit.model.simulate import QuantizedModel
from fewbit.numerics.format import format_names, get_format
from fewbit.plan.recipe import Rule
from fewbit.targets._onnx.runtime import session

LAYERS = {name: f"{name}_layer" for name in format_names()}


class Side(nn.Module):
    """A convolution and a linear layer for each format, each with an answer of its own."""

    def __init__(self) -> None:
        super().__init__()
        for i, layer in enumerate(LAYERS.values()):
            made = nn.Linear(288, 4) if i % 2 else nn.Conv2d(32, 4, 3)
            self.add_module(layer, made)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for layer in LAYERS.values():
            made = getattr(self, layer)
            found[layer] = made(x.flatten(1)) if isinstance(made, nn.Linear) else made(x)
        return found


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    rules = tuple(Rule(layer, weights=name) for name, layer in LAYERS.items())
    return fewbit.quantize(Side(), example=torch.randn(4, 32, 3, 3), activations="float", rules=rules)


@pytest.fixture(scope="module")
def file(quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("formats") / "m.onnx"
    artifact = fewbit.export(quantized, path, time=False)
    assert artifact.verification is not None and artifact.verification.exact
    causes = {k.layer: k.cause for k in artifact.verification.kernels}
    for name, layer in LAYERS.items():
        spec = get_format(name)
        table = not spec.integer and not spec.code_dtype.is_floating_point
        decoded = f"; {name} weights, decoded when the file is loaded" if table else ""
        assert causes[layer] == f"planned as float{decoded}"
    return path


@pytest.fixture(scope="module")
def weights(file: Path) -> dict[str, np.ndarray]:
    """What ONNX Runtime multiplies by, by layer."""
    model = onnx.load(str(file))
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            layer = node.name.split("/")[0]
            found[layer] = (node.op_type, node.input[1])
            model.graph.output.append(helper.make_empty_tensor_value_info(node.input[1]))
    opened = session(model.SerializeToString())
    names = [name for _, name in found.values()]
    values = opened.run(names, {opened.get_inputs()[0].name: np.zeros((4, 32, 3, 3), np.float32)})
    each = zip(found.items(), values, strict=True)
    return {layer: v.T if kind == "MatMul" else v for (layer, (kind, _)), v in each}


@pytest.mark.parametrize("name", LAYERS)
def test_the_file_holds_what_the_codes_stand_for(
    quantized: QuantizedModel, weights: dict[str, np.ndarray], name: str
) -> None:
    q = quantized.qtensors[f"{LAYERS[name]}.weight"]
    assert q.scheme.format == name
    assert np.array_equal(weights[LAYERS[name]], q.dequantize().numpy())


def test_saved_and_loaded_every_format_is_the_same(quantized: QuantizedModel, tmp_path: Path) -> None:
    again = fewbit.load(fewbit.save(quantized, tmp_path / "m"))
    assert isinstance(again, QuantizedModel)
    for name in quantized.qtensors.names():
        a, b = quantized.qtensors[name], again.qtensors[name]
        assert a.scheme == b.scheme and a.codes.dtype == b.codes.dtype
        for part in ("codes", "scale", "zero_point", "codebook"):
            x, y = getattr(a, part), getattr(b, part)
            assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), (name, part)


SMALL = ["codebook3", "mxfp4", "nvfp4", "float8_e4m3", "binary"]


@pytest.mark.parametrize("name", SMALL)
def test_files_are_as_small_as_the_codes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 384, bias=False))
    nn.init.normal_(model[0].weight)
    q = fewbit.quantize(model, example=torch.randn(2, 512), weights=name, activations="float")
    nbytes = q.qtensors["0.weight"].nbytes
    written = fewbit.export(q, tmp_path / "m.onnx", time=False).size
    assert written < nbytes + 4 * 384 + 4000  # scales may be float32, nodes have names
    fewbit.save(q, tmp_path / "m")
    stored = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert stored < nbytes + 2 * 4 * 512 + 1500  # the example; names
    if name in ("mxfp4", "float8_e4m3"):  # values of a normal distribution are not equally frequent
        assert stored < 0.97 * nbytes + 2 * 4 * 512 + 1500
