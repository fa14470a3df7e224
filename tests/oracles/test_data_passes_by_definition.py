"""SmoothQuant, high-bias absorption and analytic bias correction against their definitions, written out slowly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import CalibrationError, ModelError, RecipeError
from fewbit.model.readers.torch import read
from fewbit.passes import run
from fewbit.passes._expectation import clipped, expected_inputs
from fewbit.passes._layers import moments


class Attention(nn.Module):
    """One norm read by q, k and v, then a feed-forward behind another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + torch.softmax(self.q(y) @ self.k(y).transpose(1, 2), -1) @ self.v(y)
        return x + self.down(F.relu(self.up(self.norm2(x))))


def attention() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = Attention().eval()
    with torch.no_grad():
        module.norm1.weight.mul_(
            torch.randn(8).mul(2).exp()
        )  # channels of very unlike size, as language models have
        module.norm1.bias.normal_()
        module.norm2.weight.mul_(torch.randn(8).mul(2).exp())
    return module, torch.randn(6, 5, 8)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_behind_a_norm_is_the_definition(alpha: float) -> None:
    module, x = attention()
    gm = read(module, (x[:2],)).requires_grad_(False)
    module.requires_grad_(False)
    with torch.no_grad():
        inputs = module.norm1(x)
    weights = torch.stack([layer.weight.detach().abs().amax(0) for layer in (module.q, module.k, module.v)])
    run("smooth_quant", gm, (x[:2],), batches=[(x[:4],), (x[4:],)], alpha=alpha)
    for channel in range(8):
        largest = float(inputs[..., channel].abs().max())
        factor = largest**alpha / float(weights[:, channel].max()) ** (1 - alpha)
        assert float(gm.norm1.weight[channel]) == pytest.approx(
            float(module.norm1.weight[channel]) / factor, rel=1e-5
        )
        assert float(gm.norm1.bias[channel]) == pytest.approx(
            float(module.norm1.bias[channel]) / factor, rel=1e-5
        )
        for name in "qkv":
            expected = getattr(module, name).weight[:, channel] * factor
            assert torch.allclose(gm.get_submodule(name).weight[:, channel], expected, rtol=1e-5)
    with torch.no_grad():
        assert torch.allclose(gm(x), module(x), atol=1e-4)


def test_smoothing_ends_with_equal_ranges_along_a_chain() -> None:
    """alpha 0.5: of each channel, the largest input and the largest weight that reads it are the same."""
    module, x = attention()
    gm = read(module, (x[:2],))
    notes = run("smooth_quant", gm, (x[:2],), batches=[(x,)])
    assert any(note.startswith("norm2 -> up: smoothed, factors ") for note in notes)
    assert any(note.startswith("up -> down: smoothed, factors ") for note in notes)
    seen: dict[str, Tensor] = {}
    for name in ("up", "down"):
        gm.get_submodule(name).register_forward_pre_hook(
            lambda layer, inputs, name=name: seen.__setitem__(name, inputs[0].flatten(0, 1).abs().amax(0))
        )
    with torch.no_grad():
        gm(x)
    for name, largest in seen.items():
        weights = gm.get_submodule(name).weight.abs().amax(0)
        alive = largest > 1e-4 * largest.max()
        assert torch.allclose(largest[alive], weights[alive], rtol=1e-3)


def test_smoothing_knows_what_a_flattened_map_is() -> None:
    torch.manual_seed(1)
    conv, linear = nn.Conv2d(2, 3, 3), nn.Linear(3 * 16, 5)
    module = nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), linear).eval()
    x = torch.randn(4, 2, 10, 10)
    with torch.no_grad():
        largest = module[:4](x).reshape(4, 3, 16).abs().amax((0, 2))
    weights = linear.weight.detach().reshape(5, 3, 16).abs().amax((0, 2))
    gm = read(module, (x[:2],))
    run("smooth_quant", gm, (x[:2],), batches=[(x,)])
    factor = (largest / weights).sqrt()
    assert torch.allclose(gm.get_submodule("0").bias, conv.bias / factor, rtol=1e-5)


def test_smoothing_leaves_dead_channels() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)).eval()
    with torch.no_grad():
        module[0].weight[0] = 0.0
        module[1].weight[:, 1] = 0.0
    gm = read(module, (torch.randn(2, 3),))
    run("smooth_quant", gm, (torch.randn(2, 3),), batches=[(torch.randn(9, 3),)])
    assert torch.equal(gm.get_submodule("0").weight[:2], module[0].weight[:2])
    assert not torch.equal(gm.get_submodule("0").weight[2], module[0].weight[2])


