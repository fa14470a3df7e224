"""k-means in one dimension against its exact answer, and the codebooks made with it against their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.numerics import QTensor, Scheme, blocks, clustering
from fewbit.numerics.clustering import cluster, nearest_value
from fewbit.rounding import round_weight
from fewbit.rounding.lloyd_max import fit_density


def least_distortion(x: torch.Tensor, levels: int, weights: torch.Tensor) -> float:
    """The least weighted squared error with one level at zero: all partitions of the sorted numbers, exactly."""
    x, order = x.double().sort()
    w = weights.double()[order]
    n = len(x)
    total, first, second = (torch.cat((torch.zeros(1).double(), t.cumsum(0))) for t in (w, w * x, w * x * x))
    of = [t[None, :] - t[:, None] for t in (total, first, second)]  # of the numbers i to j, at [i, j]
    backwards = torch.full((n + 1, n + 1), torch.inf).double().tril(-1)
    free = (of[2] - of[1].square() / of[0].clamp(min=1e-300)).clamp(min=0) + backwards
    as_zero = of[2] + backwards
    without = torch.full((n + 1,), torch.inf).double()
    without[0] = 0
    with_zero = torch.full_like(without, torch.inf)
    for _ in range(levels):
        with_zero = torch.minimum((with_zero[:, None] + free).amin(0), (without[:, None] + as_zero).amin(0))
        without = (without[:, None] + free).amin(0)
    return float(with_zero[-1])


def distortion(rows: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    error = (rows.double().unsqueeze(2) - values.double().unsqueeze(1)).abs().amin(dim=2)
    return (weights * error.square()).sum(dim=1)


def samples(kind: str, count: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind) + n)
    x = torch.randn(count, n, generator=generator)
    if kind == "laplace":
        return x.sign() * torch.rand(count, n, generator=generator).log().neg()
    if kind == "outlier":
        x[:, 3] = 100.0
    if kind == "one side":
        return x.abs() + 0.1
    if kind == "two humps":
        return x.sign() + 0.05 * x
    if kind == "few numbers":
        return (2 * x).round()
    return x


KINDS = ["gauss", "laplace", "outlier", "one side", "two humps", "few numbers"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [20, 144, 500])
def test_clusters_are_the_best_ones(kind, n):
    """Within 0.6 % of the optimum; where every number has a bin of its own, the optimum."""
    rows = samples(kind, 6, n)
    weights = torch.rand(6, n, generator=torch.Generator().manual_seed(n)) ** 3
    for levels in (2, 4, 16):
        for given_weights in (None, weights):
            used = torch.ones_like(rows) if given_weights is None else weights
            values = cluster(rows, levels, given_weights)
            assert values.shape == (6, levels)
            assert bool((values.diff(dim=1) >= 0).all())
            assert bool((values == 0).any(dim=1).all())
            best = torch.tensor([least_distortion(x, levels, w) for x, w in zip(rows, used, strict=True)])
            slack = 1.000001 if n <= 144 else 1.006
            assert bool((distortion(rows, values, used) <= best * slack + 1e-9).all())


def test_many_rows_are_clustered_as_each_alone():
    """Bins are coarser where rows are many: still within a hundredth of the optimum, a thousandth on average."""
    rows = samples("laplace", 4000, 128)
    found = distortion(rows, cluster(rows, 16), torch.ones_like(rows))[::200]
    best = torch.tensor([least_distortion(x, 16, torch.ones(128)) for x in rows[::200]])
    assert float((found / best).mean()) < 1.005
    assert float((found / best).max()) < 1.05


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_are_clustered_by_a_histogram_as_well(kind, monkeypatch):
    """The same values as by sorting, but for what a cell of the histogram is wide; with weights and without."""
    rows = samples(kind, 3, 5000)
    weights = torch.rand(3, 5000, generator=torch.Generator().manual_seed(1))
    expected = [
        distortion(rows, cluster(rows, 8, w), weights if w is not None else 1) for w in (None, weights)
    ]
    monkeypatch.setattr(clustering, "_LONG", 4999)
    monkeypatch.setattr(clustering, "_CELLS", 1024)
    for w, best in zip((None, weights), expected, strict=True):
        found = distortion(rows, cluster(rows, 8, w), weights if w is not None else 1)
        assert torch.allclose(found, best, rtol=2e-3, atol=1e-4)


def test_where_tables_would_be_too_large_the_density_is_the_start(monkeypatch):
    rows, ones = samples("laplace", 3, 1000), torch.ones(1000)
    monkeypatch.setattr(clustering, "_WORK", 1)
    for levels, slack in ((8, 1.05), (32, 1.3)):
        found = distortion(rows, cluster(rows, levels), torch.ones_like(rows))
        best = torch.tensor([least_distortion(x, levels, ones) for x in rows])
        assert bool((found <= slack * best).all())


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12),
    levels=st.sampled_from([2, 3, 8]),
    repeat=st.integers(1, 3),
)
def test_any_numbers_are_clustered(numbers, levels, repeat):
    """Few distinct numbers have a value each; extremes of float32 do no harm."""
    row = torch.tensor(numbers * repeat, dtype=torch.float32).unsqueeze(0)
    values = cluster(row, levels)
    assert bool(torch.isfinite(values).all())
    distinct = set(row[row != 0].tolist())
    size = float(row.abs().max())
    if len(distinct) < levels:
        error = distortion(row / max(size, 1e-30), values / max(size, 1e-30), torch.ones_like(row))
        assert float(error) <= 1e-12


def test_nearest_value_by_definition():
    rows, values = samples("gauss", 5, 64), cluster(samples("gauss", 5, 64), 8)
    for table in (values, values[:1]):
        index = nearest_value(rows, table)
        chosen = table.expand(5, -1).gather(1, index.long())
        best = (rows.unsqueeze(2) - table.float().unsqueeze(1)).abs().amin(dim=2)
        assert torch.allclose((rows - chosen).abs().float(), best, atol=1e-6)


def test_values_for_a_density_are_the_published_ones():
    """Max (1960), table I, for odd numbers of levels of a Gaussian, where zero is one of them; and the distortions."""
    x = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))
    for levels, positive, distortion_known in (
        (3, [1.224], 0.1902),
        (5, [0.7646, 1.724], 0.07994),
        (7, [0.5606, 1.188, 2.033], 0.04400),
    ):
        values = fit_density(x, levels)
        expected = torch.tensor([-v for v in positive[::-1]] + [0.0] + positive).double() * x.std()
        assert torch.allclose(values[0], expected, rtol=5e-3, atol=1e-6)
        assert float(distortion(x, values, torch.ones_like(x))) / 400_000 == pytest.approx(
            distortion_known, rel=0.01
        )


@pytest.mark.parametrize("rounding", ["kmeans", "lloyd_max"])
@pytest.mark.parametrize("name", ["codebook4", "codebook3_shared"])
def test_codebooks_beat_integers_of_as_many_bits(rounding, name):
    """Of weights [32, 16, 3, 3], per channel: clearly less error than int<N> at its best range."""
    w = samples("laplace", 32, 144).reshape(32, 16, 3, 3) * torch.logspace(-3, 3, 32).reshape(-1, 1, 1, 1)
    scheme = Scheme(name, "channel")
    q = round_weight(rounding, w, scheme, *rows_range(w, scheme))
    integer = Scheme(f"int{scheme.spec.bits}", "channel", narrow=True)
    lo, hi = rows_range(w, integer)
    errors = [
        QTensor.quantize(w, integer, lo * c, hi * c).dequantize() - w for c in torch.linspace(0.2, 1, 17)
    ]
    size = w.square().mean(dim=(1, 2, 3))
    best = torch.stack([e.square().mean(dim=(1, 2, 3)) / size for e in errors]).amin(0).mean()
    ours = ((q.dequantize() - w).square().mean(dim=(1, 2, 3)) / size).mean()
    assert float(ours) < (0.75 if rounding == "kmeans" else 0.95) * float(best)


def rows_range(w, scheme):
    rows = blocks(w, scheme)
    return rows.amin(dim=1), rows.amax(dim=1)


def test_a_shared_table_serves_the_channels_whose_errors_count():
    """One channel is a thousand times as large as the others and has four values: the table must be these."""
    w = samples("gauss", 32, 64)
    w[5] = 1000 * torch.tensor([-1.0, -0.4, 0.0, 0.7]).repeat(16)
    scheme = Scheme("codebook2_shared", "channel")
    error = (round_weight("kmeans", w, scheme, *rows_range(w, scheme)).dequantize() - w).square()
    assert float(error[5].mean()) < 1.0
    assert float(error.mean()) < 1.0


def test_the_odd_value_of_a_density_is_on_the_side_that_reaches_further():
    x = samples("laplace", 2, 1000)
    x[0, 0], x[1, 0] = 30.0, -30.0
    values = fit_density(x, 4)
    assert (values > 0).sum(dim=1).tolist() == [2, 1]
    assert (values < 0).sum(dim=1).tolist() == [1, 2]


@pytest.mark.parametrize("rounding", ["kmeans", "lloyd_max"])
@pytest.mark.parametrize("name", ["codebook2", "codebook2_shared"])
def test_blocks_without_variance_and_dead_ones_work(rounding, name):
    w = torch.stack((torch.full((8,), 0.3), torch.zeros(8), torch.full((8,), -1e-20), torch.ones(8)))
    scheme = Scheme(name, "channel")
    values = round_weight(rounding, w, scheme, *rows_range(w, scheme)).dequantize()
    assert bool((values[1] == 0).all())
    if rounding == "kmeans":
        assert torch.allclose(values, w, rtol=1e-3, atol=0)
    assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize("name", ["codebook3", "codebook3_shared"])
def test_importance_decides(name):
    """Where half of the inputs count a thousand times as much, their error falls, and the others' rises."""
    w = samples("gauss", 16, 64)
    scheme = Scheme(name, "channel")
    importance = torch.ones(16, 64)
    importance[:, ::2] = 1000.0
    plain, weighted = (
        (
            round_weight(name, w, scheme, *rows_range(w, scheme), {"importance": importance}).dequantize() - w
        ).square()
        for name in ("kmeans", "weighted_kmeans")
    )
    assert float(weighted[:, ::2].mean()) < 0.95 * float(plain[:, ::2].mean())
    assert float(weighted[:, 1::2].mean()) > float(plain[:, 1::2].mean())


