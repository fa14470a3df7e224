"""The OpenVINO target: what its kernels compute, what its files hold, and what becomes of damaged ones."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_networks import draw
from torch import Tensor, nn

import fewbit
from fewbit import demo
from fewbit.deploy import Artifact
from fewbit.errors import ArtifactError, DataError, TargetError, VerificationError
from fewbit.gate import check_file
from fewbit.model.kernels import dequantize
from fewbit.model.lowering import lower
from fewbit.model.program import Op, Program
from fewbit.model.reference import Reference
from fewbit.targets import get_target
from fewbit.targets._openvino.runtime import compiled, infer, read

pytest.importorskip("openvino")
TARGET = get_target("openvino")


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def size(path: Path) -> int:
    """Bytes of the weights."""
    return path.with_suffix(".bin").stat().st_size


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    model, data = demo.load()
    return fewbit.quantize(model, data.calibration_images, target="openvino"), data


@pytest.fixture(scope="module")
def exported(digits: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    path = tmp_path_factory.mktemp("openvino") / "digits.int8.xml"
    yield fewbit.export(digits[0], path, time=False)


def test_every_layer_runs_on_integers_and_agrees(digits: tuple[Any, Any], exported: Artifact) -> None:
    data = digits[1]
    described = TARGET.describe(exported.path)
    assert described.program is not None
    images = torch.as_tensor(data.test_images)
    result = check_file(TARGET, exported.path, described.program, described.codes, (images,))
    assert all(k.integer for k in result.kernels) and len(result.kernels) == 8
    layers = {c.kind: 0 for c in result.layers}
    for check in result.layers:
        layers[check.kind] += check.differing
        assert check.largest <= 1, check
    ours = sum(op.domain == "integer" for op in described.program.ops)
    assert sum(c.kind in ("conv", "add", "global_avg_pool", "linear") for c in result.layers) == ours == 8
    assert sum(n for kind, n in layers.items() if kind != "quantize") < 100  # of 5 million
    answers = TARGET.open(exported.path)(images)[0].argmax(1)
    assert float((answers == torch.as_tensor(data.test_labels)).float().mean()) > 0.98


def test_the_file_carries_the_whole_program(digits: tuple[Any, Any], exported: Artifact) -> None:
    program, found = lower(digits[0]), TARGET.describe(exported.path)
    assert found.program is not None
    assert found.program.to_json() == program.to_json()
    for key, tensor in program.tensors().items():
        assert torch.equal(found.program.tensors()[key], tensor), key
    assert "fewbit" in found.properties
    assert names(exported.path.parent) == {"digits.int8.xml", "digits.int8.bin"}
    assert exported.size == size(exported.path) + exported.path.stat().st_size
    result = fewbit.verify(exported.path)
    assert result.exact and len(result.layers) == 10


def test_a_network_that_differs_leaves_no_file(
    digits: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TARGET.probe

    def lying(path: Path, inputs: tuple[Tensor, ...], codes: dict[str, str]) -> dict[str, Tensor]:
        return {
            name: value ^ 2 if name == "conv2" else value
            for name, value in honest(path, inputs, codes).items()
        }

    monkeypatch.setattr(TARGET, "probe", lying)
    with pytest.raises(VerificationError, match=r"conv2 .* differs"):
        fewbit.export(digits[0], tmp_path / "m.xml", time=False)
    assert names(tmp_path) == set()
    with pytest.raises(TargetError, match=r"OpenVINO files end in \.xml"):
        fewbit.export(digits[0], tmp_path / "m.ir", target="openvino")


# 12: 3-bit weights; 14: attention; 20: a mean of limited codes
@pytest.mark.parametrize("seed", [12, 14, 20])
def test_a_random_network_agrees(seed: int, tmp_path: Path) -> None:
    drawn = draw(seed)
    quantized = fewbit.quantize(
        drawn.module, [drawn.inputs(48)], example=drawn.inputs(4, 3), target="openvino", **drawn.recipe
    )
    path = tmp_path / "m.xml"
    program = fewbit.export(quantized, path, time=False, verify=False) and TARGET.describe(path).program
    assert program is not None
    result = check_file(TARGET, path, program, TARGET.describe(path).codes, drawn.inputs(16, 2))
    integer = [op for op in program.ops if op.domain == "integer"]
    assert len([c for c in result.layers if c.kind in {op.kind for op in integer}]) >= len(integer) - 1
    assert [c for c in result.layers if c.largest > 1] == [], (drawn.recipe, drawn.parts)
    assert sum(c.differing for c in result.layers) <= 2e-4 * sum(c.total for c in result.layers)
    assert all(k.integer for k in result.kernels if k.kind in ("conv", "linear"))


def test_a_join_of_limited_codes_alone(tmp_path: Path) -> None:
    """OpenVINO makes something else of a Clip between DequantizeLinear and QuantizeLinear where shapes are free."""
    drawn = draw(34)
    whole = lower(
        fewbit.quantize(
            drawn.module, [drawn.inputs(48)], example=drawn.inputs(4), target="openvino", **drawn.recipe
        )
    )
    values = Reference(whole).run(*drawn.inputs(8, 1))
    op = next(op for op in whole.ops if op.kind == "concat")
    floats = [f"{name}_float" for name in op.inputs]
    codings = {name: whole.codings[name] for name in [*op.inputs, op.output]}
    quantizers = [Op("quantize", "boundary", f, f, [f], n) for f, n in zip(floats, op.inputs, strict=True)]
    last = Op("dequantize", "boundary", op.layer, op.node, [op.output], "y")
    shapes = [(None, *values[name].shape[1:]) for name in [*op.inputs, op.output]]
    program = Program(floats, shapes[:-1], ["float32"] * len(floats), "y", shapes[-1:], ["float32"],
                      [*quantizers, op, last], codings)  # fmt: skip
    TARGET.write(program, tmp_path / "m.xml", {})
    inputs = [dequantize(values[name], codings[name]) for name in op.inputs]
    path, expected = tmp_path / "m.xml", dequantize(values[op.output], codings[op.output])
    (answer,) = infer(compiled(read(path), path), tuple(inputs), path)  # its shapes left free
    torch.testing.assert_close(torch.from_numpy(answer), expected)
    torch.testing.assert_close(TARGET.open(path)(*inputs)[0], expected)


WIDE = """
import sys, torch, fewbit
from pathlib import Path
from torch import nn
from fewbit.gate import check_file
from fewbit.targets import get_target
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
net[0].weight.data.sign_()
x, path, target = torch.rand(64, 16, 6, 6), Path(sys.argv[1]), get_target("openvino")
for portable in (True, False):
    fewbit.export(fewbit.quantize(net, x, target="openvino", portable=portable), path, verify=False)
    file = target.describe(path)
    print(max(c.largest for c in check_file(target, path, file.program, file.codes, (x,)).layers))
