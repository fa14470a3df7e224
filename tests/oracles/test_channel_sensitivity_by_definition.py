"""Sensitivity to pruning against its definition: weights of the model that read the pruned channels set to zero."""

from __future__ import annotations

import copy
import math
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewbit
from fewbit.errors import DataError, ModelError, RecipeError

RATIOS = (0.25, 0.5)


class Net(nn.Module):
    """A shortcut over one layer, so that `stem` and `add` leave together, and a layer inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.add = (
            nn.Conv2d(2, 8, 3, padding=1),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.Conv2d(12, 8, 1),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.add(F.relu(self.inner(x))) + x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    net = Net().eval()
    net.head.bias.data.zero_()  # so that predictions depend on the input
    net.head.weight.data -= net.head.weight.data.mean(0)
    return net


def data(count: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(5, (count,), generator=generator)


def least(weights: list[Tensor], count: int) -> Tensor:
    """The units with the smallest length, as the criterion defines it: mean squares of each weight's rows, added."""
    return sum((w.flatten(1).square().mean(1) for w in weights), torch.zeros(())).argsort()[:count]


def without(model: nn.Module, group: str, ratio: float) -> nn.Module:
    """What reads the channels reads zero instead."""
    twin = copy.deepcopy(model)
    stem, inner, add, head = (twin.get_submodule(n).weight.data for n in ("stem", "inner", "add", "head"))
    if group == "stem":
        units = least([stem, inner.transpose(0, 1), add, head.T], round(ratio * 8))
        inner[:, units] = 0
        head[:, units] = 0
    else:
        units = least([inner, add.transpose(0, 1)], round(ratio * 12))
        add[:, units] = 0
    return twin


@pytest.mark.parametrize("batch_size", [7, 64])
def test_metrics_are_their_definitions(model: nn.Module, batch_size: int) -> None:
    x, labels = data()
    found = fewbit.sensitivity(model, (x, labels), ratios=RATIOS, batch_size=batch_size, progress=False)
    assert [(row.layer, row.format) for row in found.rows] == [
        (layer, name) for layer in ("stem", "inner") for name in ("25%", "50%")
    ]
    assert found.samples == 20 and found.metrics == ("sqnr", "kl", "loss", "accuracy")
    falls = set()
    with torch.no_grad():
        before = model(x).double()
        for row in found.rows:
            after = without(model, row.layer, float(row.format[:-1]) / 100)(x).double()
            p, q = before.log_softmax(1), after.log_softmax(1)
            noise = float((before - after).square().sum())
            expected = {
                "sqnr": 10 * math.log10(float(before.square().sum()) / noise),
                "kl": float((p.exp() * (p - q)).sum(1).mean()),
                "loss": float(F.nll_loss(q, labels) - F.nll_loss(p, labels)),
                "accuracy": float(
                    ((p.argmax(1) == labels).double() - (q.argmax(1) == labels).double()).mean()
                ),
            }
            falls.add(expected["accuracy"])
            assert dict(row.metrics) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert falls != {0.0}


def test_what_leaves_is_counted(model: nn.Module) -> None:
    row = fewbit.sensitivity(model, data()[0], ratios=(0.5,), progress=False).row("inner", "50%")
    assert row.weights == 6 * (8 * 9 + 1 + 8)
    inner, bias, add = model.inner.weight.detach(), model.inner.bias.detach(), model.add.weight.detach()
    units = least([inner, add.transpose(0, 1)], 6)
    parts = [inner[units].square().sum(), bias[units].square().sum(), add[:, units].square().sum()]
    whole = inner.square().sum() + bias.square().sum() + add.square().sum()
    assert row.error == pytest.approx(float(sum(parts) / whole), rel=1e-5)
    assert set(row.metrics) == {"sqnr", "kl"}, "without labels"


def test_criteria_and_losses_are_chosen(model: nn.Module) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 3 * F.cross_entropy(output, target)

    def ask(**settings: object) -> dict[str, float]:
        found = fewbit.sensitivity(model, data(), ratios=(0.5,), progress=False, **settings)  # type: ignore[arg-type]
        return dict(found.row("inner", "50%").metrics)

    plain = ask()
    assert ask(loss=loss)["loss"] == pytest.approx(3 * plain["loss"], rel=1e-4)
    assert (
        ask(criterion="random", seed=3) == ask(criterion="random", seed=3) != ask(criterion="random", seed=5)
    )
    assert ask(criterion="taylor")["loss"] < ask(criterion="random", seed=3)["loss"]


def test_a_chart_has_a_line_for_each_ratio(model: nn.Module, tmp_path: object) -> None:
    found = fewbit.sensitivity(model, data(), ratios=RATIOS, metrics=("loss",), progress=False)
    drawn = ElementTree.parse(found.plot(f"{tmp_path}/harm.svg")).getroot()
    assert len([e for e in drawn.iter() if e.tag.endswith("polyline")]) == 2
    assert len([e for e in drawn.iter() if e.tag.endswith("circle")]) == 4


def test_what_cannot_be_measured_is_said(model: nn.Module) -> None:
    x, labels = data()
    for error, settings, message in [
        (RecipeError, {"ratios": (0.5, 1.0)}, r"ratios is \(0.5, 1.0\), expected shares"),
        (RecipeError, {"ratios": (0.5,), "metrics": ("hessian",)}, "unknown metric 'hessian'"),
        (RecipeError, {"metrics": ("accuracy",)}, "unknown metric 'accuracy'"),
        (DataError, {"ratios": (0.5,), "metrics": ("loss",)}, "have no labels"),
    ]:
        with pytest.raises(error, match=message):
            fewbit.sensitivity(model, x, progress=False, **settings)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no channels that could leave"):
        fewbit.sensitivity(nn.Linear(4, 3), torch.randn(4, 4), ratios=(0.5,), progress=False)
    with pytest.raises(DataError, match='leave "accuracy" out'):
        fewbit.sensitivity(
            model, (x, labels.reshape(-1, 1)), ratios=(0.5,), metrics=("accuracy",), progress=False
        )
