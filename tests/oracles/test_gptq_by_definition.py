"""GPTQ against its definition: one column after another, with the explicit inverse of the Hessian."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import CalibrationError
from fewbit.numerics import QTensor, Scheme, blocks, fake_quantize, unblocks
from fewbit.numerics.gptq import DAMPING, factor, losses, round_inputs
from fewbit.rounding import round_weight

SCHEMES = [
    Scheme("int4", "channel", narrow=True),
    Scheme("uint4", "channel", symmetric=False),
    Scheme("int3", "group", group_size=50),
    Scheme("uint2", "group", group_size=25, symmetric=False),
    Scheme("int2"),
    Scheme("int8", "channel", axis=1),
    Scheme("nf4", "channel"),
    Scheme("float4_e2m1", "group", group_size=75),
    Scheme("ternary", "channel"),
    Scheme("codebook3", "channel"),
    Scheme("codebook2", "group", group_size=50),
    Scheme("codebook2", "channel", axis=1),
    Scheme("codebook3_shared", "channel"),
]


def inputs(places, width, seed=0):
    """Correlated inputs of different size: float64 [places, width]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(places, width, generator=generator, dtype=torch.float64)
    mixed = x @ torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return (x + mixed) * torch.logspace(-1, 0.5, width, dtype=torch.float64)[
        torch.randperm(width, generator=generator)
    ]


def weights(outputs, width, seed=1):
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))


def by_definition(weight, hessian, scheme, lo, hi):
    """Optimal brain quantization of all rows in one order: quantize a column, move the rest, remove its row of H."""
    plain = nearest_codes(weight, scheme, lo, hi)
    w, h = weight.to(torch.float64).clone(), hessian.to(torch.float64).clone()
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    result = torch.zeros_like(w)
    for column in hessian.diagonal().argsort(stable=True).flip(0).tolist():
        whole = representable(w.to(torch.float32), plain)
        result[:, column] = whole[:, column].to(torch.float64)
        error = (w[:, column] - result[:, column]) / inverse[column, column]
        w -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    nearest = plain.dequantize().to(torch.float64)
    worse = loss(weight, result, hessian) > loss(weight, nearest, hessian)
    return torch.where(worse[:, None], nearest, result)


def nearest_codes(weight, scheme, lo, hi):
    if scheme.spec.learned:
        return round_weight("kmeans", weight, scheme, lo, hi)
    return QTensor.quantize(weight, scheme, lo, hi)


def representable(w, plain):
    """The nearest values that the codes of `plain` could stand for."""
    if plain.codebook is None:
        return fake_quantize(w, plain.scale, plain.zero_point, plain.scheme)
    values = (plain.codebook * plain.scale[:, None]).expand(len(plain.scale), -1)
    rows = blocks(w, plain.scheme)
    codes = (rows[:, :, None] - values[:, None]).abs().argmin(dim=2)
    return unblocks(values.gather(1, codes), w.shape, plain.scheme)


def loss(weight, values, hessian):
    error = weight.to(torch.float64) - values.to(torch.float64)
    return torch.einsum("oi,ij,oj->o", error, hessian.to(torch.float64), error)


def extremes(weight, scheme):
    rows = blocks(weight, scheme)
    return rows.amin(dim=1), rows.amax(dim=1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.granularity}-{s.axis}")
@pytest.mark.parametrize("places", [600, 40])
def test_codes_are_those_of_the_definition(scheme, places):
    """Over several blocks of columns, with a Hessian of full rank and with a singular one."""
    w, x = weights(7, 150), inputs(places, 150)
    hessian = x.T @ x / places
    lo, hi = extremes(w, scheme)
    q = round_weight("gptq", w, scheme, lo * 0.8, hi * 0.8, {"hessian": hessian})
    expected = by_definition(w, hessian, scheme, lo * 0.8, hi * 0.8)
    assert torch.equal(q.dequantize(), expected.to(torch.float32))
    nearest = nearest_codes(w, scheme, lo * 0.8, hi * 0.8)
    assert not torch.equal(q.codes, nearest.codes)


