"""Sensitivity against its definitions: one layer rounded in a copy of the model, exact Hessians, written out slowly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fewbit.numerics.scheme import Scheme
from fewbit.observers import make_observer
from fewbit.rounding import round_weight
from fewbit.search.sensitivity import sensitivity


class Residual(nn.Module):
    """A layer called twice, a shortcut around it, a head: what a prefix must keep and what not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.grow, self.head = nn.Conv2d(6, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        z = F.relu(self.block(F.relu(self.block(y))) + y)
        return self.head(F.relu(self.grow(z)).mean((2, 3)) + y.mean((2, 3)).sum(1, True))


class Tiny(nn.Module):
    """Few enough weights for the whole Hessian."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def rounded(weight: Tensor, candidate: str) -> Tensor:
    scheme = Scheme(candidate, "channel", 0, narrow=True)
    observer = make_observer("mse", scheme)
    observer.update(weight)
    return round_weight("nearest", weight, scheme, *observer.bounds()).dequantize()


def by_definition(model: nn.Module, x: Tensor, layer: str, candidate: str) -> tuple[float, float]:
    """SQNR in dB and mean divergence in nats of the model with one layer's weights rounded, on all of x at once."""
    twin = copy.deepcopy(model)
    weight = twin.get_submodule(layer).weight
    weight.data = rounded(weight.data, candidate)
    with torch.no_grad():
        expected, found = model(x).double(), twin(x).double()
    noise = float((expected - found).square().sum())
    p, q = expected.softmax(1), found.softmax(1)
    return 10 * math.log10(float(expected.square().sum()) / noise), float((p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("batch_size", [3, 64])
def test_output_error_is_the_definition(batch_size: int) -> None:
    model, x = Residual().eval(), 3 * torch.randn(10, 3, 7, 7)
    found = sensitivity(model, x, ("int4", "int2"), metrics=("sqnr", "kl"), batch_size=batch_size)
    assert [(row.layer, row.format) for row in found.rows] == [
        (layer, name) for layer in ("stem", "block", "grow", "head") for name in ("int4", "int2")
    ]
    for row in found.rows:
        sqnr, kl = by_definition(model, x, row.layer, row.format)
        assert row.metrics["sqnr"] == pytest.approx(sqnr, abs=2e-3)
        assert row.metrics["kl"] == pytest.approx(kl, rel=2e-3, abs=1e-9)
        weight = model.get_submodule(row.layer).weight.detach()
        error = (rounded(weight, row.format) - weight).square().sum() / weight.square().sum()
        assert row.error == pytest.approx(float(error), rel=1e-4)


def exact_hessian(model: nn.Module, x: Tensor, layer: str) -> Tensor:
    """Of the mean cross entropy to the model's own predictions, in one layer's weights: float64 [n, n]."""
    model = copy.deepcopy(model).double()
    x = x.double()
    soft = model(x).softmax(1).detach()
    weight = model.get_submodule(layer).weight.detach()

    def loss(flat: Tensor) -> Tensor:
        answer = functional_call(model, {f"{layer}.weight": flat.reshape(weight.shape)}, (x,))
        return -(soft * answer.log_softmax(1)).sum(1).mean()

    return torch.autograd.functional.hessian(loss, weight.flatten())


@pytest.mark.parametrize("ending", ["logits", "probabilities"])
def test_trace_and_diagonal_are_those_of_the_exact_hessian(ending: str) -> None:
    logits = Tiny().eval()
    with torch.no_grad():
        logits.second.weight.mul_(4)  # predictions that are sure of something
    model = logits if ending == "logits" else nn.Sequential(logits, nn.Softmax(1)).eval()
    prefix = "" if ending == "logits" else "0."
    x = torch.randn(6, 4)
    found = sensitivity(model, x, ("int3",), metrics=("hessian", "fisher"), probes=3000, batch_size=4)
    for layer in ("first", "second"):
        hessian = exact_hessian(logits, x, layer)
        trace = float(hessian.trace())
        weight = logits.get_submodule(layer).weight.detach()
        squares = (rounded(weight, "int3") - weight).double().square().flatten()
        assert found.traces[prefix + layer] == pytest.approx(trace, rel=0.05)
        metrics = found.row(prefix + layer, "int3").metrics
        expected = trace / weight.numel() * float(squares.sum())
        assert metrics["hessian"] == pytest.approx(expected, rel=0.05)
        assert metrics["fisher"] == pytest.approx(float(hessian.diagonal() @ squares), rel=0.06)


def test_small_steps_cost_what_the_hessian_says() -> None:
    """For small errors, half of e^T H e is the divergence; Fisher's diagonal has the order of it."""
    model, x = Tiny().eval(), torch.randn(40, 4)
    found = sensitivity(model, x, ("int6",), metrics=("kl", "fisher"), probes=200)
    for layer in ("first", "second"):
        weight = model.get_submodule(layer).weight.detach()
        error = (rounded(weight, "int6") - weight).double().flatten()
        predicted = 0.5 * float(error @ exact_hessian(model, x, layer) @ error)
        assert found.row(layer, "int6").metrics["kl"] == pytest.approx(predicted, rel=0.1)


def test_a_seed_repeats_and_another_differs() -> None:
    model, x = Tiny().eval(), torch.randn(8, 4)
    first, again, other = (
        sensitivity(model, x, ("int4",), metrics=("hessian",), seed=seed).traces for seed in (0, 0, 1)
    )
    assert first == again != other