def test_smoothing_refuses() -> None:
    module, x = attention()
    gm = read(module, (x[:2],))
    with pytest.raises(RecipeError, match="smooth_quant: alpha is 2, expected a number from 0 to 1"):
        run("smooth_quant", gm, (x[:2],), batches=[(x,)], alpha=2)
    with pytest.raises(CalibrationError, match="smooth_quant got no batches: give calibration data"):
        run("smooth_quant", gm, (x[:2],), batches=[])
    with pytest.raises(CalibrationError, match="the inputs of 'q' are not finite"):
        run("smooth_quant", gm, (x[:2],), batches=[(x * float("nan"),)])


def high(seed: int = 0) -> nn.Module:
    """Two layers with a ReLU and pooling between, whose channels are far from zero for ordinary inputs."""
    torch.manual_seed(seed)
    first, second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2, bias=False)
    module = nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), second).eval()
    with torch.no_grad():
        module[1].bias.copy_(torch.tensor([9.0, 7.0, 5.0, 0.5, -1.0, 6.0]))
    return module


def test_absorbed_is_the_smallest_value_seen() -> None:
    module, x = high(), 0.2 * torch.randn(16, 3, 12, 12)
    gm = read(module, (x[:2],))
    run("fold_batch_norm", gm, (x[:2],))
    first, second = copy.deepcopy(gm.get_submodule("0")), copy.deepcopy(gm.get_submodule("4"))
    notes = run("absorb_bias", gm, (x[:2],), batches=[(x[:9],), (x[9:],)])
    with torch.no_grad():
        least = module[:2](x).amin((0, 2, 3)).clamp(min=0)
    assert notes[0] == f"0 -> 4: absorbed from {int((least > 0).sum())} of 6 channels"
    assert int((least > 0).sum()) >= 4
    assert torch.allclose(gm.get_submodule("0").bias, first.bias - least, atol=1e-5)
    for output in range(4):
        group = output // 2
        moved = sum(float(second.weight[output, c].sum()) * float(least[3 * group + c]) for c in range(3))
        assert float(gm.get_submodule("4").bias[output]) == pytest.approx(moved, abs=1e-4)
    with torch.no_grad():
        assert torch.allclose(gm(x), module(x), atol=1e-4)
        assert gm.get_submodule("0")(x).amin() >= -1.5


def test_absorbed_without_data_is_three_deviations_below_the_mean() -> None:
    module, x = high(), torch.randn(2, 3, 12, 12)
    gm = read(module, (x,))
    run("fold_batch_norm", gm, (x,))
    bias = gm.get_submodule("0").bias.clone()
    run("absorb_bias", gm, (x,))
    expected = (module[1].bias - 3 * module[1].weight.abs()).clamp(min=0)
    assert torch.allclose(bias - gm.get_submodule("0").bias, expected, atol=1e-4)


OBSTACLES = {
    "padding": (nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), "4 pads its input with zeros"),
    "no relu": (nn.Identity(), nn.Conv2d(6, 4, 3), "no ReLU between: its range has no lower end"),
    "relu6": (nn.ReLU6(), nn.Conv2d(6, 4, 3), "clamps at fixed values, so a factor cannot pass"),
    "transposed": (nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), "4 pads its input with zeros"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_nothing_is_absorbed_where_a_constant_cannot_pass(name: str) -> None:
    between, second, reason = OBSTACLES[name]
    module, x = high(), torch.randn(2, 3, 12, 12)
    module[2], module[4] = between, second
    gm = read(module.eval(), (x,))
    run("fold_batch_norm", gm, (x,))
    kept = {key: value.clone() for key, value in gm.state_dict().items()}
    notes = run("absorb_bias", gm, (x,), batches=[(x,)])
    assert any(note.endswith(reason) for note in notes), notes
    assert all(torch.equal(value, kept[key]) for key, value in gm.state_dict().items())


@pytest.mark.parametrize(("lo", "hi"), [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 2.0)])
def test_moments_of_a_clipped_gaussian(lo: float, hi: float) -> None:
    mean, std = (
        torch.tensor([-3.0, -0.5, 0.0, 2.0, 8.0]).double(),
        torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1]).double(),
    )
    draws = (mean + std * torch.randn(400_000, 5, dtype=torch.float64)).clamp(lo, hi)
    found_mean, found_var = clipped(mean, std.square(), lo, hi)
    assert torch.allclose(found_mean, draws.mean(0), atol=0.02)
    assert torch.allclose(found_var, draws.var(0), atol=0.05)