def test_groups_of_a_convolution_have_hessians_of_their_own():
    w = weights(6, 20).reshape(6, 5, 2, 2)
    scheme = Scheme("int3", "channel")
    hessian = torch.stack([(x := inputs(100, 20, seed)).T @ x / 100 for seed in range(3)])
    lo, hi = extremes(w, scheme)
    q = round_weight("gptq", w, scheme, lo, hi, {"hessian": hessian}).dequantize()
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        expected = by_definition(w[rows].flatten(1), hessian[group], scheme, lo[rows], hi[rows])
        assert torch.equal(q[rows].flatten(1), expected.to(torch.float32))


def test_float32_is_close_to_float64():
    """Wide layers are rounded in float32: the output error is the same to a thousandth."""
    w, x = weights(16, 300), inputs(200, 300)
    hessian = x.T @ x / 200
    scheme = Scheme("int4", "channel", narrow=True)
    lo, hi = extremes(w, scheme)
    exact, fast = (
        loss(w, round_weight("gptq", w, scheme, lo, hi, {"hessian": h}).dequantize(), hessian).sum()
        for h in (hessian, hessian.to(torch.float32))
    )
    assert float(fast) == pytest.approx(float(exact), rel=2e-2)


@given(
    seed=st.integers(0, 10**6),
    places=st.integers(1, 60),
    width=st.integers(1, 40),
    dead=st.integers(0, 40),
    scheme=st.sampled_from([Scheme("int2"), Scheme("int4", "channel"), Scheme("uint3", symmetric=False)]),
)
def test_no_row_is_worse_than_nearest_and_dead_inputs_are_nearest(seed, places, width, dead, scheme):
    w, x = weights(4, width, seed), inputs(places, width, seed)
    x[:, :dead] = 0
    hessian = x.T @ x / places
    lo, hi = extremes(w, scheme)
    nearest = QTensor.quantize(w, scheme, lo, hi)
    q = round_weight("gptq", w, scheme, lo, hi, {"hessian": hessian})
    before = loss(w, nearest.dequantize(), hessian)
    assert bool((loss(w, q.dequantize(), hessian) <= before * (1 + 1e-6) + 1e-12 * before.max()).all())
    assert torch.equal(q.codes[:, :dead], nearest.codes[:, :dead])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_hessians_are_damped_until_they_are_not(dtype):
    """One sample, inputs that differ by ten orders of magnitude, and a matrix that rounding made indefinite."""
    w, scheme = weights(5, 64), Scheme("int4", "channel")
    x = inputs(1, 64) * torch.logspace(-5, 5, 64, dtype=torch.float64)
    indefinite = torch.ones(64, 64) - 0.5 * torch.eye(64)
    for hessian in (x.T @ x, torch.zeros(64, 64), indefinite):
        q = round_weight("gptq", w, scheme, *extremes(w, scheme), {"hessian": hessian.to(dtype)})
        assert bool(torch.isfinite(q.dequantize()).all())


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.full((8, 8), torch.nan), "the second moments of the layer's inputs are not finite"),
        (-1e9 * torch.eye(8), "no Hessian"),
        (torch.eye(7), r"a Hessian of shape \(1, 7, 7\) does not belong to a weight of shape \(3, 8\)"),
    ],
)
def test_what_is_no_hessian_is_refused(hessian, message):
    w, scheme = weights(3, 8), Scheme("int4", "channel")
    with pytest.raises(CalibrationError, match=message):
        round_weight("gptq", w, scheme, *extremes(w, scheme), {"hessian": hessian})


def test_without_a_hessian_the_rounding_says_so():
    w, scheme = weights(3, 8), Scheme("int4", "channel")
    with pytest.raises(CalibrationError, match="rounding 'gptq' needs hessian: give calibration data"):
        round_weight("gptq", w, scheme, *extremes(w, scheme))


def test_the_losses_are_those_of_the_undamped_hessian():
    """Those of any errors, and those that rounding finds on its way."""
    w, x = weights(5, 150).T.to(torch.float64), inputs(30, 150)
    hessian = x.T @ x / 30
    factored = factor(hessian, 0.1)
    ordered = w[factored.order]
    rounded, found = round_inputs(ordered, factored, lambda goal, index: goal.mul(3).round().div(3))
    back = rounded[factored.order.argsort()]
    expected = loss(w.T, back.T, hessian)
    assert torch.allclose(losses(ordered - rounded, factored), expected)
    assert torch.allclose(found, expected)
