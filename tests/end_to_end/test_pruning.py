"""`fewbit.prune` from the outside: budgets, reports, what follows it, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fewbit
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.pruning import coupling
from fewbit.pruning.criteria import criterion_names


class Net(nn.Module):
    """A residual network for pictures of digits with two bright rows, whose place is the class."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.one, self.two = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(y + self.two(torch.relu(self.one(y))))
        out: torch.Tensor = self.head(nn.functional.max_pool2d(y, 2).flatten(1))
        return out


def pictures(count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(4, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 2.0
    return images, labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = fewbit.finetune(Net(), pictures(), epochs=4, batch_size=32, teacher=None, seed=0)
    return model.eval()


def accuracy(model: nn.Module) -> float:
    images, labels = pictures()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("name", criterion_names())
def test_every_criterion_reaches_the_budget(trained: nn.Module, name: str) -> None:
    before = copy.deepcopy(trained.state_dict())
    small = fewbit.prune(trained, data=pictures(), speedup=2.0, criterion=name)
    report = small.meta["pruning"]
    assert 2.0 <= report.macs_before / report.macs < 2.4
    assert report.parameters == sum(p.numel() for p in small.parameters()) < report.parameters_before
    assert set(small.state_dict()) == set(before), "names of layers stay"
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert small.get_submodule("stem").out_channels == small.get_submodule("two").out_channels, (
        "added to each other"
    )


def test_other_budgets_and_bounds(trained: nn.Module) -> None:
    images, _ = pictures()
    whole = fewbit.prune(trained, images[:1], speedup=1.01).meta["pruning"]
    by_macs = fewbit.prune(trained, images[:1], macs=whole.macs_before * 0.7).meta["pruning"]
    assert 0.6 < by_macs.macs / whole.macs_before <= 0.7
    by_size = fewbit.prune(trained, images[:1], parameters=3000).meta["pruning"]
    assert 2500 < by_size.parameters <= 3000
    eights = fewbit.prune(trained, images[:1], speedup=1.4, multiple=8)
    assert eights.get_submodule("one").out_channels % 8 == 0 == eights.get_submodule("two").out_channels % 8
    stays = fewbit.prune(trained, images[:1], speedup=1.3, ignore=("stem",))
    assert stays.get_submodule("two").out_channels == 16 and stays.get_submodule("one").out_channels < 24
    text = str(stays.meta["pruning"])
    assert "x fewer" in text and "head" in text and "the model returns them" in text


def test_a_pruned_model_trains_quantizes_exports_and_verifies(trained: nn.Module, tmp_path: Any) -> None:
    images, labels = pictures()

    def train(model: nn.Module) -> nn.Module:
        result: nn.Module = fewbit.finetune(
            model, (images, labels), epochs=2, batch_size=32, teacher=trained, seed=0
        )
        return result

    small = fewbit.prune(trained, data=pictures(), speedup=2.0, criterion="taylor", steps=2, train=train)
    assert small.meta["pruning"].macs_before / small.meta["pruning"].macs >= 2
    assert accuracy(small.eval()) > accuracy(trained) - 0.03
    quantized = fewbit.quantize(small, images[:128], progress=False)
    artifact = fewbit.export(quantized, tmp_path / "small.onnx")
    assert artifact.verification is not None and artifact.verification.exact
    assert accuracy(quantized) > accuracy(trained) - 0.05


def test_repair_needs_data_and_pays(trained: nn.Module) -> None:
    bare = fewbit.prune(trained, data=pictures(), speedup=3.0, repair=False)
    mended = fewbit.prune(trained, data=pictures(), speedup=3.0)
    assert bare.meta["pruning"] == mended.meta["pruning"]
    assert accuracy(mended) > accuracy(bare) + 0.1
    with pytest.raises(DataError, match="repair has to see data"):
        fewbit.prune(trained, pictures()[0][:1], speedup=2.0, repair=True)


def test_a_network_that_is_followed_wrongly_is_refused(
    trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inside_out(c: coupling.Coupling, node: Any) -> Any:
        axes = c.axes(node.args[0])
        return (axes[0], axes[1] and axes[1][::-1], *axes[2:])

    monkeypatch.setitem(coupling.RULES, "relu", inside_out)
    with pytest.raises(ModelError, match=r"differ by .* not known well enough"):
        fewbit.prune(trained, pictures()[0][:1], speedup=1.5)


def test_what_cannot_be_done_is_said(trained: nn.Module) -> None:
    images, _ = pictures(64)
    x = images[:2]
    for budget, message in [
        ({}, "expected one of speedup, macs, parameters, latency, got none"),
        ({"speedup": 2.0, "macs": 5.0}, "got speedup, macs"),
        ({"speedup": 0.5}, "speedup=0.5: expected at least 1"),
        ({"parameters": 10**9}, "no less than the model has"),
        ({"speedup": 1000.0}, "out of reach: with 10% of each group's channels the model still costs"),
        ({"speedup": 2.0, "ignore": ("stemm",)}, "matches no layer: did you mean 'stem'"),
        ({"speedup": 2.0, "scope": "everywhere"}, "expected global or uniform"),
        ({"speedup": 2.0, "steps": 0}, "a step at least"),
        ({"speedup": 2.0, "least": 1.5}, "a share from 0 to 1"),
        ({"speedup": 2.0, "criterion": "l3"}, "unknown criterion 'l3'"),
    ]:
        with pytest.raises(RecipeError, match=message):
            fewbit.prune(trained, x, **budget)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'taylor' has to see data"):
        fewbit.prune(trained, x, speedup=2.0, criterion="taylor")
    with pytest.raises(DataError, match="needs an input"):
        fewbit.prune(Net(), speedup=2.0)
    quantized = fewbit.quantize(trained, images, progress=False)
    with pytest.raises(ModelError, match="quantized already"):
        fewbit.prune(quantized, x, speedup=2.0)
    with pytest.raises(RecipeError, match="no channels that could leave"):
        fewbit.prune(nn.Linear(4, 3), torch.randn(1, 4), speedup=2.0)
