"""The examples run as their readers run them, in small; figures of real size are in the documentation."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewbit
from fewbit.deploy import runner

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("name", "--option", ...)`` gives what the example's ``main`` returns; its files lie in ``tmp_path``."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delenv("FEWBIT_DATA", raising=False)

    def call(name: str, *options: str) -> Any:
        return importlib.import_module(name).main(["--quick", "--output", str(tmp_path), *options])

    return call


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("ai_edge_litert")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


def test_keras_to_tflite(run: Run, keras: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = run("keras_to_tflite")
    assert sizes["float16"] < 0.8 * sizes["float"] and sizes["int8"] < 0.8 * sizes["float"]
    names = ["model.tflite", "model.float16.tflite", "model.int8.tflite"]
    assert [(tmp_path / name).stat().st_size for name in names] == [
        sizes[kind] for kind in ("float", "float16", "int8")
    ]
    opened = [fewbit.targets.get_target("litert").open(tmp_path / name) for name in names]
    assert opened[2].inputs[0]["dtype"] == np.int8  # full integer: the file itself takes codes
    stored = [{np.dtype(t["dtype"]).name for t in file.it.get_tensor_details()} for file in opened]
    assert ["float16" in types for types in stored] == [False, True, False]
    x = torch.rand(64, 32, 32, 3) * 255
    given = keras.saving.load_model(tmp_path / "small.h5", compile=False)
    with torch.no_grad():
        floating = given(x)
    for name, tolerance in zip(names, (1e-6, 1e-3, 0.03), strict=True):  # of probabilities
        assert (runner(tmp_path / name)(x) - floating).abs().max() <= tolerance, name
    printed = capsys.readouterr().out
    assert "0 of 160 outputs differ" in printed and "x first" in printed

    resaved = tmp_path / "given.keras"
    given.save(resaved)
    assert run("keras_to_tflite", "--model", str(resaved)) == sizes


def test_dynamic_linear(run: Run, tmp_path: Path) -> None:
    found = run("dynamic_linear")
    assert (
        found["layers"] == 10
    )  # two of each encoder's attention, two of its feed-forward part, first and last
    assert found["ratio"] < 0.3
    loaded = fewbit.load(tmp_path / "rows.int8")
    kinds = [k.kind for k in fewbit.verify(tmp_path / "rows.int8.onnx").kernels if k.integer]
    assert kinds == ["dynamic_linear"] * 10
    x = torch.rand(4, 8, 8)
    assert (runner(tmp_path / "rows.int8.onnx")(x) - loaded(x)).abs().max() < 0.02


def test_mnist_mlp(run: Run, keras: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("mnist_mlp")
    assert abs(found["lost"]) <= 0.3 and found["bytes"] == (tmp_path / "mnist.int8.tflite").stat().st_size
    lines = capsys.readouterr().out.splitlines()
    assert sum("loss" in line and "accuracy" in line for line in lines) == 4
    assert (
        lines[-1].startswith(f"lost by 8 bits: {found['lost']:.2f}, by pruning")
        and "(500 pictures)" in lines[-1]
    )
    assert found["times"] > 8 and (tmp_path / "mnist.fewbit").stat().st_size < 8000


def test_lenet_two_runtimes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ai_edge_litert")
    differing = run("lenet_two_runtimes")
    assert differing["LiteRT, its fast kernels"] <= 2  # of 500: one rule of rounding, but not one kernel
    assert differing["LiteRT, its reference kernels"] <= 25
    printed = capsys.readouterr().out
    for name, count in differing.items():
        assert f"{name}: {count} of 500 predictions differ" in printed
    assert printed.count("  picture ") == sum(min(count, 5) for count in differing.values())
    assert {path.name for path in (tmp_path / "lenet").iterdir()} == {"model.onnx", "model.tflite"}


def test_pictures_of_real_data(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (x, y), (test_x, test_y) = importlib.import_module("pictures").load("mnist", data_dir)
    assert x.shape == (60000, 28, 28, 1) and test_x.shape == (10000, 28, 28, 1) and x.dtype == np.uint8
    assert y.dtype == test_y.dtype == np.int64 and len(set(y[:100].tolist())) == 10  # in random order


def test_an_example_as_a_process_says_where_data_is_missing(tmp_path: Path) -> None:
    program = [sys.executable, str(EXAMPLES / "dynamic_linear.py"), "--data", str(tmp_path)]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and f"{tmp_path}: no datasets.py there" in done.stderr


def test_every_example_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    examples = {path.stem for path in EXAMPLES.glob("*.py")} - {"pictures"}
    assert len(examples) == 4 and examples <= tested
