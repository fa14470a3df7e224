"""The simulation gives the integer program's codes where sums lie on rounding ties, and so does a trainable network."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.model.lowering import lower
from fewbit.model.reference import Reference
from fewbit.model.simulate import FakeQuantize, QuantizedModel


class Halves(nn.Module):
    """A layer that reads codes whose scale a division has changed, padded and pooled on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.max_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 2) / 3.0
        return torch.relu(self.last(x))


NETWORKS = {
    "linear": (lambda: nn.Linear(40, 8, bias=False), (40,)),
    "linear with a bias, on rows": (lambda: nn.Linear(40, 8), (3, 40)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 5), (3, 40)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (3, 12, 12)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 3), (2, 6, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (6, 12, 12)),
    "on the way": (Halves, (3, 16, 16)),
}


def on_ties(name: str, **asked: object) -> tuple[QuantizedModel, Tensor]:
    """A network whose last sums are multiples of about half a code, and inputs."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    x = torch.randn(64, *shape)
    q = fewbit.quantize(make().eval(), x, granularity="tensor", **asked)
    last = ends_of(q)[-1]
    assert last.sums is not None
    last.scale.copy_(2 * last.sums.unit().flatten()[0])
    return q, x


def ends_of(model: QuantizedModel) -> list[FakeQuantize]:
    steps = [part for part in model.modules() if isinstance(part, FakeQuantize)]
    return [step for step in steps if step.sums is not None]


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_simulation_and_program_round_ties_alike(name: str, weights: str) -> None:
    q, x = on_ties(name, weights=weights)
    expected = Reference(lower(q))(x)
    with torch.no_grad():
        assert torch.equal(q(x), expected)
        for step in ends_of(q):
            step.sums = None
        assert not torch.equal(q(x), expected)  # the ties are there


def test_a_copy_follows_its_own_scales() -> None:
    q, x = on_ties("on the way")
    twin = copy.deepcopy(q)
    with torch.no_grad():
        for step in ends_of(twin):
            step.scale.mul_(1.5)
        assert torch.equal(twin(x), Reference(lower(twin))(x))
        assert torch.equal(q(x), Reference(lower(q))(x))


@pytest.mark.parametrize("name", ["linear", "conv2d", "on the way"])
def test_what_is_trained_rounds_ties_as_the_program_does(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    x = torch.randn(64, *shape)
    q = fewbit.quantize(make().eval(), x, granularity="tensor", trainable=True).eval()
    with torch.no_grad():
        last = ends_of(q.convert())[-1]
        assert last.sums is not None
        unit = 2 * last.sums.unit().flatten()[0]
        [step] = [s for _, s in q.steps() if s.sums is not None and torch.equal(s.coding()[0], last.scale)]
        step.estimator.scale.copy_(unit)
        assert torch.equal(q(x), Reference(lower(q.convert()))(x))
        step.sums = None
        assert not torch.equal(q(x), q.convert()(x))


def test_other_bounds_and_wide_activations_are_no_whole_sums() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 12, 12)
    cut = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6())
    assert not ends_of(fewbit.quantize(cut.eval(), x))
    wide = {"activations": "int16", "activation_symmetric": True, "target": "litert"}
    assert not ends_of(fewbit.quantize(nn.Conv2d(3, 8, 3).eval(), x, **wide))
    assert not ends_of(fewbit.quantize(nn.Conv2d(3, 8, 3).eval(), x, activations="float"))
