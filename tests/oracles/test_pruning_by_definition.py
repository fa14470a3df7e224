"""Criteria, allocation and labels, against slow twins that follow the papers' words."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewbit.errors import DataError, RecipeError
from fewbit.model.readers.torch import read
from fewbit.pruning.allocation import Bounds, allocate
from fewbit.pruning.coupling import Coupling
from fewbit.pruning.criteria import scores
from fewbit.pruning.evidence import gather
from fewbit.pruning.groups import Group, couple, find_groups, macs_without
from fewbit.pruning.slicing import without
from fewbit.refit import refit


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    nn.init.uniform_(made[1].weight, 0.5, 2)
    return made


DATA = [
    ((torch.randn(5, 4, generator=torch.Generator().manual_seed(i)),), torch.tensor([0, 1, 2, 1, 0]))
    for i in range(3)
]


def coupled(net: nn.Module) -> tuple[Coupling, Group]:
    c = couple(read(net, DATA[0][0]))
    return c, next(g for g in find_groups(c) if g.reason is None)


def found(name: str, net: nn.Module) -> list[float]:
    c, group = coupled(net)
    return scores(
        name, group, gather(c, [group], ("gradients", "inputs"), DATA, torch.Generator()), torch.Generator()
    ).tolist()


def units(net: nn.Sequential) -> list[list[tuple[nn.Parameter, tuple[object, ...]]]]:
    """Each unit's parameters with the index at which it lies in them."""
    first, norm, last = net[0], net[1], net[3]
    every = slice(None)
    return [
        [
            (first.weight, (u,)),
            (first.bias, (u,)),
            (norm.weight, (u,)),
            (norm.bias, (u,)),
            (last.weight, (every, u)),
        ]
        for u in range(6)
    ]


def test_first_and_second_order_by_definition(net):
    first, second = [0.0] * 6, [0.0] * 6
    for (x,), labels in DATA:
        loss = F.cross_entropy(net(x), labels)
        gradients = dict(
            zip(map(id, net.parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True)
        )
        for u, parts in enumerate(units(net)):
            products = torch.cat([(p[index] * gradients[id(p)][index]).reshape(-1) for p, index in parts])
            first[u] += products.sum().item() ** 2 / 3
            second[u] += products.square().sum().item() / 3 / 2
    assert found("taylor", net) == pytest.approx(first, rel=1e-4)
    assert found("hessian", net) == pytest.approx(second, rel=1e-4)


def test_magnitudes_by_definition(net):
    rows, columns = net[0].weight.detach(), net[3].weight.detach()
    l2 = [math.sqrt(rows[u].square().mean() + columns[:, u].square().mean()) for u in range(6)]
    assert found("l2", net) == pytest.approx(l2, rel=1e-5)
    assert found("l1", net) == pytest.approx([rows[u].abs().mean().item() for u in range(6)], rel=1e-5)
    assert found("batch_norm_scale", net) == pytest.approx(net[1].weight.abs().tolist(), rel=1e-5)
    far = [sum(math.dist(rows[u].tolist(), rows[v].tolist()) for v in range(6)) / 6 for u in range(6)]
    assert found("geometric_median", net) == pytest.approx(far, rel=1e-5)


def test_activations_by_definition(net):
    seen = torch.relu(net[1](net[0](torch.cat([x for (x,), _ in DATA]))))
    size = seen.square().mean(0).sqrt()
    expected = [(net[3].weight[:, u].abs() * size[u]).mean().item() for u in range(6)]
    assert found("activation", net) == pytest.approx(expected, rel=1e-4)


def test_without_labels_the_models_own_answers_are_drawn(net):
    """With logits of which one is far above the others that answer is drawn, so that its loss has no gradients."""
    unlabelled = [(x, None) for x, _ in DATA]

    def second(seed: int) -> torch.Tensor:
        c, group = coupled(net)
        seen = gather(c, [group], ("gradients",), unlabelled, torch.Generator().manual_seed(seed))
        return seen.second[group.labels[0]]

    assert torch.equal(second(1), second(1)) and not torch.equal(second(1), second(2))
    with torch.no_grad():
        net[3].bias[1] = 60.0
    assert float(second(1).max()) < 1e-12


def test_frozen_parameters_are_measured_and_stay_frozen(net):
    expected = found("taylor", net)
    net.requires_grad_(False)
    assert found("taylor", net) == expected and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 1, 2, 3, 0]), torch.rand(5), torch.zeros(5, 2, dtype=torch.int64)]
)
def test_labels_that_are_no_classes_are_refused(net, labels):
    c, group = coupled(net)
    with pytest.raises(DataError, match=r"are no classes of outputs .* give loss="):
        gather(c, [group], ("gradients",), [(DATA[0][0], labels)], torch.Generator())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return out


