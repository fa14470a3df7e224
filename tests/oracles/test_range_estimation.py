"""Observers against slow twins that follow the definitions, on the raw data."""

import math

import pytest
import torch

from fewbit.numerics import Scheme, fake_quantize, qparams
from fewbit.numerics.clipping import search_clipping
from fewbit.numerics.histogram import Histogram
from fewbit.observers import entropy, make_observer


def distribution(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(20_000, generator=generator)
    return {
        "normal": x,
        "relu": x.relu(),
        "heavy": x + 0.2 * x.pow(3),
        "skewed": torch.where(x > 0, 3 * x, 0.4 * x),
        "far": x.clamp(-3, 3) * 0.1 + 7,
        "outlier": torch.cat((x, torch.tensor([60.0, -25.0]))),
        "negative": -x.abs() - 0.5,
    }[name]


DISTRIBUTIONS = ["normal", "relu", "heavy", "skewed", "far", "outlier", "negative"]


def squared_error(x, lo, hi, scheme):
    scale, zero_point = qparams(torch.tensor([lo]), torch.tensor([hi]), scheme)
    return float((fake_quantize(x, scale, zero_point, scheme) - x).square().to(torch.float64).mean())


def brute_force(x, scheme):
    """The least error over a plain grid of ranges, on the raw data: 200 of one bound, 40 x 40 of two."""
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if scheme.symmetric or lo == 0 or hi == 0:
        top = max(-lo, hi) if scheme.symmetric else 0.0
        pairs = [(f, f) for f in torch.linspace(0.005, 1, 200).tolist()]
        lo, hi = (-top if lo < 0 else 0.0, top) if scheme.symmetric else (lo, hi)
    else:
        grid = torch.linspace(0.025, 1, 40).tolist()
        pairs = [(f, g) for f in grid for g in grid]
    return min(squared_error(x, lo * f, hi * g, scheme) for f, g in pairs)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int2"),
        Scheme("int4", narrow=True),
        Scheme("int8"),
        Scheme("uint4"),
        Scheme("uint3", symmetric=False),
        Scheme("uint8", symmetric=False),
        *map(Scheme, ("nf4", "float4_e2m1", "pow2_4", "apot_3", "exp_3", "binary", "ternary")),
    ],
    ids=lambda s: f"{s.format}-{'symmetric' if s.symmetric else 'affine'}",
)
def test_mse_is_as_good_as_brute_force(name, scheme):
    x = distribution(name)
    observer = make_observer("mse", scheme)
    for part in x.split(3000):
        observer.update(part)
    lo, hi = observer.bounds()
    assert squared_error(x, lo.item(), hi.item(), scheme) <= 1.02 * brute_force(x, scheme)


@pytest.mark.parametrize("bits", [12, 14, 16])
@pytest.mark.parametrize("sparse", [False, True])
def test_mse_is_not_fooled_where_steps_are_finer_than_bins(bits, sparse):
    """With thousands of levels clipping hardly pays, and the error seen in 2,048 bins must say so.

    Nor do exact zeros have an error that a narrower range could lessen, however many they are.
    """
    x = distribution("normal")
    if sparse:
        x = torch.cat((x.relu(), torch.zeros(2_000_000)))
    scheme = Scheme(f"int{bits}")
    observer = make_observer("mse", scheme)
    observer.update(x)
    lo, hi = observer.bounds()
    whole = squared_error(x, float(x.min()), float(x.max()), scheme)
    assert squared_error(x, lo.item(), hi.item(), scheme) <= 1.02 * whole


def test_mse_treats_each_channel_by_itself():
    x = torch.stack([distribution(name)[:20_000] for name in ("normal", "heavy", "outlier", "relu")])
    scheme = Scheme("int4", "channel")
    observer = make_observer("mse", scheme)
    observer.update(x)
    lo, hi = observer.bounds()
    for i, row in enumerate(x):
        alone = make_observer("mse", Scheme("int4"))
        alone.update(row)
        assert [lo[i].item(), hi[i].item()] == [bound.item() for bound in alone.bounds()]


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "far"])
@pytest.mark.parametrize(
    "scheme", [Scheme("int2"), Scheme("int4", narrow=True), Scheme("uint4", symmetric=False)], ids=str
)
def test_the_ranges_of_weights_are_searched_less_and_cost_little(name, scheme):
    """On numbers about zero, until narrower ranges are hopeless: within 3 % of the least error."""
    x = distribution(name)[:4000]
    lo, hi = make_observer("mse", scheme).bounds_of(x, {})
    assert squared_error(x, float(lo), float(hi), scheme) <= 1.03 * brute_force(x, scheme) + 1e-12


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_is_torch_quantile(name, percent, symmetric):
    x = distribution(name)
    observer = make_observer("percentile", Scheme("int8", symmetric=symmetric))
    observer.PERCENTILE = percent
    for part in x.split(3000):
        observer.update(part)
    lo, hi = (bound.item() for bound in observer.bounds())
    width = float(torch.exp2(observer.histogram.exponent.to(torch.float32)))
    if symmetric:
        check_quantile(max(-lo, hi), x.abs(), percent / 100, width)
        return
    if float(x.max()) > 0:
        check_quantile(hi, x, percent / 100, width)
    else:
        assert hi == 0
    if float(x.min()) < 0:
        check_quantile(lo, x, 1 - percent / 100, width)
    else:
        assert lo == 0


