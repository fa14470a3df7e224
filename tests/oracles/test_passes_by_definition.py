"""Folding, equalization and bias correction against their definitions, written out slowly in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit.model.readers.torch import read
from fewbit.passes import bias_correction, run


def fold_by_definition(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer whose output is norm(layer(x)): one output channel after the other, float64."""
    weight = layer.weight.detach().double().clone()
    outputs = norm.num_features
    bias = torch.zeros(outputs, dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    folded = torch.empty(outputs, dtype=torch.float64)
    for c in range(outputs):
        gain = norm.weight[c].item() / (float(norm.running_var[c]) + norm.eps) ** 0.5
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            per_group = outputs // layer.groups
            inputs = layer.in_channels // layer.groups
            group = c // per_group
            weight[group * inputs : (group + 1) * inputs, c % per_group] *= gain
        else:
            weight[c] *= gain
        folded[c] = (float(bias[c]) - float(norm.running_mean[c])) * gain + norm.bias[c].item()
    return weight, folded


FOLDED = {
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=0.1), (3, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (3, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), (2, 4, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(6, 6, 3, groups=3), nn.BatchNorm2d(6), (2, 6, 5, 5)),
    "linear": (nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), (4, 5)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_fold_is_the_definition(name: str) -> None:
    layer, norm, shape = copy.deepcopy(FOLDED[name])
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.1, 4.0)
    gm = read(nn.Sequential(layer, norm).eval(), (torch.randn(shape),))
    assert run("fold_batch_norm", gm, (torch.randn(shape),)) == ["1 folded into 0"]
    weight, bias = fold_by_definition(layer, norm)
    folded = gm.get_submodule("0")
    # rounded once: the nearest float32 to the float64 result, or its neighbour
    assert torch.allclose(folded.weight.double(), weight, rtol=1.2e-7, atol=0)
    assert torch.allclose(folded.bias.double(), bias, rtol=1.2e-7, atol=1e-12)


class Pair(nn.Module):
    """Two layers with `between` between them."""

    def __init__(self, first: nn.Module, between: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def output_range(layer: nn.Module, c: int) -> float:
    """Largest magnitude that makes output channel c, looked up element by element."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.ConvTranspose2d):
        per_group, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        group = c // per_group
        return float(weight[group * inputs : (group + 1) * inputs, c % per_group].abs().max())
    return float(weight[c].abs().max())


def input_range(layer: nn.Module, c: int) -> float:
    """Largest magnitude that reads input channel c."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.ConvTranspose2d):
        return float(weight[c].abs().max())
    if isinstance(layer, nn.Linear):
        return float(weight[:, c].abs().max())
    outputs, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    group = c // inputs
    return float(weight[group * outputs : (group + 1) * outputs, c % inputs].abs().max())


PAIRS = {
    "conv, relu, conv": (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), (2, 3, 9, 9)),
    "no bias, grouped": (nn.Conv2d(3, 6, 3, bias=False), nn.LeakyReLU(0.2), nn.Conv2d(6, 4, 3, groups=2), (2, 3, 9, 9)),
    "depthwise second": (nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), (2, 3, 9, 9)),
    "depthwise first": (nn.Conv2d(6, 6, 3, groups=6), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1), (2, 6, 9, 9)),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), (2, 4, 5, 5)),
    "linear": (nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), (4, 5)),
}  # fmt: skip


