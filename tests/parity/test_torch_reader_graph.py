"""The helpers for graphs in standard form, and the operator table, on graphs that the reader made."""

from __future__ import annotations

from typing import Any

import networks as nets
import pytest
import torch
from test_torch_reader_layers import randomise
from torch import fx, nn

from fewbit.errors import ModelError
from fewbit.model import graph as g
from fewbit.model.operators import FUNCTIONS, MODULES, Operator, operator
from fewbit.model.readers.torch import read

aten = torch.ops.aten
IMAGE = torch.randn(2, 3, 8, 8)


@pytest.fixture
def gm() -> fx.GraphModule:
    return read(randomise(nets.ResNet()).eval(), IMAGE)


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def test_looking_around(gm: fx.GraphModule) -> None:
    conv, relu, add = node(gm, "conv1"), node(gm, "relu"), node(gm, "layer1_0_add")
    assert g.module_of(conv, gm) is gm.conv1 and g.module_of(relu, gm) is None
    assert g.is_layer(conv, gm, nn.Conv2d) and not g.is_layer(conv, gm, (nn.Linear, nn.BatchNorm2d))
    assert g.is_function(relu, aten.add.Tensor, aten.relu.default) and not g.is_function(
        conv, aten.relu.default
    )
    assert g.weight_of(conv, gm) is gm.conv1.weight and g.weight_of(relu, gm) is None
    assert g.consumers(relu) == [node(gm, "layer1_0_conv1"), add]
    assert g.only_consumer(conv) is node(gm, "bn1") and g.only_consumer(relu) is None
    assert g.only_consumer(node(gm, "fc")) is None
    assert g.calls(gm, "layer1.0.conv1") == [node(gm, "layer1_0_conv1")]
    assert g.input_nodes(gm) == [node(gm, "x")] and g.output_nodes(gm) == [node(gm, "fc")]


def test_constants() -> None:
    gm = read(nets.Loose(), IMAGE)
    assert g.constant_of(node(gm, "gamma"), gm) is gm.gamma
    assert g.constant_of(node(gm, "x"), gm) is None


def test_insert_replace_and_clean(gm: fx.GraphModule) -> None:
    x = torch.randn(3, 3, 8, 8)
    before = gm(x)
    relu = node(gm, "relu")
    readers = g.consumers(relu)
    doubled = g.insert_after(relu, lambda graph: graph.call_function(aten.mul.Tensor, (relu, 1)))
    assert list(relu.users) == [doubled] and all(doubled in r.all_input_nodes for r in readers)
    assert doubled.meta["shape"] == relu.meta["shape"] and doubled.meta["val"] is relu.meta["val"]
    torch.testing.assert_close(g.clean(gm)(x), before)
    dropout = node(gm, "dropout")
    with gm.graph.inserting_after(dropout):
        copy = gm.graph.call_function(aten.mul.Tensor, (dropout.args[0], 1))
    g.replace(dropout, copy)
    assert copy.meta["shape"] == (2, 8)
    g.clean(gm)
    assert "dropout" not in dict(gm.named_modules())
    torch.testing.assert_close(gm(x), before)


def test_added_layers_have_names_of_their_own(gm: fx.GraphModule) -> None:
    assert g.add_layer(gm, "layer1.0.quantize", nn.Identity()) == "layer1.0.quantize"
    assert g.add_layer(gm, "layer1.0.quantize", nn.Identity()) == "layer1.0.quantize_1"
    assert g.add_layer(gm, "fc.weight", nn.Identity()) == "fc.weight_1"
    with pytest.raises(
        ModelError, match=r"^layer 'fc\.weight\.x' cannot be added: part of its path is a tensor"
    ):
        g.add_layer(gm, "fc.weight.x", nn.Identity())


def test_copy_is_independent_and_keeps_ties() -> None:
    gm = read(nets.Tied().train(), torch.randint(0, 11, (2, 5)))
    twin = g.copy_graph(gm)
    assert twin.training and twin.meta == gm.meta and twin.meta["notes"] is not gm.meta["notes"]
    assert twin.embed.weight is twin.head.weight and twin.embed.weight is not gm.embed.weight
    for new, old in zip(twin.graph.nodes, gm.graph.nodes, strict=True):
        assert new.meta == old.meta and new.meta is not old.meta


