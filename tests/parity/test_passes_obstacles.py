"""What the passes leave alone and why, and what they refuse, word for word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit.errors import FewbitError, ModelError
from fewbit.model.readers.torch import read
from fewbit.passes import run

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three convolutions, the first two with batch norm; `forward` as the test wants it."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4 * 64, 4)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def graph(forward: Callable[[Net, Tensor], Tensor], x: Tensor = X) -> fx.GraphModule:
    torch.manual_seed(0)
    return read(Net(forward).eval(), (x,))


def plain(m: Net, x: Tensor) -> Tensor:
    return m.conv3(F.relu(m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)))))))


def message(error: type[FewbitError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# batch norm -------------------------------------------------------------------------------------------------

STAYS = {
    "read by others": (
        lambda m, x: m.bn1(y := m.conv1(x)) + y,
        "bn1 stays: the output of conv1 is also read by 'add'",
    ),
    "no producer": (
        lambda m, x: m.bn1(F.relu(m.conv1(x))),
        "bn1 stays: its input 'relu' is not the output of a convolution or linear layer",
    ),
    "two batch norms": (
        lambda m, x: m.bn2(m.conv2(m.bn1(m.conv2(m.conv1(x))))),
        "bn1 stays: conv2 is called 2 times, and this batch norm does not follow each",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_batch_norm_that_stays_says_why(name: str) -> None:
    forward, note = STAYS[name]
    gm = graph(forward)
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    assert note in run("fold_batch_norm", gm, (X,))
    assert all(torch.equal(before[k], v) for k, v in gm.state_dict().items())


def test_batch_norm_over_another_axis_stays() -> None:
    """A linear layer on (batch, length, channels): batch norm 1d takes the length for channels."""
    x = torch.randn(2, 5, 6)
    gm = read(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).eval(), (x,))
    assert run("fold_batch_norm", gm, (x,)) == ["1 stays: it does not normalise the output channels of 0"]


def test_batch_norm_of_each_batch_stays() -> None:
    class OwnStatistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    gm = read(OwnStatistics().eval(), (X,))
    notes = run("fold_batch_norm", gm, (X,))
    assert not any("folded" in note for note in notes)


def test_tied_weights_come_apart() -> None:
    class TiedConvolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
            self.conv2.weight = self.conv1.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.bn(self.conv1(x)))

    gm = read(TiedConvolutions().eval(), (X,))
    gm.bn.running_var.fill_(0.25)
    assert gm.conv1.weight is gm.conv2.weight
    kept = gm.conv2.weight.detach().clone()
    assert run("fold_batch_norm", gm, (X,)) == [
        "bn folded into conv1, which shares its parameters with other layers no more"
    ]
    assert torch.equal(gm.conv2.weight, kept)
    assert torch.allclose(gm.conv1.weight, 2 * kept, rtol=1e-4)


def test_two_batch_norms_in_a_row_are_both_folded() -> None:
    gm = graph(lambda m, x: m.bn2(m.bn1(m.conv1(x))))
    assert run("fold_batch_norm", gm, (X,)) == ["bn1 folded into conv1", "bn2 folded into conv1"]
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_module", "output"]


def test_variance_zero_is_folded_with_eps() -> None:
    gm = graph(plain)
    gm.bn1.running_var[2] = 0.0
    with torch.no_grad():
        expected = gm(X)
        run("fold_batch_norm", gm, (X,))
        assert torch.allclose(gm(X), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_constant_channel_of_zero_gain() -> None:
    gm = graph(plain)
    gm.bn1.weight.data[1], gm.bn1.bias.data[1] = 0.0, 0.25
    run("fold_batch_norm", gm, (X,))
    assert not gm.conv1.weight[1].any()
    assert gm.conv1.bias[1] == 0.25


BROKEN = {
    "nan mean": (
        lambda bn: bn.running_mean.__setitem__(3, float("nan")),
        "batch norm 'bn2': running_mean is nan in channel 3: expected finite numbers; run the model in train mode on "
        "clean data to repair its statistics",
    ),
    "infinite variance": (
        lambda bn: bn.running_var.__setitem__(0, float("inf")),
        "batch norm 'bn2': running_var is inf in channel 0: expected finite numbers; run the model in train mode on "
        "clean data to repair its statistics",
    ),
    "negative variance": (
        lambda bn: bn.running_var.__setitem__(1, -0.5),
        "batch norm 'bn2': running_var is -0.5 in channel 1, eps is 1e-05: expected a positive sum; set eps or "
        "repair the variance",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_statistics(name: str) -> None:
    breaks, expected = BROKEN[name]
    gm = graph(plain)
    breaks(gm.bn2)
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    assert message(ModelError, lambda: run("fold_batch_norm", gm, (X,))) == expected
    assert all(torch.equal(before[k].nan_to_num(9), v.nan_to_num(9)) for k, v in gm.state_dict().items())


def test_folded_weight_too_large_for_float32() -> None:
    gm = graph(plain)
    gm.bn1.weight.data[0] = 3e38
    gm.conv1.weight.data[0, 1, 0, 2] = 2.0
    assert message(ModelError, lambda: run("fold_batch_norm", gm, (X,))) == (
        "layer 'conv1': its new weight is inf at [0, 1, 0, 2]: expected a number that torch.float32 can hold; look "
        "for weights or statistics of extreme size"
    )


# equalization -----------------------------------------------------------------------------------------------

PARTNERLESS = {
    "relu6": (lambda m, x: m.conv2(F.relu6(m.conv1(x))), "'relu6' clamps at fixed values, so a factor cannot pass"),
    "hardtanh": (
        lambda m, x: m.conv2(F.hardtanh(m.conv1(x))),
        "'hardtanh' clamps at fixed values, so a factor cannot pass",
    ),
    "sigmoid": (lambda m, x: m.conv2(m.conv1(x).sigmoid()), "'sigmoid' does not let a factor per channel pass"),
    "add": (lambda m, x: m.conv2(m.conv1(x) + 1.0), "'add' does not let a factor per channel pass"),
    "softmax": (lambda m, x: m.conv2(m.conv1(x).softmax(1)), "'softmax' does not let a factor per channel pass"),
    "batch norm": (lambda m, x: m.conv2(m.bn1(m.conv1(x))), "'bn1' does not let a factor per channel pass"),
    "padding with ones": (
        lambda m, x: m.conv2(F.pad(m.conv1(x), (1, 1), value=1.0)),
        "'pad' does not let a factor per channel pass",
    ),
    "mean over channels": (
        lambda m, x: m.conv2(m.conv1(x).mean(1, keepdim=True).expand(-1, 4, -1, -1)),
        "'mean' does not let a factor per channel pass",
    ),
    "pooling over channels": (
        lambda m, x: m.linear(F.avg_pool2d(m.conv1(x).permute(0, 2, 3, 1), (1, 1)).flatten(1)),
        "'avg_pool2d' does not let a factor per channel pass",
    ),
    "flattened with channels last": (
        lambda m, x: m.linear(m.conv1(x).permute(0, 2, 3, 1).flatten(1)),
        "'flatten' does not let a factor per channel pass",
    ),
    "read twice": (
        lambda m, x: m.conv2(F.relu(y := m.conv1(x))) + y,
        "the output of 'conv1' is read by 2 operators",
    ),
    "called twice": (lambda m, x: m.conv2(F.relu(m.conv2(m.conv1(x)))), "conv2 is called more than once"),
    "another axis": (
        lambda m, x: m.conv2(F.adaptive_avg_pool2d(m.conv1(x), 4).transpose(1, 2)),
        "its channels are not the input channels of conv2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTNERLESS)
def test_layers_without_a_partner_say_why(name: str) -> None:
    forward, reason = PARTNERLESS[name]
    gm = graph(forward)
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    notes = run("equalize", gm, (X,))
    assert all(torch.equal(before[k], v) for k, v in gm.state_dict().items())
    assert f"conv1 not equalized with a later layer: {reason}" in notes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_tied_layers_are_not_equalized() -> None:
    x = torch.randn(3, 4)
    gm = read(Tied().eval(), (x,))
    assert run("equalize", gm, (x,)) == [
        "a not equalized with a later layer: a shares a parameter with another layer",
        "b not equalized with a later layer: b shares a parameter with another layer",
    ]


PASSES = {
    "pad and reflect": lambda m, x: m.conv2(F.pad(F.pad(m.conv1(x), (1, 2)), (1, 1, 1, 1), mode="reflect")),
    "upsampling": lambda m, x: m.conv2(F.interpolate(m.conv1(x), scale_factor=2.0, mode="nearest")),
    "doubled and halved": lambda m, x: m.conv2(F.relu(m.conv1(x) * -2.0) / 4.0),
    "adaptive pooling": lambda m, x: m.conv2(F.adaptive_avg_pool2d(F.leaky_relu(m.conv1(x)), 5)),
    "there and back": lambda m, x: m.conv2(m.conv1(x).permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)),
    "turned": lambda m, x: m.conv2(m.conv1(x).permute(0, 2, 3, 1).permute(0, 3, 2, 1)),
    "mean in front of the channels": lambda m, x: m.conv3(
        m.conv1(x).permute(0, 2, 3, 1).mean(1).transpose(1, 2)[..., None]
    ),
    "flattened": lambda m, x: m.linear(F.relu(m.conv1(x)).flatten(1)),
    "viewed": lambda m, x: m.linear(F.relu(m.conv1(x)).view(x.shape[0], 4, -1).reshape(x.shape[0], -1)),
    "mean over the image": lambda m, x: m.conv3(m.conv1(x).mean((2, 3))[:, :, None, None]),
    "largest of the image": lambda m, x: m.conv3(m.conv1(x).amax((-2, -1), keepdim=True)),
}


@pytest.mark.parametrize("name", PASSES)
def test_factors_pass(name: str) -> None:
    """Weights of very unlike sizes move, and the outputs stay, also for a batch size that the pass did not see."""
    gm = graph(PASSES[name])
    gm.conv1.weight.data *= torch.tensor([0.01, 1.0, 30.0, 5.0]).reshape(-1, 1, 1, 1)
    more = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = gm(more)
        notes = run("equalize", gm, (X,))
        assert torch.allclose(gm(more), expected, atol=1e-5 * float(expected.abs().max()))
    assert notes[0].startswith("conv1 -> ")
    assert "equalized, factors up to" in notes[0]
    assert (gm.conv1.weight[2].abs().max() / gm.conv1.weight[0].abs().max()).item() < 300


@pytest.mark.parametrize(("sizes", "moves"), [([-1, 4], True), ([6, -1], False)])
def test_a_reshape_that_only_looks_right_on_the_example(sizes: list[int], moves: bool) -> None:
    """(2, 3, 4) as (6, 4) keeps the channels last; as (6, ?) it would not for another length than 3."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).reshape(-1, 4))

    x = torch.randn(2, 3, 5)
    gm = read(Flat().eval(), (x,))
    node = next(n for n in gm.graph.nodes if n.name.startswith("reshape"))
    node.args = (node.args[0], sizes)
    note = run("equalize", gm, (x,))[0]
    assert note.startswith("a -> b: equalized") == moves


