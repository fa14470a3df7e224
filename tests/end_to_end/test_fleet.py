"""Many files at once: `export(targets=...)` and `benchmark`, with runtimes that fail in every way they can."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fewbit
import fewbit.targets
from fewbit import demo
from fewbit.errors import ArtifactError, DataError, TargetError, VerificationError
from fewbit.evaluation.metrics import evaluate
from fewbit.model.simulate import QuantizedModel

# A target of its own for each way to fail: the ONNX one with a function replaced.
PLUG_IN = '''
"""A target that fails."""

from fewbit.targets.onnx import *

SUFFIX = ".{suffix}"


def {function}(*arguments):
    raise {error}
'''


@pytest.fixture(scope="module")
def data() -> demo.DigitsData:
    return demo.load_digits_split()


@pytest.fixture(scope="module")
def quantized(data: demo.DigitsData) -> QuantizedModel:
    return fewbit.quantize(demo.load()[0], data.calibration_images)


@pytest.fixture(scope="module")
def test(data: demo.DigitsData) -> tuple[np.ndarray, np.ndarray]:
    return data.test_images[:200], data.test_labels[:200]


def add_target(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, function: str, error: str) -> None:
    (folder / f"{name}.py").write_text(PLUG_IN.format(suffix=name, function=function, error=error))
    monkeypatch.setattr(fewbit.targets, "__path__", [*fewbit.targets.__path__, str(folder)])


def test_every_target_is_measured_in_its_own_runtime(
    quantized: QuantizedModel, test: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("ai_edge_litert")
    fleet = fewbit.export(quantized, tmp_path / "build", targets=["onnx", "litert"], test=test)
    for name, suffix in (("onnx", ".onnx"), ("litert", ".tflite")):
        path = tmp_path / "build" / f"model{suffix}"
        assert fleet[name].path == path and fleet[name].size == path.stat().st_size
        assert fleet[name].verification.exact and set(fleet[name].latency) == {"float", "quantized"}
        own = evaluate(fewbit.deploy.runner(path), test, ["accuracy"])
        assert fleet.reports[name].metrics == own.metrics and own.metrics["accuracy"] > 0.95
        assert fleet.reports[name].agreement.top1 >= 0.99
    lines = str(fleet).splitlines()
    assert lines[0].split()[:3] == ["target", "bytes", "ms"]
    assert [line.split()[0] for line in lines[1:3]] == ["onnx", "litert"]
    assert f"{fleet['litert'].size:,}" in lines[2] and "8/8 integer" in lines[2] and " %" in lines[2]
    assert set(json.loads(json.dumps(fleet.to_json()))["reports"]) == {"onnx", "litert"}


def test_targets_with_one_suffix_get_files_of_their_own(data: demo.DigitsData, tmp_path: Path) -> None:
    symmetric = fewbit.quantize(demo.load()[0], data.calibration_images, target="tensorrt")
    fleet = fewbit.export(symmetric, tmp_path, targets=["onnx", "tensorrt"], time=False)
    assert {fleet[name].path.name for name in fleet.artifacts} == {"model.onnx", "model.tensorrt.onnx"}
    assert not fleet.failed and fewbit.verify(tmp_path / "model.tensorrt.onnx").exact


def test_a_target_that_refuses_leaves_no_file_and_the_others_stay(
    quantized: QuantizedModel, tmp_path: Path
) -> None:
    fleet = fewbit.export(quantized, tmp_path, targets=["onnx", "tensorrt"], time=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # tensorrt takes no zero points
    assert "tensorrt: not written: " in str(fleet) and "zero point" in str(fleet)
    with pytest.raises(VerificationError, match="zero point"):
        fleet["tensorrt"]


def test_a_runtime_that_breaks_is_one_line_of_the_table(
    quantized: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_target(tmp_path, monkeypatch, "breaks", "write", "RuntimeError('no kernel\\nat line 3')")
    fleet = fewbit.export(quantized, tmp_path / "out", targets=["breaks", "onnx"], time=False)
    assert list(fleet.artifacts) == ["onnx"]
    assert str(fleet.failed["breaks"]).endswith("breaks failed with RuntimeError: no kernel")
    with pytest.raises(TargetError, match=r"no target could be written:\n  breaks: "):
        fewbit.export(quantized, tmp_path / "out", targets=["breaks"], time=False)


def test_a_file_that_cannot_be_evaluated_is_kept_and_says_so(
    quantized: QuantizedModel,
    test: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_target(tmp_path, monkeypatch, "closed", "open", "RuntimeError('one sample only')")
    (tmp_path / "closed.py").write_text((tmp_path / "closed.py").read_text() + "\n\nopen_exact = open\n")
    fleet = fewbit.export(quantized, tmp_path, targets=["closed"], test=test, verify=False)
    assert fleet["closed"].path.is_file() and not fleet.reports
    assert "closed: not evaluated: " in str(fleet) and "one sample only" in str(fleet)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: (x[:, :, :4], y), "has shape"),
        (lambda x, y: x, "has no labels"),
        (lambda x, y: iter([(x, y)]), "read once"),
    ],
)
def test_unfit_data_is_refused_before_anything_is_written(
    quantized: QuantizedModel,
    test: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    wrong: object,
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        fewbit.export(quantized, tmp_path / "out", targets=["onnx"], test=wrong(*test))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", ["onnx", []])
def test_targets_are_a_list(quantized: QuantizedModel, tmp_path: Path, targets: object) -> None:
    with pytest.raises(TargetError, match="expected a list of names"):
        fewbit.export(quantized, tmp_path, targets=targets)


def test_an_unknown_target_is_found_before_work_begins(quantized: QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="did you mean 'litert'"):
        fewbit.export(quantized, tmp_path / "out", targets=["onnx", "litrt"])
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def files(quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A float and an int8 file."""
    folder = tmp_path_factory.mktemp("files")
    model, data = demo.load()
    example = torch.from_numpy(data.test_images[:4])
    fewbit.export(model, folder / "float.onnx", example=example)
    fewbit.export(quantized, folder / "int8.onnx", time=False)
    return [folder / "float.onnx", folder / "int8.onnx"]


