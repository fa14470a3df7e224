"""A latency as the budget of `fewbit.prune`, by a made-up clock: nothing here depends on the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import fewbit
from fewbit import stopwatch
from fewbit.errors import ModelError, RecipeError
from fewbit.evaluation.costs import macs
from fewbit.evaluation.latency import Latency
from fewbit.latency_budget import seconds_of
from fewbit.model.graph import refresh
from fewbit.normalise import standard

Clock = Callable[..., dict[Any, Latency]]


class Net(nn.Module):
    """Two branches of the same work, `left` and `right`, in kernels of another form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.left, self.left_out = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.right = nn.Conv2d(16, 32, (1, 9), padding=(0, 4))
        self.right_out = nn.Conv2d(32, 16, (1, 9), padding=(0, 4))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = self.left_out(torch.relu(self.left(x))) + self.right_out(torch.relu(self.right(x)))
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def clock(dear: str = "", unknown: str = "nothing", power: float = 1.0) -> Clock:
    """1 ns for each multiply-accumulate and 20 us a call; layers called ``dear...`` take 30 times as long.

    ``power``: of which a network of several layers takes the time that its layers take together.
    """

    def timed(graphs: Mapping[Any, Any], rounds: int = 9, **settings: Any) -> dict[Any, Latency]:
        found = {}
        for name, (gm, inputs) in graphs.items():
            batch, layers = len(inputs[0]), macs(gm)
            if settings.get("skip") and any(each.layer.startswith(unknown) for each in layers):
                continue
            work = sum(
                each.macs * batch * (30 if dear and each.layer.startswith(dear) else 1) for each in layers
            )
            time = (0.02 + 1e-6 * work) ** (power if len(layers) > 1 else 1.0)
            found[name] = Latency(time, time, time, 1, (time,))
        return found

    return timed


def pictures(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("batch", [1, 6])
def test_a_latency_is_reached_and_told(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, scope: Any, batch: int
) -> None:
    monkeypatch.setattr(stopwatch, "timed", clock())
    x = pictures()[0][:batch]
    whole = 0.02 + 1e-6 * batch * sum(
        each.macs for each in fewbit.measure(model, x, repeat=1, seconds=0).layers
    )
    small = fewbit.prune(model, x, latency=f"{whole / 2} ms", scope=scope, multiple=1, progress=False)
    report = small.meta["pruning"]
    assert report.latency.before_ms == pytest.approx(whole) and report.latency.batch == batch
    assert 0.85 * whole / 2 < report.latency.after_ms <= whole / 2
    found = 0.02 + 1e-6 * batch * report.macs
    assert report.latency.after_ms == pytest.approx(found), "what was timed is what was given"
    assert "ms (" in str(report) and f"ONNX Runtime, 1 thread, batch {batch}" in str(report)
    assert report.to_json()["latency"]["after_ms"] == report.latency.after_ms
    in_seconds = fewbit.prune(model, x, latency=whole / 2e3, scope=scope, multiple=1, progress=False)
    assert in_seconds.meta["pruning"] == report


def test_what_a_channel_saves_is_measured_and_not_counted(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both branches have the same work; the one that takes longer loses more channels."""
    left = {}
    for dear in ("left", "right"):
        monkeypatch.setattr(stopwatch, "timed", clock(dear))
        small = fewbit.prune(
            model, data=pictures(), latency="2 ms", criterion="taylor", multiple=1, progress=False
        )
        left[dear] = {name: small.get_submodule(name).out_channels for name in ("left", "right")}
    assert left["left"]["left"] < left["right"]["left"] and left["right"]["right"] < left["left"]["right"]


@pytest.mark.parametrize("power", [0.4, 2.5])
def test_the_whole_model_decides_and_not_the_sum_of_its_layers(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, power: float
) -> None:
    monkeypatch.setattr(stopwatch, "timed", clock(power=power))
    x = pictures()[0][:1]
    budget = 0.6 * stopwatch.timed({"whole": (model_graph(model, x), (x,))})["whole"].median_ms
    small = fewbit.prune(model, x, latency=budget / 1e3, multiple=1, progress=False)
    assert 0.9 * budget < small.meta["pruning"].latency.after_ms <= budget


def model_graph(model: nn.Module, x: torch.Tensor) -> Any:
    """As pruning reads it."""
    gm = standard(model, (x,))
    refresh(gm, (x,))
    return gm


def test_channels_are_left_in_eights(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "timed", clock())
    small = fewbit.prune(model, pictures()[0][:1], latency="0.5 ms", progress=False)
    sizes = [small.get_submodule(name).out_channels for name in ("stem", "left", "right", "left_out")]
    assert all(size % 8 == 0 for size in sizes) and sizes != [16, 32, 32, 16]


def test_layers_that_cannot_be_timed_alone_and_steps(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "timed", clock(unknown="left"))
    small = fewbit.prune(model, pictures()[0][:1], latency="500us", steps=2, multiple=1, progress=False)
    assert 0.4 < small.meta["pruning"].latency.after_ms <= 0.5


class Words(nn.Module):
    """Operators of several kinds, each of which has to run alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 16), nn.LSTM(16, 24, batch_first=True)
        self.query, self.key, self.value = (nn.Linear(24, 32) for _ in range(3))
        self.out = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.embed(x))
        q, k, v = (
            layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.out(x.transpose(1, 2).flatten(2).mean(1))
        return out


def test_every_layer_runs_alone_in_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real files in the real runtime, each called once."""
    seen: list[Any] = []

    def once(runs: Mapping[Any, Callable[[], object]], **settings: Any) -> dict[Any, Latency]:
        for run in runs.values():
            run()
        seen.append(set(runs))
        found = {}
        for number, name in enumerate(runs):
            time = 1.0 - 0.01 * number  # what comes later is smaller
            found[name] = Latency(time, time, time, 1, (time,))
        return found

    monkeypatch.setattr(stopwatch, "latency", once)
    torch.manual_seed(0)
    x = torch.randint(20, (2, 5))
    small = fewbit.prune(Words().eval(), x, latency=0.995e-3, multiple=1, progress=False)
    assert small.meta["pruning"].latency.after_ms <= 0.995
    timed = repr(seen[1])
    assert all(each in timed for each in ("LSTM(16, 24", "in_features=24, out_features=32", "attention"))


def test_what_cannot_be_done_is_said(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "timed", clock())
    x = pictures()[0][:1]
    for asked, message in [
        ("3 minutes", 'expected a number and a unit, such as "3 ms"'),
        ("fast", "expected a number and a unit"),
        (-1.0, "expected a positive number"),
        ("1 s", "asks for no less than the model has"),
        (
            "0.1 ms",
            r"out of reach: with 10% of a group's channels \(in multiples of 8\) .* still takes 0.172 ms",
        ),
    ]:
        with pytest.raises(RecipeError, match=message):
            fewbit.prune(model, x, latency=asked, progress=False)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="got speedup, latency"):
        fewbit.prune(model, x, latency="1 ms", speedup=2.0)
    with pytest.raises(ModelError):
        fewbit.prune(fewbit.quantize(model, pictures()[0], progress=False), x, latency="1 ms")


def test_texts() -> None:
    assert seconds_of("3 ms") == pytest.approx(3e-3) and seconds_of("250us") == pytest.approx(250e-6)
    assert seconds_of("0.5 s") == 0.5 and seconds_of(0.25) == 0.25 and seconds_of(None) is None
