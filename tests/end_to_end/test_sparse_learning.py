"""Group lasso: its value by definition, its derivative at zero, what it does to pruning, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewbit
from fewbit import demo
from fewbit.errors import DataError, ModelError, RecipeError, TrainingError


class Net(nn.Module):
    """A shortcut, so that what `stem` and `two` make leaves together; batch norm; a layer called `inner` inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.two = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.two(F.relu(self.inner(x))) + x)
        out: Tensor = self.head(F.max_pool2d(x, 3).flatten(1))
        return out


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.zeros(1, 1, 6, 6)


def by_definition(net: Net, strength: float, growth: float) -> float:
    """Unit by unit, in plain numbers."""
    head = net.head.weight.reshape(3, 4, 4)  # [classes, channels, places]
    units = [
        [
            [net.stem.weight[i], net.norm.weight[i], net.norm.bias[i], net.inner.weight[:, i], net.two.weight[i],
             net.two.bias[i], head[:, i]]
            for i in range(4)
        ],
        [[net.inner.weight[i], net.inner.bias[i], net.two.weight[:, i]] for i in range(6)],
    ]  # fmt: skip
    total = 0.0
    for group in units:
        lengths = [sum(float(part.detach().square().sum()) for part in unit) ** 0.5 for unit in group]
        reach = max(lengths) - min(lengths)
        total += sum(strength * growth ** ((max(lengths) - x) / reach) * x for x in lengths)
    return total


@pytest.mark.parametrize(("strength", "growth"), [(1e-3, 16.0), (0.5, 1.0)])
def test_the_penalty_is_its_definition(model: Net, strength: float, growth: float) -> None:
    penalty = fewbit.group_lasso(model, X, strength=strength, growth=growth)
    for _ in range(2):
        assert float(penalty(model).detach()) == pytest.approx(
            by_definition(model, strength, growth), rel=1e-5
        )
        with torch.no_grad():  # it looks at the module as it is now
            model.inner.weight[2] *= 5
            model.norm.weight += torch.tensor([0.0, 1.0, 2.0, 3.0])


def test_short_units_are_pulled_more_and_those_at_zero_not_at_all(model: Net) -> None:
    with torch.no_grad():
        for unit, factor in ((0, 0.0), (1, 0.1), (2, 10.0)):
            for part in (model.inner.weight[unit], model.inner.bias[unit], model.two.weight[:, unit]):
                part *= factor
    fewbit.group_lasso(model, X, strength=1.0, growth=16.0)(model).backward()
    pulls = [model.inner.weight.grad, model.inner.bias.grad, model.two.weight.grad]
    assert all(pull is not None and bool(torch.isfinite(pull).all()) for pull in pulls)
    bias = model.inner.bias  # in no other group
    assert bias.grad is not None and bias.grad[0] == 0
    factors = []
    for i in (1, 2):
        unit = [model.inner.weight[i], bias[i], model.two.weight[:, i]]
        length = sum(float(part.detach().square().sum()) for part in unit) ** 0.5
        factors.append(float(bias.grad[i] / bias[i].detach()) * length)
    assert 10 < factors[0] < 16 and factors[1] == pytest.approx(1.0, rel=1e-4)


def test_pruning_loses_less_after_it() -> None:
    """The demo's network, four more epochs with and without, half of the work pruned in one go; seed 0."""
    model, data = demo.load()
    train, x = (data.train_images, data.train_labels), torch.from_numpy(data.test_images[:2])
    found = []
    for penalty in (None, fewbit.group_lasso(model, x)):
        trained = fewbit.finetune(
            model, train, epochs=4, batch_size=64, teacher=None, penalty=penalty, seed=0, progress=False
        )
        small = fewbit.prune(trained, x, speedup=1.5, progress=False)
        found.append(
            [demo.accuracy(each.eval(), data.test_images, data.test_labels) for each in (trained, small)]
        )
    (plain, plain_small), (sparse, sparse_small) = found
    assert sparse > plain - 0.01 and sparse_small > plain_small + 0.1, found


def test_what_cannot_be_done_is_said(model: Net) -> None:
    with pytest.raises(RecipeError, match="strength=0, growth=16: expected more than 0"):
        fewbit.group_lasso(model, X, strength=0)
    with pytest.raises(DataError, match="needs an input"):
        fewbit.group_lasso(model)
    with pytest.raises(ModelError, match="nothing to shrink"):
        fewbit.group_lasso(nn.Linear(3, 2), torch.zeros(1, 3))
    penalty = fewbit.group_lasso(model, X)
    with pytest.raises(TrainingError, match=r"knows 'stem.weight', which the module in training lacks"):
        penalty(nn.Linear(3, 2))
