"""What learns in codes, against definitions: gradients, roundings in between, and the best of all roundings."""

import itertools

import pytest
import torch
from torch import Tensor

from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, blocks, unblocks
from fewbit.numerics.soft_rounding import SoftRounding
from fewbit.numerics.straight_through import coin_flips, learned_step
from fewbit.numerics.tuned_codebook import TunedCodebook
from fewbit.numerics.tuned_weight import TunedWeight
from fewbit.rounding import adaround, kmeans


def by_definition(x: Tensor, scale: Tensor, lo: float, hi: float, dropped: Tensor | None) -> Tensor:
    """With torch's own gradients, rounding passed straight through."""
    v = x / scale
    codes = torch.clamp(v + (torch.round(v) - v).detach(), lo, hi)
    y = codes * scale
    return y if dropped is None else torch.where(dropped, x, y)


@pytest.mark.parametrize("drops", [False, True])
def test_the_gradients_of_a_learned_step(drops: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, 6, generator=generator) * 2
    dropped = coin_flips(values.shape, generator) if drops else None
    outward = torch.randn(4, 5, 6, generator=generator)
    found = []
    for function in (learned_step, by_definition):
        x, scale = values.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        y = function(x, scale, -3.0, 4.0, dropped)
        y.backward(outward)
        found.append((y.detach(), x.grad, scale.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float(found[0][1].abs().sum()) > 0 and bool((found[0][1] == 0).any())  # some saturate


def test_coin_flips_are_fair_and_repeatable() -> None:
    flips = coin_flips((300, 1001), torch.Generator().manual_seed(1))
    assert flips.dtype == torch.bool and flips.shape == (300, 1001)
    assert abs(float(flips.float().mean()) - 0.5) < 0.005
    each_bit = flips.reshape(-1)[: 56 * 5000].reshape(-1, 56).float().mean(0)
    assert float((each_bit - 0.5).abs().max()) < 0.04
    assert torch.equal(flips, coin_flips((300, 1001), torch.Generator().manual_seed(1)))


SCHEMES = [
    Scheme("int4", "channel", narrow=True),
    Scheme("int3", "channel", symmetric=False),
    Scheme("uint2", "group", group_size=3, symmetric=False),
    Scheme("int5"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_learning_begins_at_the_nearest_codes(scheme: Scheme) -> None:
    w = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    q = QTensor.quantize(w, scheme)
    soft, tuned = SoftRounding(w, q), TunedWeight(w, q)
    assert torch.equal(soft.hard().codes, q.codes) and torch.equal(tuned.hard().codes, q.codes)
    torch.testing.assert_close(tuned.weight().detach(), q.dequantize())
    inside = (soft.weight().detach() - w).abs() <= 0.011 * q.scale.max()  # softly, it is the weight itself
    rows = blocks(w, scheme) / q.scale.reshape(-1, 1) + q.zero_point.reshape(-1, 1)
    beyond = unblocks((rows < scheme.qmin) | (rows > scheme.qmax), w.shape, scheme)
    assert bool((inside | beyond).all()) and float(inside.float().mean()) > 0.7


def test_a_soft_weight_goes_up_or_down_and_no_further() -> None:
    w = torch.tensor([[0.3, -0.3, 1.49, 3.0]])
    q = QTensor.quantize(w, Scheme("int3"), torch.tensor([-3.0]), torch.tensor([3.0]))
    soft = SoftRounding(w, q)
    with torch.no_grad():
        soft.v.fill_(9.0)
        assert soft.hard().dequantize().tolist() == [[1.0, 0.0, 2.0, 3.0]] == soft.weight().tolist()
        soft.v.fill_(-9.0)
        assert soft.hard().dequantize().tolist() == [[0.0, -1.0, 1.0, 3.0]] == soft.weight().tolist()
        assert float(soft.undecided(2.0)) == 0.0


def test_a_tuned_weight_takes_a_learned_scale_along() -> None:
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    q = QTensor.quantize(w, Scheme("int4", "channel"))
    tuned = TunedWeight(w, q)
    with torch.no_grad():
        tuned.v += 1.0
        tuned.change += 0.1
    hard = tuned.hard()
    assert torch.equal(hard.codes.int(), (q.codes.int() + 1).clamp(max=7))
    torch.testing.assert_close(hard.scale, q.scale * 1.1051709)
    torch.testing.assert_close(hard.dequantize(), tuned.weight().detach())


@pytest.mark.parametrize("name", ["codebook2", "codebook2_shared", "codebook3"])
def test_a_tuned_codebook_begins_at_its_codes_and_moves_values_and_codes(name: str) -> None:
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    q = kmeans.round(w, Scheme(name, "channel"), w.amin(1), w.amax(1), {})
    tuned = TunedCodebook(w, q)
    assert torch.equal(tuned.hard().codes, q.codes) and torch.equal(tuned.hard().codebook, q.codebook)
    torch.testing.assert_close(tuned.weight().detach(), q.dequantize())
    with torch.no_grad():
        tuned.change += 0.1 * torch.arange(1, 2**q.scheme.spec.bits + 1)
        tuned.v[2] += 0.3
        tuned.change[:, 0] += 2.0  # past its neighbours, which changes their order
    hard = tuned.hard()
    assert bool((hard.codebook.diff(dim=1) >= 0).all())
    assert bool((hard.codes != q.codes).any())
    assert bool((hard.codebook != q.codebook).any(dim=1).all())
    assert torch.equal((hard.codebook == 0).sum(1), (q.codebook == 0).sum(1))  # zero stays in the table
    torch.testing.assert_close(hard.dequantize(), tuned.weight().detach(), rtol=1e-3, atol=1e-3)


def test_the_gradients_of_a_tuned_codebook() -> None:
    w = torch.randn(2, 30, generator=torch.Generator().manual_seed(5))
    q = kmeans.round(w, Scheme("codebook2", "channel"), w.amin(1), w.amax(1), {})
    outward = torch.randn(2, 30, generator=torch.Generator().manual_seed(6))
    tuned = TunedCodebook(w, q)
    tuned.weight().backward(outward)
    moved = outward * q.scale[:, None] / 2  # in steps of half a unit
    torch.testing.assert_close(tuned.v.grad, moved)
    each = torch.zeros(2, 4).scatter_add(1, q.codes.long(), moved)
    torch.testing.assert_close(tuned.change.grad, torch.where(q.codebook == 0, 0.0, each))


def test_adaround_comes_close_to_the_best_of_all_roundings() -> None:
    gaps = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
        nearest, best, found = losses(x.T @ x / 64, torch.randn(3, 8, generator=generator))
        assert best <= found * 1.0001 and found <= nearest * 1.0001
        gaps.append((found - best) / (nearest - best))
    assert sum(gaps) / len(gaps) < 0.4  # of what all roundings together could win over the nearest


def losses(hessian: Tensor, w: Tensor) -> tuple[float, float, float]:
    """Of the nearest codes, of the best of all 256 ways to round each row, and of AdaRound."""
    scheme = Scheme("int3", "channel")
    lo, hi = w.amin(1), w.amax(1)

    def loss(values: Tensor) -> Tensor:
        return ((values - w) @ hessian * (values - w)).sum(1)

    q = QTensor.quantize(w, scheme, lo, hi)
    below = torch.floor(w / q.scale[:, None])
    ways = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)))
    every = (below[None] + ways[:, None]).clamp(scheme.qmin, scheme.qmax) * q.scale[:, None]
    best = torch.stack([loss(values) for values in every]).amin(0).sum()
    found = adaround.round(w, scheme, lo, hi, {"hessian": hessian}).dequantize()
    return float(loss(q.dequantize()).sum()), float(best), float(loss(found).sum())