def two() -> tuple[Coupling, list[Group], dict[int, torch.Tensor]]:
    c = couple(read(Two().eval(), (torch.randn(2, 5),)))
    groups = [g for g in find_groups(c) if g.reason is None]
    assert [len(g) for g in groups] == [4, 6]
    generator = torch.Generator().manual_seed(0)
    return (
        c,
        groups,
        {g.labels[0]: torch.rand(len(g), generator=generator, dtype=torch.float64) for g in groups},
    )


@pytest.mark.parametrize("comparable", [True, False])
@pytest.mark.parametrize("budget", [0.75, 0.6, 0.3])
def test_units_leave_in_one_order_until_the_budget_is_met(comparable, budget):
    c, groups, found = two()
    whole = macs_without(c, set())
    gone = allocate(
        groups,
        found,
        lambda labels: macs_without(c, labels),
        budget * whole,
        "global",
        Bounds(0.2),
        comparable,
    )
    units = []
    for g in groups:
        one = whole - macs_without(c, {g.labels[0]})
        value = found[g.labels[0]] / (one if comparable else found[g.labels[0]].mean())
        units += [(v, g, label) for v, label in zip(value.tolist(), g.labels, strict=True)]
    expected: set[int] = set()
    for _, g, label in sorted(units, key=lambda each: each[0]):
        if macs_without(c, expected) <= budget * whole:
            break
        if len(expected & set(g.labels)) < len(g) - math.ceil(0.2 * len(g)):
            expected.add(label)
    assert gone == expected and macs_without(c, gone) <= budget * whole


def test_a_uniform_share_leaves_each_group_and_counts_are_multiples():
    c, groups, found = two()
    whole = macs_without(c, set())
    cost = lambda labels: macs_without(c, labels)  # noqa: E731
    gone = allocate(groups, found, cost, 0.5 * whole, "uniform", Bounds(0.2), False)
    shares = [len(gone & set(g.labels)) / len(g) for g in groups]
    assert max(shares) - min(shares) <= 0.25
    even = allocate(groups, found, cost, 0.6 * whole, "global", Bounds(0.2, 2), False)
    assert all((len(g) - len(even & set(g.labels))) % 2 == 0 for g in groups)
    with pytest.raises(
        RecipeError, match=r"out of reach: with 90% of each group's channels the model still costs"
    ):
        allocate(groups, found, cost, 0.1 * whole, "global", Bounds(0.9), False)


def test_multiply_accumulates_by_counting_loops():
    c, groups, _ = two()
    gone = {groups[0].labels[1], groups[1].labels[0], groups[1].labels[5]}
    a, b = 3, 4
    loops = sum(1 for _ in itertools.chain(*(range(n * m) for n, m in ((5, a), (a, b), (b, 2)))))
    assert macs_without(c, gone) == 2 * loops, "of two samples"


@pytest.mark.parametrize("bias", [True, False], ids=["into the bias", "into the norm"])
def test_what_was_redundant_is_made_up_for(bias):
    """Every channel is there once more, doubled: least squares gives back the whole network from one half of them."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 12, 3), nn.Conv2d(12, 5, 3, bias=bias)
    with torch.no_grad():
        first.weight[6:], first.bias[6:] = 2 * first.weight[:6], 2 * first.bias[:6]
    net = nn.Sequential(first, nn.ReLU(), second, nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 3)).eval()
    data = [((torch.randn(64, 2, 8, 8),), None) for _ in range(4)]
    c = couple(read(net, data[0][0]))
    group = next(g for g in find_groups(c) if g.name == "0" and g.reason is None)
    gone = set(group.labels[6:])
    smaller = without(c, gone, data[0][0])
    x = torch.randn(16, 2, 8, 8)
    broken = float((smaller(x) - net(x)).detach().abs().max())
    assert refit(c, gone, smaller, data) == 3
    mended = float((smaller(x) - net(x)).detach().abs().max())
    assert mended < 0.05 * broken


def test_least_squares_by_definition():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    x = torch.randn(40, 5)
    c = couple(read(net, (x,)))
    group = next(g for g in find_groups(c) if g.reason is None)
    smaller = without(c, {group.labels[1]}, (x,))
    refit(c, {group.labels[1]}, smaller, [((x,), None)])
    rows = torch.cat([torch.tanh(smaller.get_submodule("0")(x)), torch.ones(40, 1)], 1).detach().double()
    old = torch.cat([net[2].weight[:, [0, 2, 3]].T, torch.zeros(1, 3)]).detach().double()
    goal = (torch.tanh(net[0](x)) @ net[2].weight.T).detach().double()
    ridge = 1e-2 * (rows.T @ rows).diagonal().mean()
    stacked = torch.cat([rows, ridge.sqrt() * torch.eye(4, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([goal, ridge.sqrt() * old])).solution
    assert torch.allclose(smaller.get_submodule("2").weight.T.double(), wanted[:3], atol=1e-5)
    assert torch.allclose(smaller.get_submodule("2").bias.double(), net[2].bias + wanted[3], atol=1e-5)
