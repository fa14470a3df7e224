"""Weights looked up in tables, in every kind of layer and shape, and what ONNX Runtime makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn

import fewbit
from fewbit.errors import ArtifactError, PlanError, TargetError, VerificationError
from fewbit.model.lowering import lower
from fewbit.model.reference import Reference
from fewbit.pipeline import plan
from fewbit.targets import get_target
from fewbit.targets._onnx.builder import Builder
from fewbit.targets._onnx.probe import METADATA, packed, unpacked
from fewbit.targets._onnx.runtime import session
from fewbit.targets._onnx.tables import fewer_bytes, indices, numbers, numbers_again


def computed(builder: Builder, name: str, kind: int) -> np.ndarray:
    """What ONNX Runtime makes of a value that depends on initializers alone."""
    output = helper.make_tensor_value_info(name, kind, None)
    return session(builder.model("m", [], [output], {}).SerializeToString(), 1).run(None, {})[0]


@settings(max_examples=50, deadline=None)
@given(
    bits=st.integers(1, 8),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    wide=st.booleans(),
    seed=st.integers(0, 9),
)
def test_indices_of_every_width_and_shape_come_back(
    bits: int, shape: list[int], wide: bool, seed: int
) -> None:
    shape = [1000, *shape] if wide else shape  # where planes are worth their nodes
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    builder = Builder()
    assert np.array_equal(computed(builder, indices(builder, codes, bits, "w"), TensorProto.INT32), codes)
    stored = sum(len(tensor.raw_data) for tensor in builder.initializers.values())
    # Planes come with nodes, which small tensors are not worth.
    assert stored <= min(codes.size, codes.size * bits / 8 + 700 * bits.bit_count()) + 100


@settings(max_examples=30, deadline=None)
@given(values=st.integers(1, 64), count=st.integers(1, 5000), seed=st.integers(0, 9))
def test_numbers_of_few_values_come_back_and_are_read_again(values: int, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.choice(generator.permutation(np.arange(-127, 128))[:values], (count, 2)).astype(np.int8)
    builder = Builder()
    name, parts = numbers(builder, codes, "w")
    assert np.array_equal(computed(builder, name, TensorProto.INT8), codes)
    arrays = {k: onnx.numpy_helper.to_array(v) for k, v in builder.initializers.items()}
    assert np.array_equal(numbers_again(parts, arrays), codes)
    if fewer_bytes(builder, codes):
        assert sum(len(v.raw_data) for v in builder.initializers.values()) < codes.size


class Several(nn.Module):
    """Layers whose weights are stored, moved and cut in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(24, 32)
        self.rows = nn.Linear(32, 32)
        self.turned = nn.ConvTranspose1d(32, 64, 3, groups=2)
        self.past = nn.LSTM(64, 32, batch_first=True, bidirectional=True)
        self.gated = nn.GRU(64, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.turned(self.rows(self.words(x)).transpose(1, 2)).transpose(1, 2)
        return self.gated(self.past(y)[0])[0]


@pytest.mark.parametrize(
    "recipe",
    [
        {"weights": "codebook3", "granularity": "group", "group_size": 16},
        {"weights": "nvfp4"},
    ],
    ids=lambda recipe: "-".join(map(str, recipe.values())),
)
def test_every_layer_computes_with_decoded_weights(recipe: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 24, (3, 5))
    model = fewbit.quantize(Several().eval(), example=x, activations="float", **recipe)
    assert {model.qtensors[n].scheme.format for n in model.qtensors.names()} == {recipe["weights"]}
    fewbit.export(model, tmp_path / "m.onnx", time=False)
    answer = get_target("onnx").open(tmp_path / "m.onnx")(x)[0]
    torch.testing.assert_close(answer, model(x), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(answer, Reference(lower(model))(x), atol=2e-6, rtol=1e-5)


def test_the_runtime_unpacks_when_it_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 8)).eval()
    x = torch.randn(2, 8, 6, 6)
    for weights in ("codebook3", "float8_e5m2", "mxfp8_e4m3", "nf4"):
        rules = [{"match": "0", "weights": "codebook3"}] if weights == "mxfp8_e4m3" else []
        q = fewbit.quantize(model, example=x, weights=weights, activations="float", rules=rules)
        fewbit.export(q, tmp_path / "m.onnx", time=False)
        session(tmp_path / "m.onnx", optimized=tmp_path / "o.onnx")
        left = {node.op_type for node in onnx.load(str(tmp_path / "o.onnx")).graph.node}
        # Layouts may be moved for a faster convolution.
        assert not left & {"Gather", "GatherElements", "BitShift", "Mul", "Cast", "DequantizeLinear"}, weights


@pytest.mark.parametrize("name", ["litert", "openvino", "executorch", "torch", "tensorrt"])
def test_other_targets_refuse_by_layer_when_they_plan_and_when_they_write(name: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(4, 32)
    for weights in ("nf4", "codebook2", "pow2_4"):
        with pytest.raises(PlanError, match=rf"0\.weight: .*{weights}.*use .*int8"):
            plan(model, x, weights=weights, activations="float", target=name)
    q = fewbit.quantize(model, example=x, weights="pow2_4", activations="float")
    path = tmp_path / f"m{get_target(name).SUFFIX}"
    with pytest.raises(
        TargetError, match=r"0\.weight: .*pow2_4.*float16 weights, or integer activations, or target='onnx'"
    ):
        fewbit.export(q, path, target=name, time=False)
    assert not path.exists()


def test_lies_about_packed_weights_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = fewbit.quantize(nn.Sequential(nn.Linear(64, 64)), torch.randn(50, 64), weights="pow2_4")
    fewbit.export(q, tmp_path / "m.onnx", time=False)
    fewbit.verify(tmp_path / "m.onnx")
    good = onnx.load(str(tmp_path / "m.onnx"))
    key = "_0.weight"
    for change in (
        {"planes": [["nothing", 4]]},
        {"planes": [[0, 4]]},
        {"planes": []},
        {"planes": "x"},
        {"shape": [2**40]},
        {"shape": [64, -64]},
        {"shape": "x"},
        {"values": "nothing"},
        {"planes": [["0.weight_codes", 0]]},
        {"planes": [["0.weight_codes", 9]]},
    ):
        model = onnx.ModelProto()
        model.CopyFrom(good)
        entry = next(p for p in model.metadata_props if p.key == METADATA)
        data = unpacked(entry.value)
        assert data["constants"][key].keys() >= change.keys()
        data["constants"][key] |= change
        entry.value = packed(data)
        onnx.save(model, str(tmp_path / "bad.onnx"))
        with pytest.raises((ArtifactError, VerificationError), match=r"bad\.onnx"):
            fewbit.verify(tmp_path / "bad.onnx")
