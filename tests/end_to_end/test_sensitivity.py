"""fewbit.sensitivity as people use it: a table, JSON, a chart, the command; and what it refuses, word for word."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fewbit
from fewbit import demo
from fewbit.charts import line_chart
from fewbit.cli import app
from fewbit.errors import (
    ArtifactError,
    CalibrationError,
    DataError,
    FormatError,
    ModelError,
    PlanError,
    RecipeError,
)
from fewbit.search.harm import Sensitivity


@pytest.fixture(scope="module")
def measured() -> Sensitivity:
    model, data = demo.load()
    return fewbit.sensitivity(model, data.calibration_images[:64])


def test_few_bits_do_more_harm(measured: Sensitivity) -> None:
    assert len(measured.rows) == 6 * 3
    assert measured.samples == 64
    for layer in {row.layer for row in measured.rows}:
        eight, four, two = (measured.row(layer, name) for name in ("int8", "int4", "int2"))
        assert eight.metrics["sqnr"] > four.metrics["sqnr"] > two.metrics["sqnr"]
        for metric in ("kl", "hessian", "fisher"):
            assert eight.metrics[metric] < four.metrics[metric] < two.metrics[metric]
    assert measured.worst("kl", "int2", 1)[0].layer == "conv1"
    assert measured.worst("sqnr", "int2", 1)[0].layer == "conv1"


def test_table_json_and_chart(measured: Sensitivity, tmp_path: Path) -> None:
    lines = str(measured).splitlines()
    assert lines[0].split() == ["layer", "format", "error", "sqnr", "kl", "hessian", "fisher", "weights"]
    assert lines[2].startswith("conv1")
    assert lines[2].endswith("288")
    shown = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    assert shown["rows"][3]["layer"] == "conv2"
    assert shown["rows"][3]["metrics"]["kl"] == measured.rows[3].metrics["kl"]
    drawn = ElementTree.parse(measured.plot(tmp_path / "harm.svg", "kl")).getroot()
    assert len([e for e in drawn.iter() if e.tag.endswith("polyline")]) == 3
    assert len([e for e in drawn.iter() if e.tag.endswith("circle")]) == 18


def test_a_chart_leaves_out_what_cannot_be_drawn() -> None:
    svg = line_chart(
        "a < b", ["x", "y", "z"], {"s": [1.0, float("inf"), None], "t": [0.0, 10.0, 100.0]}, log=True
    )
    points = [e.get("points") for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("polyline")]
    assert [len(p.split()) for p in points if p] == [1, 2]
    assert "a &lt; b" in svg


def test_the_command(tmp_path: Path) -> None:
    _, data = demo.load()
    np.save(tmp_path / "images.npy", data.calibration_images[:16])
    weights = Path(demo.__file__).parent / "digits.safetensors"
    arguments = ["sensitivity", "fewbit.demo:DigitsNet", "--weights", str(weights)]
    arguments += ["--calibration", str(tmp_path / "images.npy"), "--candidates", "int8,int2"]
    arguments += ["--metrics", "sqnr", "--plot", str(tmp_path / "harm.svg"), "--json"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout)["rows"]
    assert [row["format"] for row in rows[:2]] == ["int8", "int2"]
    assert (tmp_path / "harm.svg").read_text().startswith("<svg")
    np.savez(tmp_path / "test.npz", images=data.test_images[:32], labels=data.test_labels[:32])
    arguments = [
        *arguments[:4],
        "--calibration",
        str(tmp_path / "test.npz"),
        "--ratios",
        "0.25,0.5",
        "--json",
    ]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["metrics"] == ["sqnr", "kl", "loss", "accuracy"]
    assert [row["format"] for row in json.loads(answer.stdout)["rows"][:2]] == ["25%", "50%"]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


class Roots(nn.Module):
    """Gives nan for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(self.head(x))


X = torch.randn(8, 4)
REFUSED = {
    "a single name": (
        lambda: fewbit.sensitivity(net(), X, "int4"),
        RecipeError,
        "candidates is 'int4', expected names of formats such as (\"int8\", \"int4\")",
    ),
    "an unknown format": (lambda: fewbit.sensitivity(net(), X, ("int44",)), FormatError, "int44"),
    "float": (lambda: fewbit.sensitivity(net(), X, ("float",)), FormatError, "float"),
    "an unknown metric": (
        lambda: fewbit.sensitivity(net(), X, metrics=("sqrn",)),
        RecipeError,
        "unknown metric 'sqrn': did you mean 'sqnr'? available: sqnr, kl, hessian, fisher",
    ),
    "no probes": (
        lambda: fewbit.sensitivity(net(), X, probes=0), RecipeError, "probes is 0, expected at least 1"),
    "no classes": (
        lambda: fewbit.sensitivity(nn.Linear(4, 1), X),
        DataError,
        "hessian and fisher compares predictions, and the model's output of shape (8, 1) has no classes: measure "
        'metrics=("sqnr",)',
    ),
    "no weights": (
        lambda: fewbit.sensitivity(nn.ReLU(), X, metrics=("sqnr",)),
        PlanError,
        "the model has no tensor that could be quantized",
    ),
    "no data": (lambda: fewbit.sensitivity(net(), []), DataError, "calibration data is empty"),
    "not a model": (lambda: fewbit.sensitivity("net", X), ModelError, "the model is a str"),
    "another suffix": (
        lambda: fewbit.sensitivity(net(), X, metrics=("sqnr",)).plot("harm.png"),
        ArtifactError,
        "harm.png: charts are drawn as SVG: give a name that ends in .svg",
    ),
    "not measured": (
        lambda: fewbit.sensitivity(net(), X, metrics=("sqnr",)).plot("harm.svg", "kl"),
        RecipeError,
        "metric 'kl' was not measured: available: sqnr",
    ),
    "an unknown layer": (
        lambda: fewbit.sensitivity(net(), X, metrics=("sqnr",)).row("3", "int8"),
        ModelError,
        "no layer '3' in int8: available: 0, 2",
    ),
    "overflow": (
        lambda: fewbit.sensitivity(Roots().eval(), X, metrics=("kl",)),
        CalibrationError,
        "head: kl is not a number on the calibration data; look for NaN or infinite values in the data or the weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_leaves_the_model_and_takes_a_generator_once() -> None:
    model = net().train()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    found = fewbit.sensitivity(model, (x for x in X.split(2)), ("int4",))
    assert found.samples == 8
    assert model.training
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_codebooks_and_regression() -> None:
    model = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 1)).eval()
    found = fewbit.sensitivity(model, torch.randn(8, 256), ("codebook4", "int4"), metrics=("sqnr",))
    assert found.row("0", "codebook4").error < found.row("0", "int4").error
