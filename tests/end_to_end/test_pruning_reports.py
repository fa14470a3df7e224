"""What pruning says of itself: bytes, pictures, the model beside the smaller one, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fewbit
from fewbit import demo, stopwatch
from fewbit.cli import app
from fewbit.errors import DataError
from fewbit.evaluation.latency import Latency


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruning")
    data = demo.load_digits_split()
    np.savez(folder / "train.npz", images=data.train_images[:256], labels=data.train_labels[:256])
    np.savez(folder / "test.npz", images=data.test_images[:200], labels=data.test_labels[:200])
    return folder


@pytest.fixture(scope="module")
def small() -> Any:
    model, data = demo.load()
    return fewbit.prune(model, torch.from_numpy(data.test_images[:2]), speedup=2.0, progress=False)


def test_bytes_by_tensor(small: Any) -> None:
    report = small.meta["pruning"]
    shown = json.loads(json.dumps(report.to_json()))
    whole, left = demo.load()[0].state_dict(), small.state_dict()
    assert shown["tensors"] == {
        name: [t.numel() * t.element_size(), left[name].numel() * left[name].element_size()]
        for name, t in whole.items()
    }
    assert shown["bytes"] == [sum(pair[n] for pair in shown["tensors"].values()) for n in (0, 1)]
    assert f"bytes {shown['bytes'][0]:,} -> {shown['bytes'][1]:,}" in str(report)
    assert shown["groups"][0] == {
        "layer": "conv1",
        "before": 32,
        "after": len(left["bn1.weight"]),
        "reason": None,
    }


def test_the_picture_has_the_channels_of_each_layer(small: Any, tmp_path: Path) -> None:
    root = ElementTree.parse(small.meta["pruning"].plot(tmp_path / "channels.svg")).getroot()
    lines = [e.get("points", "").split() for e in root.iter() if e.tag.endswith("polyline")]
    assert [len(points) for points in lines] == [4, 4]
    heights = [[float(point.split(",")[1]) for point in points] for points in lines]
    assert heights[0][3] == heights[1][3], "the model's outputs stay"
    assert all(a < b for a, b in zip(heights[0][:3], heights[1][:3], strict=True)), "y runs downwards"
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"before", "after", "conv1", "head"} <= set(texts)
    assert texts[1] == "0", "the axis begins at zero, so that heights can be compared"


def test_a_model_beside_the_smaller_one(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = demo.load()
    images, labels = data.test_images[:100], data.test_labels[:100]
    timed: list[Any] = []

    def once(graphs: Any, rounds: int) -> dict[int, Latency]:
        timed.extend(len(inputs[0]) for _, inputs in graphs.values())
        return {n: Latency(4.0 - 2 * n, 0, 0, 1, (4.0 - 2 * n,)) for n in graphs}

    monkeypatch.setattr(stopwatch, "timed", once)
    found = fewbit.compare(model, small, torch.from_numpy(images[:3]), test=(images, labels), rounds=1)
    assert found.macs == (small.meta["pruning"].macs_before, small.meta["pruning"].macs)
    assert found.parameters == (22090, sum(p.numel() for p in small.parameters()))
    assert timed == [3, 3] and found.batch == 3
    assert found.report is not None and found.report.baseline is not None
    assert found.report.metrics["accuracy"] == pytest.approx(demo.accuracy(small, images, labels))
    assert found.report.baseline["accuracy"] == pytest.approx(demo.accuracy(model, images, labels))
    text, shown = str(found), json.loads(json.dumps(found.to_json()))
    assert "ONNX Runtime, 1 thread" in text and "PyTorch" in text and "same class" in text
    assert shown["latency"]["ONNX Runtime, 1 thread"]["ratio"]["median"] == 0.5
    assert fewbit.compare(model, small, test=(images, labels), times=False).times == {}
    with pytest.raises(DataError, match="give an example input, or test="):
        fewbit.compare(model, small)


def run(*arguments: str | Path) -> Any:
    weights = Path(demo.__file__).parent / "digits.safetensors"
    command = ["prune", "fewbit.demo:DigitsNet", "--weights", str(weights), *map(str, arguments), "--json"]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def test_the_command_saves_a_folder(folder: Path) -> None:
    answer = run(
        "--speedup", 2.0, "--data", folder / "train.npz", "--criterion", "taylor", "--ignore", "conv2,head",
        "--test", folder / "test.npz", "--plot", folder / "channels.svg", "-o", folder / "small",
    )  # fmt: skip
    before, after = answer["pruning"]["macs"]
    assert before >= 2 * after
    assert {each["layer"]: each["after"] for each in answer["pruning"]["groups"]}["conv2"] == 32
    assert answer["comparison"]["report"]["metrics"]["accuracy"] > 0.8
    assert (folder / "channels.svg").read_text().startswith("<svg")
    loaded: Any = fewbit.load(folder / "small")
    assert isinstance(loaded, nn.Module)
    assert sum(p.numel() for p in loaded.parameters()) == answer["pruning"]["parameters"][1]


def test_the_command_writes_a_runtimes_file(folder: Path) -> None:
    answer = run(
        "--parameters",
        12000,
        "--shape",
        "1,1,8,8",
        "--scope",
        "uniform",
        "--multiple",
        4,
        "-o",
        folder / "small.onnx",
    )
    assert answer["artifact"]["size"] == (folder / "small.onnx").stat().st_size
    assert answer["artifact"]["verification"] is not None
    assert all(each["after"] % 4 == 0 for each in answer["pruning"]["groups"] if not each["reason"])


def test_the_command_refuses_two_budgets(folder: Path) -> None:
    with pytest.raises(AssertionError):
        run("--speedup", 2, "--latency", "1 ms", "--shape", "1,1,8,8", "-o", folder / "none.onnx")
    assert not (folder / "none.onnx").exists()
