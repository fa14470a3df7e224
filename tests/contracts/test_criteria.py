"""What every criterion keeps to, whatever it measures."""

import pytest
import torch
from torch import nn

from fewbit.errors import RecipeError
from fewbit.model.readers.torch import read
from fewbit.pruning.criteria import criterion_names, needs, scores
from fewbit.pruning.evidence import gather
from fewbit.pruning.groups import Group, couple, find_groups

CRITERIA = criterion_names()


def net(order: torch.Tensor | None = None) -> nn.Module:
    """Two convolutions; the channels between them in that order."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    first, norm, second = made[0], made[1], made[3]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    nn.init.uniform_(norm.weight, 0.5, 2)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if order is not None:
        for tensor in (first.weight, first.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert isinstance(tensor, torch.Tensor)
            tensor.data = tensor.data[order].clone()
        assert isinstance(second.weight, nn.Parameter)
        second.weight.data = second.weight.data[:, order].clone()
    return made.eval()


def batches(count: int = 3) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        ((torch.randn(6, 3, 8, 8, generator=generator),), torch.randint(5, (6,), generator=generator))
        for _ in range(count)
    ]


def measured(name: str, order: torch.Tensor | None = None) -> tuple[Group, torch.Tensor]:
    data = batches()
    c = couple(read(net(order), data[0][0]))
    group = next(g for g in find_groups(c) if g.name == "0" and g.reason is None)
    evidence = gather(c, [group], needs(name), data, torch.Generator())
    return group, scores(name, group, evidence, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", CRITERIA)
def test_each_unit_has_a_score(name: str) -> None:
    group, found = measured(name)
    assert found.shape == (len(group),) == (8,) and found.dtype == torch.float64
    assert bool(found.isfinite().all()) and bool((found >= 0).all()) and float(found.std()) > 0


@pytest.mark.parametrize("name", [n for n in CRITERIA if n != "random"])
def test_scores_do_not_mind_the_order_of_channels(name: str) -> None:
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    _, straight = measured(name)
    _, shuffled = measured(name, order)
    assert torch.allclose(shuffled, straight[order], rtol=1e-4)


# The geometric median asks how far a channel is from the others, and nothing lies in the middle of them.
@pytest.mark.parametrize("name", [n for n in CRITERIA if n not in ("random", "geometric_median")])
def test_a_channel_that_does_nothing_is_needed_least(name: str) -> None:
    data = batches()
    made = net()
    with torch.no_grad():
        made[0].weight[2], made[1].weight[2], made[1].bias[2] = 0.0, 0.0, 0.0  # type: ignore[index, operator]
        made[0].bias[2], made[3].weight[:, 2] = 0.0, 0.0  # type: ignore[index, operator]
    c = couple(read(made, data[0][0]))
    group = next(g for g in find_groups(c) if g.name == "0" and g.reason is None)
    found = scores(name, group, gather(c, [group], needs(name), data, torch.Generator()), torch.Generator())
    assert int(found.argmin()) == 2


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown criterion 'taylour': did you mean 'taylor'"):
        needs("taylour")