class Stages(nn.Module):
    """What means must be carried through: ReLU, a shortcut with padded channels, pooling, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.mix, self.head = nn.Conv2d(6, 6, 1, groups=3), nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y = F.relu(y + F.pad(x, (0, 0, 0, 0, 1, 1)))
        return self.head(F.avg_pool2d(self.mix(y), 2).flatten(1)), y


def stages() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    module, x = Stages(), torch.randn(64, 2, 4, 4)
    with torch.no_grad():
        for norm in (module.bn1, module.bn2):
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.normal_()
            norm.momentum = None
        module.train()(x)
    return module.eval(), x


def test_means_follow_the_rules() -> None:
    module, x = stages()
    gm = read(module, (x[:2],))
    run("fold_batch_norm", gm, (x[:2],))
    known = expected_inputs(gm)
    assert set(known) == {"conv2", "mix"}, "conv1's input and what mix gives are told by no batch norm"
    m1, v1 = clipped(module.bn1.bias.double(), module.bn1.weight.double().square(), 0.0, math.inf)
    assert torch.allclose(known["conv2"], m1, atol=1e-4)
    mean = module.bn2.bias.double() + F.pad(m1, (1, 1))
    var = module.bn2.weight.double().square() + F.pad(v1, (1, 1))
    assert torch.allclose(known["mix"], clipped(mean, var, 0.0, math.inf)[0], atol=1e-4)


def test_analytic_correction_is_the_definition() -> None:
    module, x = stages()
    gm = read(module, (x[:2],))
    run("fold_batch_norm", gm, (x[:2],))
    quantized = copy.deepcopy(gm)
    for name in ("conv1", "conv2", "mix"):
        layer = quantized.get_submodule(name)
        layer.weight.data = torch.round(layer.weight.data * 2) / 2
    notes = run(
        "analytic_bias_correction", quantized, (x[:2],), reference=gm, layers=["conv1", "conv2", "mix"]
    )
    assert notes[0] == "conv1: not corrected: no batch norm tells the mean of its input"
    known = expected_inputs(gm)
    for name, groups in (("conv2", 1), ("mix", 3)):
        before, after = gm.get_submodule(name), quantized.get_submodule(name)
        inputs = len(known[name]) // groups
        for output in range(len(before.weight)):
            group = output // (len(before.weight) // groups)
            shift = sum(
                float((after.weight - before.weight)[output, c].sum())
                * float(known[name][group * inputs + c])
                for c in range(inputs)
            )
            assert float(after.bias[output]) == pytest.approx(float(before.bias[output]) - shift, abs=1e-5)
    assert torch.equal(quantized.conv1.bias, gm.conv1.bias)
    with pytest.raises(
        ModelError, match="bias correction: 'bn1' is not a convolution or linear layer of both graphs"
    ):
        run("analytic_bias_correction", quantized, (x[:2],), reference=gm, layers=["bn1"])


def test_analytic_correction_moves_means_towards_the_float_graphs() -> None:
    module, x = stages()
    gm = read(module, (x[:2],))
    run("fold_batch_norm", gm, (x[:2],))
    quantized = copy.deepcopy(gm)
    quantized.conv2.weight.data = torch.round(quantized.conv2.weight.data * 2) / 2
    with torch.no_grad():
        inputs = F.relu(gm.conv1(x))
        wanted, before = gm.conv2(inputs).mean((0, 2, 3)), quantized.conv2(inputs).mean((0, 2, 3))
        run("analytic_bias_correction", quantized, (x[:2],), reference=gm, layers=["conv2"])
        after = quantized.conv2(inputs).mean((0, 2, 3))
    assert float((after - wanted).norm()) < 0.35 * float((before - wanted).norm())


def test_equalizing_scales_what_is_known_of_a_layers_output() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    with torch.no_grad():
        module[1].weight.copy_(torch.randn(5).exp())
        module[1].bias.normal_()
    gm = read(module, (x,))
    run("fold_batch_norm", gm, (x,))
    before = gm.get_submodule("0").weight.detach().clone()
    run("equalize", gm, (x,))
    factor = (before.flatten(1)[:, 0] / gm.get_submodule("0").weight.detach().flatten(1)[:, 0]).double()
    node = next(n for n in copy.deepcopy(gm).graph.nodes if n.target == "0")
    known = moments(node)
    assert known is not None
    assert torch.allclose(known[0], module[1].bias.double() / factor, rtol=1e-4)
    assert torch.allclose(known[1], module[1].weight.double() / factor, rtol=1e-4)