def test_dead_channels_are_reported_and_left() -> None:
    gm = graph(lambda m, x: m.conv2(F.relu(m.conv1(x))))
    gm.conv1.weight.data[1] = 0.0
    gm.conv2.weight.data[:, 3] = 0.0
    kept = gm.conv1.weight[3].detach().clone(), gm.conv2.weight[:, 1].detach().clone()
    note = run("equalize", gm, (X,))[0]
    assert note.endswith("; channels [1, 3] are dead or constant and stay")
    assert torch.equal(gm.conv1.weight[3], kept[0])
    assert torch.equal(gm.conv2.weight[:, 1], kept[1])


def test_a_channel_that_training_switched_off_does_not_blow_up_the_range() -> None:
    gm = graph(lambda m, x: m.conv2(F.relu(m.conv1(x))))
    gm.conv1.weight.data[1] *= 1e-9
    gm.conv1.bias.data[1] = 0.5
    note = run("equalize", gm, (X,))[0]
    assert note.endswith("; channels [1] are dead or constant and stay")
    assert gm.conv1.bias[1] == 0.5
    assert gm.conv1.bias.abs().max().item() < 2


def test_weights_that_are_not_finite() -> None:
    gm = graph(lambda m, x: m.conv2(F.relu(m.conv1(x))))
    gm.conv2.weight.data[1, 2, 0, 0] = float("nan")
    assert message(ModelError, lambda: run("equalize", gm, (X,))) == (
        "layer 'conv2': weight is nan at [1, 2, 0, 0]: expected finite numbers; repair or retrain the layer first"
    )
