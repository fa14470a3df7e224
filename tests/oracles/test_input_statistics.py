"""Second moments of layers' inputs, and ranges weighted by them, against their definitions."""

import pytest
import torch
from torch import nn

import fewbit
from fewbit import statistics
from fewbit.calibrate import CalibrationWarning, Facts
from fewbit.data import as_batches
from fewbit.demo import network
from fewbit.errors import CalibrationError, DataError
from fewbit.model.readers.torch import read
from fewbit.numerics import Scheme, fake_quantize, qparams
from fewbit.observers import make_observer
from fewbit.plan import Plan, Row
from fewbit.rounding import hqq
from fewbit.statistics import Statistics

LAYERS = {
    "linear": (nn.Linear(6, 4), (9, 5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (5, 4, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0)), (4, 3, 7, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 5, 5)),
    "same": (nn.Conv2d(4, 4, 4, padding="same", groups=2, dilation=(1, 2)), (3, 4, 6, 7)),
    "reflect": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (3, 2, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 3)),
}


def row(site, shape, rounding="gptq", observer="minmax"):
    scheme = Scheme("int4", "channel", narrow=True)
    layer = site.rpartition(".")[0]
    return Row(site, layer, "conv", "weight", shape, scheme, observer, rounding)


def statistics_of(model, data, rows):
    return Statistics(model, Plan(tuple(rows)), as_batches(data, what="calibration"), Facts())


@pytest.mark.parametrize("name", LAYERS)
def test_the_hessian_gives_the_outputs_second_moment(name):
    """Of any weights: the mean square of output o is w_o H w_o, run by the layer; so H is the one defined."""
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer)
    x = torch.randn(shape, dtype=torch.float32)
    site = "0.weight"
    found = statistics_of(
        model, x.repeat(3, *[1] * (x.dim() - 1)), [row(site, tuple(layer.weight.shape))]
    ).of(site)
    groups = getattr(layer, "groups", 1)
    hessian = found["hessian"]
    assert hessian.shape == (groups, layer.weight[0].numel(), layer.weight[0].numel())
    assert hessian.dtype == torch.float64
    with torch.no_grad():
        for _ in range(3 * hessian.shape[1]):
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            outputs = layer(x).movedim(-1 if name == "linear" else 1, 0).flatten(1).to(torch.float64)
            rows = layer.weight.to(torch.float64).reshape(groups, -1, hessian.shape[1])
            expected = torch.einsum("goi,gij,goj->go", rows, hessian, rows).flatten()
            assert torch.allclose(outputs.square().mean(1), expected, rtol=1e-5)


def test_importance_is_the_diagonal_in_the_weights_shape():
    layer, shape = LAYERS["depthwise"]
    x = torch.randn(shape)
    full = row("0.weight", (8, 1, 3, 3), observer="importance")
    both = statistics_of(nn.Sequential(layer), x, [full]).of("0.weight")
    alone = statistics_of(
        nn.Sequential(layer), x, [row("0.weight", (8, 1, 3, 3), "nearest", "importance")]
    ).of("0.weight")
    expected = both["hessian"].diagonal(dim1=1, dim2=2).repeat_interleave(2, 0).reshape(8, 1, 3, 3)
    assert set(alone) == {"importance"}
    assert torch.equal(both["importance"], expected)
    assert torch.allclose(alone["importance"], expected)