def spread(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with weights whose sizes differ by orders of magnitude from channel to channel."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(getattr(layer, "weight", None), nn.Parameter):
                layer.weight.mul_(torch.randn(layer.weight.shape[:2]).mul(2).exp().reshape(
                    *layer.weight.shape[:2], *[1] * (layer.weight.dim() - 2)))  # fmt: skip
    return module.eval()


@pytest.mark.parametrize("name", PAIRS)
def test_equalized_ranges_are_the_geometric_mean(name: str) -> None:
    first, between, second, shape = copy.deepcopy(PAIRS[name])
    module = spread(Pair(first, between, second))
    gm = read(module, (torch.randn(shape),))
    channels = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    expected = [(output_range(first, c) * input_range(second, c)) ** 0.5 for c in range(channels)]
    note = run("equalize", gm, (torch.randn(shape),))[0]
    assert note.startswith("first -> second: equalized, factors up to ")
    for c in range(channels):
        assert output_range(gm.first, c) == pytest.approx(expected[c], rel=3e-7)
        assert input_range(gm.second, c) == pytest.approx(expected[c], rel=3e-7)
        if first.bias is not None:
            s = (output_range(first, c) / input_range(second, c)) ** 0.5
            assert gm.first.bias[c].item() == pytest.approx(first.bias[c].item() / s, rel=3e-7)


def test_equalized_chain_has_one_range_per_channel() -> None:
    """Around a depthwise convolution all three ranges meet at the cube root of their product (section 4.1.2)."""
    torch.manual_seed(0)
    first, depthwise, last = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3, groups=5), nn.Conv2d(5, 2, 1)
    module = spread(nn.Sequential(first, nn.ReLU(), depthwise, nn.ReLU(), last))
    ranges = [(output_range(first, c), output_range(depthwise, c), input_range(last, c)) for c in range(5)]
    gm = read(module, (torch.randn(2, 3, 7, 7),))
    run("equalize", gm, (torch.randn(2, 3, 7, 7),))
    for c, (r1, r2, r3) in enumerate(ranges):
        expected = (r1 * r2 * r3) ** (1 / 3)
        assert output_range(gm.get_submodule("0"), c) == pytest.approx(expected, rel=1e-5)
        assert output_range(gm.get_submodule("2"), c) == pytest.approx(expected, rel=1e-5)
        assert input_range(gm.get_submodule("4"), c) == pytest.approx(expected, rel=1e-5)


def test_equalize_knows_which_inputs_of_a_linear_layer_come_from_a_channel() -> None:
    """Flattened 4x4 maps: channel c is read by sixteen columns of the linear layer's weight."""
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 3, 3), nn.Linear(3 * 16, 5)
    module = spread(nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), linear))
    gm = read(module, (torch.randn(2, 2, 10, 10),))
    weights = linear.weight.detach().double().reshape(5, 3, 16)
    expected = [(output_range(conv, c) * float(weights[:, c].abs().max())) ** 0.5 for c in range(3)]
    run("equalize", gm, (torch.randn(2, 2, 10, 10),))
    found = gm.get_submodule("4").weight.detach().reshape(5, 3, 16).abs().amax((0, 2))
    assert found.tolist() == pytest.approx(expected, rel=3e-7)