def test_benchmark_compares_with_the_first(files: list[Path], test: tuple[np.ndarray, np.ndarray]) -> None:
    result = fewbit.benchmark(files, test, metrics=["accuracy", "f1"], rounds=3)
    first, second = map(str, files)
    answer = json.loads(json.dumps(result.to_json()))
    assert answer[first]["ratio"]["median"] == 1.0 and answer[first]["report"]["agreement"]["identical"]
    pairs = zip(result.times[second].rounds, result.times[first].rounds, strict=True)
    assert answer[second]["ratio"]["median"] == pytest.approx(np.median([b / a for b, a in pairs]))
    assert answer[second]["report"]["metrics"]["accuracy"] > 0.95
    assert answer[second]["report"]["agreement"]["sqnr_db"] < 60
    assert answer[second]["bytes"] == files[1].stat().st_size and "ONNX Runtime" in answer[second]["runtime"]
    header, *rows = str(result).splitlines()
    assert "accuracy" in header and [row.split()[0] for row in rows] == [first, second]
    assert "same class" not in rows[0] and "same class" in rows[1] and " dB" in rows[1]


def test_benchmark_runs_the_batch_that_it_says(
    files: list[Path], test: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_target(tmp_path, monkeypatch, "sizes", "open", "")
    text = (tmp_path / "sizes.py").read_text()
    body = "    def run(x):\n        SEEN.append(len(x))\n        return [x]\n\n    return run\n"
    (tmp_path / "sizes.py").write_text(text.replace("    raise \n", body) + "\n\nSEEN = []\n")
    (tmp_path / "a.sizes").touch()
    fewbit.benchmark([tmp_path / "a.sizes"], test[0], batch=3, rounds=2)
    fewbit.benchmark([tmp_path / "a.sizes"], [test[0][:64], test[0][64:128]], batch=3, rounds=2)
    assert set(fewbit.targets.get_target("sizes").SEEN) == {3}
    with pytest.raises(DataError, match="has 200 samples in its first batch; expected 300"):
        fewbit.benchmark(files, test[0], batch=300)


def test_bytes_beside_a_file_count(tmp_path: Path) -> None:
    for name, size in (("a.onnx", 10), ("a.onnx.data", 1000), ("a.bin", 7), ("a.xml", 30), ("b.onnx", 1)):
        (tmp_path / name).write_bytes(bytes(size))
    found = {p: fewbit.versus.size_of(tmp_path / p) for p in ("a.onnx", "a.xml", "b.onnx")}
    assert found == {"a.onnx": 1010, "a.xml": 37, "b.onnx": 1}


def test_benchmark_names_the_file_that_fails(
    files: list[Path], test: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "damaged.onnx").write_bytes(files[1].read_bytes()[:500])
    with pytest.raises(ArtifactError, match=r"damaged\.onnx"):
        fewbit.benchmark([files[0], tmp_path / "damaged.onnx"], test)
    with pytest.raises(TargetError, match=r"float\.onnx: does not run on inputs of shape \(1, 2, 8, 8\): "):
        fewbit.benchmark(files, test[0].repeat(2, axis=1))
    with pytest.raises(TargetError, match=r"no target has the suffix .\.npz"):
        fewbit.benchmark([tmp_path / "data.npz"], test)
    with pytest.raises(ArtifactError, match="no files"):
        fewbit.benchmark([], test)
    with pytest.raises(DataError, match="read once"):
        fewbit.benchmark(files, iter([test]), metrics=["accuracy"])
    with pytest.raises(DataError, match="run on data"):
        fewbit.benchmark(files)