def check_quantile(found, x, p, width):
    """Within a bin of torch's quantile or, where numbers are sparser than bins, between its neighbours."""
    exact = torch.quantile(x, p).item()
    rank, ordered = p * (len(x) - 1), x.sort().values.tolist()
    low, high = ordered[max(0, math.floor(rank) - 1)], ordered[min(len(x) - 1, math.ceil(rank) + 1)]
    assert abs(found - exact) <= width or low - width <= found <= high + width


def divergence_by_definition(edges, counts, low, high, levels, scale, zero_point):
    """KL(P || Q) bin by bin, with lists and loops, as the GTC 2017 slides describe it."""
    bins = len(counts)
    first = max(j for j in range(bins) if edges[j] <= low or j == 0)
    last = max(j for j in range(bins) if edges[j] <= high or j == 0)
    p = list(counts[first : last + 1])
    p[0] += sum(counts[:first])
    p[-1] += sum(counts[last + 1 :])
    level_of = []
    for j in range(first, last + 1):
        v = (edges[j] + edges[j + 1]) / 2 / scale + zero_point
        level_of.append(min(range(len(levels)), key=lambda i: (abs(levels[i] - v), i)))
    q = [0.0] * len(p)
    for level in set(level_of):
        members = [i for i, found in enumerate(level_of) if found == level]
        total = sum(counts[first + i] for i in members)
        filled = [i for i in members if p[i] > 0]
        for i in filled:
            q[i] = total / len(filled)
    if sum(q) == 0 or any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return math.inf
    total_p, total_q = sum(p), sum(q)
    return sum(
        a / total_p * math.log(a / total_p / (b / total_q)) for a, b in zip(p, q, strict=True) if a > 0
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "scheme", [Scheme("int4"), Scheme("uint4", symmetric=False), Scheme("uint3"), Scheme("int3", narrow=True)]
)
def test_divergence_is_the_one_defined(name, scheme):
    """On a histogram of 256 bins, for many ranges: wide, narrow, on one side."""
    x = distribution(name).reshape(1, -1)
    lo, hi = x.amin(dim=1), x.amax(dim=1)
    histogram = Histogram(lo, hi, 256)
    histogram.update(x, lo, hi)
    edges, counts = histogram.edges()[0], histogram.nonzero_counts()[0].to(torch.float64)
    fractions = torch.tensor([1.0, 0.8, 0.513, 0.31, 0.1, 0.03, 0.004], dtype=torch.float64)
    pairs = torch.cartesian_prod(fractions, fractions)
    low, high = lo.clamp(max=0) * pairs[:, 0], hi.clamp(min=0) * pairs[:, 1]
    scale, zero_point = qparams(low, high, scheme)
    observer = make_observer("entropy", scheme)
    levels = observer._levels()
    steps = ((levels[1:] + levels[:-1]) / 2 - zero_point[:, None]) * scale[:, None].to(torch.float64)
    found = entropy._divergence(edges, counts, low, high, steps)
    for i in range(len(pairs)):
        expected = divergence_by_definition(
            edges.tolist(), counts.tolist(), low[i].item(), high[i].item(), levels.tolist(),
            scale[i].item(), zero_point[i].item(),
        )  # fmt: skip
        assert found[i].item() == pytest.approx(expected, abs=1e-9), (name, low[i].item(), high[i].item())


