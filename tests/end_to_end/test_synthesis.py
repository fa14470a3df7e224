"""Synthetic inputs: statistics are met, classes are balanced, an interrupted call resumes; and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
import fewbit.synthesis
from fewbit import demo
from fewbit.errors import ArtifactError, CalibrationError, DataError, ModelError
from fewbit.synthesis import _location, _sizes, _stretched, _Target, statistics_error, synthesize

QUICK: dict[str, Any] = {"steps": 30, "progress": False}


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor]:
    model, data = demo.load()
    return model, torch.from_numpy(data.calibration_images)


@pytest.fixture(scope="module")
def learned(digits: tuple[nn.Module, Tensor]) -> Tensor:
    return synthesize(digits[0], digits[1][:1], samples=128, **QUICK)


def error_by_definition(model: nn.Module, x: Tensor) -> float:
    """Root mean square, over channels and batch norms, of what is off in mean and standard deviation, float64."""
    twin = demo.DigitsNet().double().eval()
    twin.load_state_dict(model.state_dict())
    found = []

    def look(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        y = inputs[0].transpose(0, 1).flatten(1)
        std = (norm.running_var + norm.eps).sqrt()
        mean_off = (y.mean(1) - norm.running_mean) / std
        std_off = ((y.var(1, correction=0) + norm.eps).sqrt() - std) / std
        found.append(float((mean_off**2 + std_off**2).mean()))

    for part in twin.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_pre_hook(look)
    with torch.no_grad():
        twin(x.double())
    return (sum(found) / len(found)) ** 0.5


def test_statistics_are_those_of_training(digits: tuple[nn.Module, Tensor], learned: Tensor) -> None:
    model, images = digits
    assert (learned.shape, learned.dtype) == ((128, 1, 8, 8), torch.float32)
    assert statistics_error(model, images) == pytest.approx(error_by_definition(model, images), rel=1e-3)
    assert statistics_error(model, learned) == pytest.approx(error_by_definition(model, learned), rel=1e-3)
    assert statistics_error(model, torch.rand(128, 1, 8, 8)) > 0.5
    assert statistics_error(model, learned) < 0.2
    assert abs(float(learned.mean() - images.mean())) < 0.15
    assert float(learned.std() / images.std()) == pytest.approx(1, abs=0.3)


def test_every_class_is_there_and_inputs_differ(digits: tuple[nn.Module, Tensor], learned: Tensor) -> None:
    with torch.no_grad():
        classes = digits[0](learned).argmax(1).bincount(minlength=10)
    assert classes.min() >= 3, classes
    distances = torch.cdist(learned.flatten(1), learned.flatten(1)) + 1e9 * torch.eye(128)
    assert distances.min() > 0.5


def test_a_seed_repeats_whatever_torchs_own_state_is(digits: tuple[nn.Module, Tensor]) -> None:
    model, images = digits
    settings = {"samples": 20, "batch_size": 12, "steps": 3, "progress": False}
    first = synthesize(model, images[:1], **settings)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = synthesize(model, images[:3], **settings)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, synthesize(model, images[:1], seed=1, **settings))
    assert not any(p.grad is not None for p in model.parameters())


def interrupted(after: int) -> Callable[..., Any]:
    """The learning of a batch, with Ctrl-C once that many are done."""
    done = 0
    learn = fewbit.synthesis._learn

    def stop(*args: Any) -> Tensor:
        nonlocal done
        if done == after:
            raise KeyboardInterrupt
        done += 1
        return learn(*args)

    return stop


def test_interrupted_goes_on_with_the_same_result(
    digits: tuple[nn.Module, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = digits
    file = tmp_path / "inputs.safetensors"
    settings = {"samples": 30, "batch_size": 10, "steps": 3, "progress": False}
    whole = synthesize(model, images[:1], **settings)
    with monkeypatch.context() as patched:
        patched.setattr(fewbit.synthesis, "_learn", interrupted(2))
        with pytest.raises(KeyboardInterrupt):
            synthesize(model, images[:1], resume=file, **settings)
    with pytest.raises(CalibrationError, match="inputs of another model or other settings"):
        synthesize(model, images[:1], resume=file, seed=5, **settings)
    monkeypatch.setattr(
        fewbit.synthesis, "_learn", interrupted(1)
    )  # more than one batch left would be a Ctrl-C
    assert torch.equal(synthesize(model, images[:1], resume=file, **settings), whole)
    assert not file.exists()
    file.write_bytes(b"\x08" + b"\0" * 30)
    with pytest.raises(ArtifactError, match="damaged synthetic inputs"):
        synthesize(model, images[:1], resume=file, **settings)


class Scaled(nn.Module):
    """Takes numbers of another offset and size, as networks for pixels from 0 to 255 do."""

    def __init__(self, model: nn.Module, offset: float, scale: float) -> None:
        super().__init__()
        self.model, self.offset, self.scale = model, offset, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.offset) / self.scale)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 255.0), (-3.0, 4.0)])
def test_noise_starts_where_the_model_expects_numbers(
    digits: tuple[nn.Module, Tensor], offset: float, scale: float
) -> None:
    model, images = digits
    gm, shape = fewbit.synthesis._graph(Scaled(model, offset, scale), images[:2])
    start, size = _location(_Target(gm, False, "cpu"), shape, "cpu")
    assert scale / 8 <= size <= scale
    assert abs(start - offset - scale * float(images.mean())) <= scale / 4


def test_layers_from_fine_to_coarse() -> None:
    assert _sizes((2, 3, 32, 20), (2, 3)) == [(2, 3, 32, 20), (2, 3, 16, 10), (2, 3, 8, 5), (2, 3, 4, 3)]
    assert _sizes((2, 49, 10), (1,)) == [(2, 49, 10), (2, 25, 10), (2, 13, 10), (2, 7, 10)]
    assert _sizes((2, 7), ()) == [(2, 7)]
    coarse = torch.randn(2, 4, 5, 3)
    last = _stretched(coarse, torch.Size((2, 8, 10, 3)), (1, 2))
    first = nn.functional.interpolate(coarse.permute(0, 3, 1, 2), (8, 10), mode="bilinear").permute(
        0, 2, 3, 1
    )
    assert torch.equal(last, first)


def test_quantize_without_data(digits: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = digits
    asked = []

    def few(module: nn.Module, example: Any, progress: bool) -> Tensor:
        asked.append(progress)
        return synthesize(module, example, samples=64, **QUICK)

    monkeypatch.setattr("fewbit.pipeline.synthesize", few)
    quantized = fewbit.quantize(model, "synthetic", example=images[:1], weights="int4", progress=False)
    assert (asked, quantized.facts["samples"]) == ([False], 64)
    with torch.no_grad():
        same = (quantized(images).argmax(1) == model(images).argmax(1)).float().mean()
    assert same > 0.95


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    ).eval()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x) + y


X = torch.randn(2, 3, 8, 8)
REFUSED = {
    "no batch norm": (
        lambda: synthesize(nn.Linear(4, 2), torch.zeros(2, 4)),
        ModelError,
        "the model has no batch norm statistics to learn inputs from: give calibration data",
    ),
    "no statistics": (
        lambda: synthesize(nn.BatchNorm1d(4, track_running_stats=False), torch.zeros(2, 4)),
        ModelError,
        "the model has no batch norm statistics to learn inputs from: give calibration data",
    ),
    "no example": (
        lambda: synthesize(plain()),
        DataError,
        "synthetic inputs need the shape of an input: give example=torch.zeros(1, 3, 32, 32)",
    ),
    "two inputs": (
        lambda: synthesize(Two().eval(), (torch.zeros(2, 3), torch.zeros(2, 3))),
        ModelError,
        "this one takes float32 (2, 3), float32 (2, 3): give calibration data",
    ),
    "no samples": (lambda: synthesize(plain(), X, samples=0), DataError, "samples is 0, expected at least 1"),
    "tiny batches": (
        lambda: synthesize(plain(), X, batch_size=4), DataError, "batch_size is 4: statistics of fewer than 8"),
    "quantized": (
        lambda: synthesize(fewbit.quantize(plain(), example=X, activations="dynamic"), X),
        ModelError,
        "the model is quantized already; learn inputs from the float model it came from",
    ),
    "no data and no batch norm": (
        lambda: fewbit.quantize(nn.Linear(4, 2), "synthetic", example=torch.zeros(2, 4)),
        ModelError,
        "the model has no batch norm statistics to learn inputs from: give calibration data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=re.escape(message)):
        call()
