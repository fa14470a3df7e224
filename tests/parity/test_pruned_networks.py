"""Random networks without some of their channels, against the same networks with those channels masked.

`benchmarks/pruned_graphs.py` does so with more of them.
"""

import random

import pytest
import torch
from random_prunable import network
from torch import nn
from torch.fx import GraphModule

from fewbit.evaluation.costs import macs
from fewbit.model.readers.torch import read
from fewbit.pruning.groups import couple, find_groups, macs_without, parameters_without
from fewbit.pruning.slicing import masked, without


def pruned(gm: GraphModule, example: tuple[torch.Tensor, ...], seed: int) -> int:
    """Take random units out, compare with the masked network; gives how many were taken."""
    c, r = couple(gm), random.Random(seed)
    free = [g for g in find_groups(c) if g.reason is None and len(g) > 1]
    gone = {label for g in free for label in r.sample(g.labels, r.randint(1, len(g) - 1))}
    whole = {name: value.clone() for name, value in gm.state_dict().items()}
    smaller = without(c, gone, example).eval()
    x = tuple(torch.randn(3, *each.shape[1:]) for each in example)
    with torch.no_grad():
        found, expected = smaller(*x), masked(c, gone, x)
        assert torch.allclose(masked(c, set(), x), gm(*x), rtol=1e-4, atol=1e-5), (
            "nothing masked, nothing changed"
        )
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert sum(each.macs for each in macs(smaller)) * len(example[0]) == macs_without(c, gone)
    assert sum(p.numel() for p in smaller.parameters()) == parameters_without(c, gone)
    assert set(smaller.state_dict()) == set(whole), "names stay"
    assert all(torch.equal(value, whole[name]) for name, value in gm.state_dict().items()), "the model stays"
    return len(gone)


@pytest.mark.parametrize("seed", range(16))
def test_what_is_left_computes_what_the_masked_network_does(seed: int) -> None:
    torch.manual_seed(seed)
    example = (torch.randn(2, 3, 8, 8),)
    pruned(read(network(seed), example), example, seed)


class Layers(nn.Module):
    """What the random networks lack."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.tokens = nn.Linear(8, 12)
        self.weight = nn.Parameter(torch.randn(12, 16))
        self.back = nn.Linear(16, 6)
        self.norm = nn.RMSNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        y = torch.cat([y.roll(1, 2), y.flip(1)], 1)[:, 2:10].transpose(1, 2)
        y = torch.einsum("btc,cd->btd", torch.tanh(self.tokens(y)), self.weight)
        y = self.norm(self.back(y.repeat(1, 1, 1)))
        return self.head(torch.where(y > 0, y, 0.1 * y).amax(1))


def test_parameters_products_and_slices_are_followed() -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 4, 9),)
    gm = read(Layers().eval(), example)
    groups = {g.name: g for g in find_groups(couple(gm)) if g.makers}
    assert groups["tokens"].reason is None and len(groups["tokens"]) == 12, "through einsum into a parameter"
    assert "runs along" in str(groups["conv"].reason) and "spread" in str(groups["back"].reason)
    assert pruned(gm, example, 1)


@pytest.mark.parametrize(("dim", "stays"), [(1, True), (2, False)])
def test_channels_that_are_rolled_stay(dim: int, stays: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.first(x).roll(2, dim))
            return out

    groups = {g.name: g for g in find_groups(couple(read(Net().eval(), (torch.randn(2, 3, 8),)))) if g.makers}
    assert (groups["first"].reason is not None) is stays


def test_heads_leave_whole() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(24, 4, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = layer, nn.Linear(24, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
            return out

    example = (torch.randn(2, 5, 24),)
    gm = read(Net().eval(), example)
    heads = [g for g in find_groups(couple(gm)) if g.reason is None]
    assert [len(g) for g in heads] == [4, 24], "the heads, and what the projection gives to the last layer"
    assert {m.slot.names[0].split(".", 1)[1]: m.indices.shape[1] for m in heads[0].members} == {
        "in_proj.weight": 18, "in_proj.bias": 18, "out_proj.weight": 6,
    }  # fmt: skip
    assert pruned(gm, example, 0)


def test_zeros_leave_with_the_channels_that_they_are_added_to() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 10, 3, padding=1)
            self.head = nn.Linear(10, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.stem(x))
            out: torch.Tensor = self.head(
                torch.relu(self.wide(y) + nn.functional.pad(y, (0, 0, 2, 2))).mean(2)
            )
            return out

    torch.manual_seed(0)
    example = (torch.randn(2, 3, 8),)
    gm = read(Net().eval(), example)
    free = [g for g in find_groups(couple(gm)) if g.reason is None]
    assert [(g.name, len(g)) for g in free] == [("stem", 6), ("wide", 4)], (
        "six with the stem's, four by themselves"
    )
    assert all(pruned(gm, example, seed) for seed in range(3))


def test_channels_that_are_tokens_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.keys, self.head = nn.Linear(8, 8), nn.Conv1d(3, 6, 1), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keys = self.keys(x)
            mixed = nn.functional.scaled_dot_product_attention(self.query(x), keys, keys)
            out: torch.Tensor = self.head(mixed)
            return out

    gm = read(Net().eval(), (torch.randn(2, 3, 8),))
    groups = {g.name: g for g in find_groups(couple(gm)) if g.makers}
    assert "softmax" in str(groups["keys"].reason) and "length" in str(groups["query"].reason)


def test_an_unknown_operator_keeps_its_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sort(self.first(x), -1).values
            return self.third(torch.relu(self.second(y)))

    example = (torch.randn(2, 4),)
    groups = {g.name: g for g in find_groups(couple(read(Net().eval(), example))) if g.makers}
    assert "is not known" in str(groups["first"].reason) and groups["second"].reason is None