class Deep(nn.Module):
    """Convolutions, one without bias, a depthwise one, a residual and a head, so that shifts of the mean travel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.depthwise, self.up = nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.conv3, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.depthwise(F.relu(self.conv2(x)) + x))
        x = F.relu(self.conv3(F.relu(self.up(x))))
        return self.head(x.mean((2, 3)))


LAYERS = ["conv1", "conv2", "depthwise", "up", "conv3", "head"]


def coarse(seed: int = 0) -> tuple[fx.GraphModule, fx.GraphModule, Tensor]:
    """A float graph, its copy with weights rounded to five levels, and data."""
    torch.manual_seed(seed)
    x = torch.randn(32, 3, 10, 10) + 0.3
    gm = read(Deep().eval(), (x[:2],))
    rounded = copy.deepcopy(gm)
    for name in LAYERS:
        layer = rounded.get_submodule(name)
        step = layer.weight.detach().abs().max() / 2
        layer.weight = nn.Parameter(torch.round(layer.weight.detach() / step) * step)
    return gm, rounded, x


class Outputs(fx.Interpreter):
    """The outputs of all layers, kept."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[str, Tensor] = {}

    def call_module(self, target: str, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
        self.seen[target] = super().call_module(target, args, kwargs)
        return self.seen[target]


def means(gm: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    interpreter = Outputs(gm)
    with torch.no_grad():
        interpreter.run(x)
    return {name: y.double().mean((0, 2, 3) if y.dim() == 4 else 0) for name, y in interpreter.seen.items()}


def correct_by_definition(gm: fx.GraphModule, rounded: fx.GraphModule, x: Tensor) -> None:
    """Layer after layer: run everything, compare one layer's mean, mend its bias; then the next layer."""
    wanted = means(gm, x)
    for name in LAYERS:
        layer = rounded.get_submodule(name)
        shift = wanted[name] - means(rounded, x)[name]
        bias = 0 if layer.bias is None else layer.bias.detach().double()
        layer.bias = nn.Parameter((bias + shift).float())


class Readings:
    """One batch that counts how often it is read."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.count = x, 0

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        self.count += 1
        yield (self.x,)


def test_bias_correction_is_the_definition() -> None:
    gm, rounded, x = coarse()
    slow = copy.deepcopy(rounded)
    correct_by_definition(gm, slow, x)
    readings = Readings(x)
    notes = bias_correction.correct(gm, rounded, readings, LAYERS)
    assert readings.count == 4, "float means, means before, one sweep, means after"
    for name in LAYERS:
        expected = slow.get_submodule(name).bias
        assert torch.allclose(rounded.get_submodule(name).bias, expected, atol=2e-6), name
    assert [note.split(":")[0] for note in notes] == [*LAYERS, "checked"]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_bias_correction_over_batches(size: int) -> None:
    """Many small batches of sorted data end, too, with the float graph's means over all of it."""
    gm, rounded, x = coarse(1)
    x = x[x.mean((1, 2, 3)).argsort()]
    before, wanted = means(rounded, x), means(gm, x)
    notes = bias_correction.correct(gm, rounded, [(b,) for b in x.split(size)], LAYERS)
    after = means(rounded, x)
    interpreter = Outputs(gm)
    with torch.no_grad():
        interpreter.run(x)
    worst = {}
    for name in LAYERS:
        rms = float(interpreter.seen[name].double().square().mean().sqrt())
        worst[name] = float((after[name] - wanted[name]).abs().max()) / rms
        assert worst[name] <= bias_correction.RESIDUAL * 1.001, name
    assert max(float((before[n] - wanted[n]).abs().max()) for n in LAYERS) > 0.05
    name = max(worst, key=lambda n: worst[n])
    assert notes[-1] == f"checked: means left off by at most {worst[name]:.2%} ({name})"


def test_bias_correction_of_some_layers_touches_no_others() -> None:
    gm, rounded, x = coarse(2)
    kept = {name: value.clone() for name, value in rounded.state_dict().items()}
    bias_correction.correct(gm, rounded, [(x,)], ["up", "head"])
    changed = {
        name
        for name, value in rounded.state_dict().items()
        if name not in kept or not torch.equal(value, kept[name])
    }
    assert changed == {"up.bias", "head.bias"}
    assert torch.allclose(means(rounded, x)["head"], means(gm, x)["head"], atol=1e-6)


def test_bias_correction_keeps_its_best_sweep() -> None:
    """A layer that drifts ten times further on each call: the first sweep's bias is the best that can be had."""
    gm, _, x = coarse(3)
    drifting = copy.deepcopy(gm)
    drifting.conv1.bias.data += 1000.0
    calls = 0

    def drift(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output + 1e-3 * 10**calls

    drifting.conv1.register_forward_hook(drift)
    notes = bias_correction.correct(gm, drifting, [(x,)], ["conv1"])
    assert calls == 1 + 2 * bias_correction.SWEEPS
    assert torch.allclose(drifting.conv1.bias, gm.conv1.bias - 0.1, atol=1e-3)
    assert notes[-1].endswith("(conv1), more than the 1% aimed at")