@pytest.mark.parametrize("name", ["normal", "relu", "heavy", "skewed", "outlier"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_finds_the_least_divergence(name, symmetric):
    """No range on a fine plain grid diverges less by more than a hundredth."""
    x = distribution(name)
    scheme = Scheme("uint4" if not symmetric else "int4", symmetric=symmetric)
    observer = make_observer("entropy", scheme)
    observer.update(x)
    edges = observer.histogram.edges()[0]
    counts = observer.histogram.nonzero_counts()[0].to(torch.float64)
    levels = observer._levels()

    def divergence(low, high):
        scale, zero_point = qparams(low, high, scheme)
        steps = ((levels[1:] + levels[:-1]) / 2 - zero_point[:, None]) * scale[:, None].to(torch.float64)
        return entropy._divergence(edges, counts, low.to(torch.float64), high.to(torch.float64), steps)

    lo, hi = observer.observed()
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if symmetric:
        top = torch.maximum(-lo, hi) * torch.linspace(0.01, 1, 300)
        low, high = torch.maximum(-top, lo), torch.minimum(top, hi)
    else:
        pairs = torch.cartesian_prod(torch.linspace(0.02, 1, 50), torch.linspace(0.02, 1, 50))
        low, high = lo * pairs[:, 0], hi * pairs[:, 1]
    best = float(divergence(low, high).min())
    assert float(divergence(*observer.bounds())) <= best + max(0.01 * best, 1e-4)


def test_moving_average_is_the_weighted_mean_of_batch_extremes():
    generator = torch.Generator().manual_seed(12)
    data = [torch.randn(100, generator=generator) * (1 + i % 3) for i in range(30)]
    observer = make_observer("moving_average", Scheme("int8"))
    for x in data:
        observer.update(x)
    weights = [0.99 ** (len(data) - 1 - i) for i in range(len(data))]
    total = sum(weights)
    expected = [
        sum(w * float(f(x)) for w, x in zip(weights, data, strict=True)) / total
        for f in (torch.min, torch.max)
    ]
    assert [bound.item() for bound in observer.bounds()] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_histogram_counts_are_those_of_numpy_style_counting(name):
    """After growing from a first small batch, each bin holds just the numbers between its edges."""
    x = distribution(name)
    x = torch.cat((x[:10] * 1e-3, x))
    rows = x.reshape(1, -1)
    first = rows[:, :10]
    histogram = Histogram(first.amin(dim=1), first.amax(dim=1), 128)
    for part in rows.split(777, dim=1):
        histogram.update(part, part.amin(dim=1), part.amax(dim=1))
    edges, values = histogram.edges()[0].tolist(), x.to(torch.float64)
    for j in range(128):
        expected = int(((values >= edges[j]) & (values < edges[j + 1])).sum())
        assert histogram.counts[0, j].item() == expected
    others = values[values != 0]
    for j in range(128):
        expected = int(((others >= edges[j]) & (others < edges[j + 1])).sum())
        assert histogram.nonzero_counts()[0, j].item() == expected
    assert histogram.counts.sum().item() == x.numel()
    assert histogram.zeros.item() == int((x == 0).sum())
    used = math.ceil((x.max().item() - x.min().item()) / (edges[1] - edges[0]))
    assert used > 128 // 2 - 2, "a coarser layout than needed"


def test_histograms_of_far_apart_data_grow_to_the_same():
    """Ranges that differ by a factor of 10**20, in either order, and merged."""
    small, large = torch.tensor([[1e-10, 0.0, -2e-10]]), torch.tensor([[1e10, 3.0, -1.0]])

    def built(*parts):
        found = Histogram(parts[0].amin(dim=1), parts[0].amax(dim=1))
        for part in parts:
            found.update(part, part.amin(dim=1), part.amax(dim=1))
        return found

    forward, backward, merged = built(small, large), built(large, small), built(small)
    merged.merge(built(large))
    for other in (backward, merged):
        assert torch.equal(forward.counts, other.counts)
        assert torch.equal(forward.edges(), other.edges())
    assert forward.counts.sum() == 6


def test_search_finds_both_bounds_of_a_known_loss():
    """A loss with its least value at a known range, as far down as a thousandth of the extremes."""
    lo, hi = torch.tensor([-10.0, -10.0, 0.0]), torch.tensor([10.0, 20.0, 5.0])
    goal_lo, goal_hi = torch.tensor([[-2.0], [-10.0], [0.0]]), torch.tensor([[0.01], [20.0], [3.0]])

    def loss(low, high):
        return (low - goal_lo).abs() / 10 + (high.log() - goal_hi.log()).abs()

    low, high = search_clipping(loss, lo, hi, symmetric=False)
    assert torch.allclose(low, goal_lo.squeeze(1).to(low.dtype), rtol=0.01)
    assert torch.allclose(high, goal_hi.squeeze(1).to(high.dtype), rtol=0.01)
