"""Half-quadratic quantization against all scales and zero points, and against the range it starts from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.numerics import QTensor, Scheme, blocks
from fewbit.rounding import hqq

AFFINE = Scheme("uint2", "group", group_size=32, symmetric=False)
SYMMETRIC = Scheme("int3", "group", group_size=32, narrow=True)


def rows_and_range(seed, scheme, tail):
    """Blocks of numbers with heavy tails (small tail: heavier), and their extremes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, 32, generator=generator)
    rows /= torch.rand(6, 32, generator=generator).clamp(min=0.01).pow(1 / tail)
    return rows, rows.amin(1), rows.amax(1)


def losses(rows, q):
    return hqq.loss(rows - blocks(q.dequantize(), q.scheme)).sum(dim=1)


@given(seed=st.integers(0, 10**6), tail=st.integers(1, 20), scheme=st.sampled_from([AFFINE, SYMMETRIC]))
def test_no_block_is_worse_than_with_nearest_codes(seed, tail, scheme):
    rows, lo, hi = rows_and_range(seed, scheme, tail)
    before = losses(rows, QTensor.quantize(rows, scheme, lo * 0.6, hi * 0.6))
    after = losses(rows, hqq.round(rows, scheme, lo * 0.6, hi * 0.6, {}))
    assert bool((after <= before * (1 + 1e-5)).all())


def test_the_least_loss_is_kept_when_a_step_makes_it_worse(monkeypatch):
    """Steps that lead anywhere: what is returned is still no worse than the start."""
    rows, lo, hi = rows_and_range(0, AFFINE, 8)
    monkeypatch.setattr(hqq, "_step", lambda rows, scale, zero_point, *rest: (scale * 1.5, zero_point))
    before = losses(rows, QTensor.quantize(rows, AFFINE, lo, hi))
    assert torch.equal(losses(rows, hqq.round(rows, AFFINE, lo, hi, {})), before)


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize("tail", [4, 12])
def test_the_loss_is_close_to_the_least_of_all(scheme, tail):
    """All zero points, 400 scales: the solver, which finds a local minimum, is within a sixth of it on the whole."""
    rows, lo, hi = rows_and_range(1, scheme, tail)
    q = hqq.round(rows, scheme, lo, hi, {})
    zero_points = torch.arange(4.0) if not scheme.symmetric else torch.zeros(1)
    scales = (rows.abs().amax(1) * 1.2)[:, None] * torch.linspace(0.01, 1, 400)
    least = torch.full((len(rows),), torch.inf)
    for zero_point in zero_points:
        x = rows[:, None] / scales[..., None]
        codes = (torch.round(x) + zero_point).clamp(scheme.qmin, scheme.qmax)
        found = hqq.loss((codes - zero_point - x) * scales[..., None]).sum(2).amin(1)
        least = torch.minimum(least, found)
    assert float(losses(rows, q).sum()) <= 1.17 * float(least.sum())
    nearest = losses(rows, QTensor.quantize(rows, scheme, lo, hi))
    assert float(losses(rows, q).sum()) < 0.9 * float(nearest.sum())