class Twice(nn.Module):
    """A layer that is called twice, and one that has its weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(torch.relu(self.first(x)))))


def test_all_calls_of_a_weight_count():
    model, x = Twice(), torch.randn(40, 5)
    found = statistics_of(model, x, [row("first.weight", (5, 5))]).of("first.weight")["hessian"]
    with torch.no_grad():
        second = torch.relu(model.first(x))
        third = torch.relu(model.first(second))
    seen = torch.cat((x, second, third)).to(torch.float64)
    assert torch.allclose(found[0], seen.T @ seen / 120)


def test_several_passes_give_what_one_gives(monkeypatch):
    """Also when weights are rounded in the graph between the passes."""
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), torch.randn(30, 8)
    rows = [row(f"{i}.weight", (8, 8)) for i in range(4)]
    once = statistics_of(model, x, rows)
    expected = [once.of(r.site)["hessian"] for r in rows]
    monkeypatch.setattr(statistics, "_MOST_BYTES", 8 * 8 * 8 * 2)
    parts = statistics_of(model, x, rows)
    for i, r in enumerate(rows):
        assert torch.equal(parts.of(r.site)["hessian"], expected[i])
        with torch.no_grad():
            model[i].weight.zero_()


def test_of_very_many_places_some_are_drawn(monkeypatch):
    layer = nn.Conv2d(2, 4, 3, padding=1)
    x = torch.rand(8, 2, 40, 40)
    site = row("0.weight", (4, 2, 3, 3))
    exact = statistics_of(nn.Sequential(layer), x, [site]).of("0.weight")["hessian"]
    monkeypatch.setattr(statistics, "_MOST_PLACES", 4000)
    drawn = statistics_of(nn.Sequential(layer), x, [site]).of("0.weight")["hessian"]
    assert not torch.equal(drawn, exact)
    assert torch.allclose(drawn, exact, rtol=0.05)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))


def test_what_is_missing_is_said(small):
    x = torch.randn(64, 2, 6, 6)
    options = {"weights": "int4", "activations": "float"}
    message = r"0: rounding 'gptq' needs calibration data: call quantize\(model, calibration=data\)"
    with pytest.raises(CalibrationError, match=message):
        fewbit.quantize(small, example=x[:1], rounding="gptq", **options)
    with pytest.raises(CalibrationError, match="0: weight_observer 'importance' needs calibration data"):
        fewbit.quantize(small, example=x[:1], weight_observer="importance", **options)
    with pytest.raises(DataError, match="0: rounding reads the calibration data again, and a generator"):
        fewbit.quantize(small, (x[i : i + 8] for i in range(0, 64, 8)), weights="int4", rounding="gptq")


def test_too_few_samples_are_counted(small):
    """The head has 96 inputs, and each sample shows them once; the convolution sees 16 places in each."""
    with pytest.warns(CalibrationWarning) as seen:
        fewbit.quantize(small, torch.randn(40, 2, 6, 6), weights="int4", activations="float", rounding="gptq")
    assert [str(w.message) for w in seen] == [
        "3: 40 calibration samples show its 96 inputs 40 times, too few for rounding 'gptq': "
        "give at least 96 samples"
    ]


def test_layers_without_statistics_are_rounded_to_nearest_and_the_plan_says_so():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, words):
            return self.head(self.table(words).mean(1))

    words = torch.randint(0, 20, (64, 5))
    quantized = fewbit.quantize(
        Words(), words, weights="int4", activations="float", rounding="gptq", weight_observer="importance"
    )
    table, head = quantized.plan.row("table.weight"), quantized.plan.row("head.weight")
    assert (table.rounding, table.observer) == ("nearest", "mse")
    assert table.because.endswith("no hessian and importance of the inputs of embedding layers: nearest")
    assert (head.rounding, head.observer) == ("gptq", "importance")


def weighted_error(x, importance, lo, hi, scheme):
    scale, zero_point = qparams(lo.reshape(1), hi.reshape(1), scheme)
    one = Scheme(scheme.format, symmetric=scheme.symmetric, narrow=scheme.narrow)
    return float(
        (importance * (fake_quantize(x, scale, zero_point, one) - x).square()).sum(dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int3", "channel", narrow=True),
        Scheme("uint4", "group", group_size=32, symmetric=False),
        Scheme("nf4", "channel"),
    ],
    ids=lambda s: s.format,
)
def test_importance_finds_what_brute_force_finds(scheme):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(3, 64, generator=generator)
    w[0, 5] = 9.0  # an outlier whose input hardly counts, and one that counts much
    w[1, 7] = 9.0
    importance = torch.rand(3, 64, generator=generator).square()
    importance[0, 5], importance[1, 7] = 1e-4, 5.0
    lo, hi = make_observer("importance", scheme).bounds_of(w, {"importance": importance})
    rows, weights = w.reshape(len(lo), -1), importance.reshape(len(lo), -1)
    fractions = torch.linspace(0.02, 1, 60 if not scheme.symmetric else 800)
    for x, weight, low, high in zip(rows, weights, lo, hi, strict=True):
        if scheme.symmetric:
            top = x.abs().max() * fractions
            pairs = torch.stack((torch.maximum(-top, x.min()), torch.minimum(top, x.max())), 1)
        else:
            pairs = torch.cartesian_prod(x.min().clamp(max=0) * fractions, x.max().clamp(min=0) * fractions)
        best = min(weighted_error(x, weight, a, b, scheme) for a, b in pairs)
        assert weighted_error(x, weight, low, high, scheme) <= 1.05 * best
    if scheme.granularity == "channel":
        assert float(hi[0]) < 4 < float(hi[1])


def test_hqq_fits_scales_only_where_no_kernel_asked_for_the_range():
    w = torch.randn(4, 64)
    narrow, wide = w.abs().amax(1), 3 * w.abs().amax(1)
    scheme = Scheme("int3", "channel", narrow=True)
    asked = qparams(-wide, wide, scheme)[0]
    assert torch.equal(hqq.round(w, scheme, -wide, wide, {}).scale, asked)
    assert bool((hqq.round(w, scheme, -narrow, narrow, {}).scale < qparams(-narrow, narrow, scheme)[0]).all())


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_nearest_on_a_trained_network(bits):
    """Output error on images that were not calibrated with: at most half of nearest's."""
    model, data = network.load()
    images, calibration = torch.from_numpy(data.test_images), torch.from_numpy(data.calibration_images)
    error = {}
    with torch.no_grad():
        for rounding in ("nearest", "gptq"):
            quantized = fewbit.quantize(model, calibration, weights=f"int{bits}", rounding=rounding)
            error[rounding] = float((quantized(images) - model(images)).square().mean())
    assert error["gptq"] < 0.5 * error["nearest"]


def test_reading_keeps_the_padding_that_the_statistics_use():
    """A layer read through torch.export still has torch's own list of padding."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"))
    gm = read(model, (torch.randn(1, 2, 5, 5),))
    conv = next(m for m in gm.modules() if isinstance(m, nn.Conv2d))
    assert list(conv._reversed_padding_repeated_twice) == [1, 1, 1, 1]
