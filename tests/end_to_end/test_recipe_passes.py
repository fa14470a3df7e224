"""The recipe keys of passes that look at data, through fewbit.quantize: what they do, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.errors import CalibrationError, DataError, RecipeError
from fewbit.passes import analytic_bias_correction, bias_correction


class Stacked(nn.Module):
    """Channels of unlike size in front of a linear layer, a batch norm in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.last, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(torch.relu(self.norm(self.conv(x))))).mean((2, 3)))


def prepared() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Stacked(), torch.randn(64, 2, 9, 9)
    with torch.no_grad():
        model.norm.weight.copy_(torch.randn(8).mul(1.5).exp())
        model.norm.bias.copy_(6 * model.norm.weight)
        model.norm.momentum = None
        model.train()(x)
    return model.eval(), x


def test_smoothing_and_absorbing_help_few_bits_and_keep_the_float_model() -> None:
    model, x = prepared()
    with torch.no_grad():
        expected = model(x)
    errors = {}
    for name, settings in {
        "plain": {},
        "smooth": {"smooth_quant": 0.5},
        "absorb": {"absorb_bias": True},
    }.items():
        wide = fewbit.quantize(model, x, weights="int8", activations="float", progress=False, **settings)
        assert float((wide(x) - expected).norm() / expected.norm()) < 0.02, name
        few = fewbit.quantize(
            model, x, weights="int8", activations="int4", target="torch", progress=False, **settings
        )
        errors[name] = float((few(x) - expected).norm() / expected.norm())
    assert errors["smooth"] < errors["plain"]
    assert errors["absorb"] < errors["plain"]
    assert any("smoothed, factors" in n for n in fewbit.quantize(model, x, smooth_quant=True).facts["notes"])


def test_each_bias_correction_is_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared()
    called: list[str] = []
    for module in (bias_correction, analytic_bias_correction):
        real, name = module.apply, module.__name__.rpartition(".")[2]
        monkeypatch.setattr(
            module, "apply", lambda *a, real=real, name=name, **k: (called.append(name), real(*a, **k))[1]
        )
    for value in (False, True, "empirical", "analytic"):
        fewbit.quantize(model, x, weights="int4", bias_correction=value, progress=False)
    assert called == ["bias_correction", "bias_correction", "analytic_bias_correction"]


def test_analytic_correction_through_the_pipeline_moves_the_mean_back() -> None:
    model, x = prepared()
    with torch.no_grad():
        wanted = model(x).mean(0)
        off = {}
        for value in (False, "analytic"):
            made = fewbit.quantize(
                model, x, weights="int3", target="torch", equalize=True, bias_correction=value,
                rules=[{"match": "head", "weights": "int8"}, {"match": "conv", "weights": "int8"}],
            )  # fmt: skip
            off[value] = float((made(x).mean(0) - wanted).norm())
    assert off["analytic"] < off[False]


REFUSED = {
    "alpha": (
        {"smooth_quant": 1.5}, RecipeError, "smooth_quant is 1.5, expected true or false or alpha, from 0 to 1"),
    "which correction": (
        {"bias_correction": "exact"},
        RecipeError,
        "bias_correction is 'exact', expected true or false or one of empirical, analytic",
    ),
    "absorb": ({"absorb_bias": 1}, RecipeError, "absorb_bias is 1, expected true or false"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    settings, error, message = REFUSED[name]
    model, x = prepared()
    with pytest.raises(error, match=re.escape(message)):
        fewbit.quantize(model, x, **settings)


def test_smoothing_needs_data_that_can_be_read_again() -> None:
    model, x = prepared()
    with pytest.raises(
        CalibrationError, match="smooth_quant measures the layers' inputs: give calibration data"
    ):
        fewbit.quantize(model, example=x[:4], activations="float", smooth_quant=True)
    for key in ("smooth_quant", "absorb_bias", "bias_correction"):
        with pytest.raises(DataError, match=f"{key} reads the calibration data several times"):
            fewbit.quantize(model, (part for part in x.split(8)), **{key: True})