def test_tables_larger_than_what_they_code_are_refused():
    w = samples("gauss", 4, 9)
    with pytest.raises(
        FormatError, match="codebook4 has tables of 16 values, and here 9 numbers share one: "
    ):
        round_weight("kmeans", w, Scheme("codebook4", "channel"), w.amin(1), w.amax(1))
    with pytest.raises(
        FormatError,
        match=r"codebook6_shared has tables of 64 values, and here 36 numbers.*bits, another format",
    ):
        round_weight("kmeans", w, Scheme("codebook6_shared", "channel"), w.amin(1), w.amax(1))
    q = round_weight("kmeans", w, Scheme("codebook5_shared", "channel"), w.amin(1), w.amax(1))
    assert q.nbytes == -(-36 * 5 // 8) + 4 * 4 + 32 * 2


def test_three_values_by_the_papers_threshold():
    """Equations 4 to 6 of arXiv 1605.04711, number by number."""
    w = samples("laplace", 6, 50)
    w[4] = 0
    scheme = Scheme("ternary", "channel")
    values = round_weight("twn", w, scheme, *rows_range(w, scheme)).dequantize()
    for row, found in zip(w, values, strict=True):
        threshold = 0.7 * float(row.abs().mean())
        beyond = [abs(v) for v in row.tolist() if abs(v) > threshold]
        scale = sum(beyond) / len(beyond) if beyond else 0.0
        expected = [scale * (1 if v > threshold else -1 if v < -threshold else 0) for v in row.tolist()]
        assert found.tolist() == pytest.approx(expected, rel=1e-6)