"""


def test_portable_weights_agree_on_a_cpu_without_vnni(tmp_path: Path) -> None:
    """oneDNN's own switch makes it use the kernels of such a CPU."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", WIDE, str(tmp_path / "m.xml")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    portable, full = (int(line) for line in done.stdout.split())
    assert portable <= 1
    assert full > 1


def test_files_that_are_damaged_or_not_ours(exported: Artifact, tmp_path: Path) -> None:
    xml, weights = exported.path.read_text(), exported.path.with_suffix(".bin").read_bytes()
    path = tmp_path / "m.xml"

    def refused(match: str) -> None:
        with pytest.raises(ArtifactError, match=match):
            fewbit.verify(path)

    refused("m.xml: no such file$")
    path.write_text(xml)
    refused("m.bin: no such file, which belongs to m.xml")
    path.with_suffix(".bin").write_bytes(weights[: len(weights) // 2])
    refused("m.xml: not a valid OpenVINO file")
    path.with_suffix(".bin").write_bytes(weights)
    fewbit.verify(path)
    path.write_text(xml[: len(xml) // 2])
    refused("m.xml: not a valid OpenVINO file")
    path.write_text("<html></html>")
    refused("m.xml: not a valid OpenVINO file")
    path.write_text(xml.replace("<program value=", "<programme value="))
    refused("without fewbit's program")
    start = xml.index("<program value=") + 40
    path.write_text(xml[:start] + "AAAA" + xml[start + 4 :])
    refused("its program is damaged")


def test_inputs_that_are_not_the_models(exported: Artifact) -> None:
    run = TARGET.open(exported.path)
    with pytest.raises(DataError, match=r"takes 1 inputs \(images\), 2 given"):
        run(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    with pytest.raises(DataError, match="does not take inputs of shapes"):
        run(torch.zeros(1, 3, 8, 8))
    for count in (1, 2, 3, 4, 5, 6, 1):  # more shapes than stay compiled
        assert run(torch.zeros(count, 1, 8, 8))[0].shape == (count, 10)


class Pair(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.left(x), self.right(y)
        return a - b, torch.relu(b)


def test_several_inputs_and_outputs_keep_their_order(tmp_path: Path) -> None:
    net, x, y = Pair().eval(), torch.randn(64, 4), torch.randn(64, 5)
    quantized = fewbit.quantize(net, [(x, y)], example=(x, y), target="openvino")
    fewbit.export(quantized, tmp_path / "m.xml", time=False)
    for answer, expected in zip(TARGET.open(tmp_path / "m.xml")(x, y), quantized(x, y), strict=True):
        torch.testing.assert_close(answer, expected, atol=0.03, rtol=0)