def test_refresh_after_pruning_keeps_free_sizes(gm: fx.GraphModule) -> None:
    gm.train()
    gm.fc = nn.Linear(8, 7)
    g.refresh(gm, (torch.randn(5, 3, 8, 8),))
    fc = node(gm, "fc")
    assert fc.meta["shape"] == (5, 7) and fc.meta["val"].shape[1] == 7
    assert not isinstance(fc.meta["val"].shape[0], int)
    assert gm.training and gm.bn1.training and int(gm.bn1.num_batches_tracked) == 0
    conv = node(gm, "conv1")
    del conv.meta["val"]
    g.refresh(gm, (torch.randn(5, 3, 8, 8),))
    assert tuple(conv.meta["val"].shape) == (5, 8, 8, 8) and conv.meta["val"].is_meta


def test_operator_rows(gm: fx.GraphModule) -> None:
    rows = {n.name: operator(n, gm) for n in gm.graph.nodes}
    assert rows["conv1"] == Operator("conv", "compute", 0, 1)
    assert rows["fc"] == Operator("linear", "compute", 0, -1)
    assert rows["relu"] == Operator("relu", "activation")
    assert rows["layer1_0_add"] == Operator("add", "compute")
    assert rows["reshape"] == Operator("reshape", "shares")
    assert rows["x"] is None and rows["output"] is None


@pytest.mark.parametrize(
    ("size", "name"), [(1, "global_avg_pool"), ((1, 1), "global_avg_pool"), (2, "adaptive_avg_pool")]
)
def test_pooling_to_one_is_global(size: object, name: str) -> None:
    gm = read(nets.Apply(nn.AdaptiveAvgPool2d(size), width=3), IMAGE)  # type: ignore[arg-type]
    assert operator(g.output_nodes(gm)[0], gm) == Operator(name, "compute", None, 1)


def test_unknown_operator_has_no_row() -> None:
    gm = read(nets.Apply(torch.fft.rfft), IMAGE)
    assert operator(g.output_nodes(gm)[0], gm) is None


@pytest.mark.parametrize("kind", MODULES)
def test_axes_of_layers_are_those_of_their_weights(kind: type[nn.Module]) -> None:
    row = MODULES[kind]
    if row.name in ("conv", "conv_transpose"):
        layer = kind(2, 6, 3)
        rank = int(kind.__name__[-2])
        assert layer.weight.shape[row.weight_axis] == 6
        assert layer(torch.randn(1, 2, *[5] * rank)).shape[row.channel_axis] == 6
    elif row.name in ("linear", "lstm", "gru", "rnn", "embedding"):
        layer = kind(5, 3)
        assert row.weight_axis == 0 and row.channel_axis == -1
        if row.name == "linear":
            assert layer.weight.shape[0] == layer(torch.randn(2, 5)).shape[-1] == 3
    else:
        assert row.weight_axis is None


SHARING = [(target, row) for target, row in FUNCTIONS.items() if row.role == "shares"]
# a rank-3 input for each, or rank 4 and 5 where the name says 2d and 3d
ARGUMENTS = {
    "reshape": ([3, -1],), "flatten": (0, -1), "unsqueeze": (0,), "squeeze": ([0],), "transpose": (0, 1),
    "permute": ([1, 0, 2],), "slice": (1, 0, 2), "select": (0, 1), "index_select": (0, torch.tensor([1, 1])),
    "split_with_sizes": ([1, 2], 0), "getitem": (1,), "expand": ([3, 4, 4],), "repeat": ([1, 2, 1],),
    "repeat_interleave": (2,), "flip": ([1],), "roll": ([1], [0]), "amax": (0,), "amin": (0,),
    "pixel_shuffle": (2,), "pixel_unshuffle": (2,), "channel_shuffle": (2,),
}  # fmt: skip


@pytest.mark.parametrize(("target", "row"), SHARING, ids=[str(t) for t, _ in SHARING])
def test_what_shares_its_scale_makes_no_new_numbers(target: Any, row: Operator) -> None:
    name = (target._schema.name if hasattr(target, "_schema") else target.__name__).split("::")[-1]
    sides = 2 if "shuffle" in name else int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else 1
    windows = [2] * sides
    default = (None, [2.0] * sides) if "upsample" in name else (windows,)
    result = target(
        x := torch.randn(4, 4, *[4] * sides)[: 3 if sides == 1 else 4], *ARGUMENTS.get(name, default)
    )
    for part in result if isinstance(result, tuple | list) else [result]:
        assert not part.is_floating_point() or torch.isin(part, x).all()
