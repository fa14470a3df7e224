"""Criteria for weights, patterns and the fit around zeros, against slow twins that follow the papers' words."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.evidence import see
from fewbit.model.readers.torch import read
from fewbit.numerics.clustering import cluster
from fewbit.numerics.codebooks import fit_codebook
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.numerics.soft_rounding import SoftRounding
from fewbit.numerics.tuned_codebook import TunedCodebook
from fewbit.numerics.tuned_weight import TunedWeight
from fewbit.pruning.patterns import Pattern, reached, thresholded
from fewbit.pruning.saliency import Weight, saliency
from fewbit.refit import solve_on


def layer(outputs: int = 3, inputs: int = 6) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of its inputs."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(50, inputs, generator=generator).double()
        @ torch.randn(inputs, inputs, generator=generator).double()
    )
    return torch.randn(outputs, inputs, generator=generator), x.T @ x / 50


def damped(h: Tensor) -> Tensor:
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def best_without(w: Tensor, h: Tensor, free: Tensor) -> tuple[Tensor, float]:
    """The row closest to w, measured by h, whose numbers are zero where not free; and half its squared error."""
    found = torch.zeros_like(w)
    if bool(free.any()):
        found[free] = torch.linalg.solve(h[free][:, free], h[free] @ w)
    return found, float((found - w) @ h @ (found - w)) / 2


def test_optimal_brain_surgeon_is_the_cost_of_leaving_with_the_others_fitted() -> None:
    w, h = layer()
    importance = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    found = saliency("obs", Weight(w, torch.Generator(), hessian=h[None], outputs=importance))
    for o, i in itertools.product(range(3), range(6)):
        free = torch.arange(6) != i
        expected = best_without(w[o].double(), damped(h), free)[1] * (3.5 / 3)
        assert float(found[o, i]) == pytest.approx(expected, rel=1e-8)


def test_optimal_brain_compression_takes_the_cheapest_each_time() -> None:
    w, h = layer()
    found = saliency("obc", Weight(w, torch.Generator(), hessian=h[None]))
    for o in range(3):
        row, free, last = w[o].double(), torch.ones(6, dtype=torch.bool), 0.0
        costs, most = torch.zeros(6, dtype=torch.float64), 0.0
        for _ in range(6):
            total = {}
            for i in free.nonzero().flatten().tolist():
                some = free.clone()
                some[i] = False
                total[i] = best_without(row, damped(h), some)[1]
            chosen = min(total, key=lambda i: total[i])
            most = max(most, total[chosen] - last)
            last, free[chosen], costs[chosen] = total[chosen], False, most
        assert torch.allclose(found[o], costs, rtol=1e-6)


def test_layer_adaptive_magnitude_by_definition() -> None:
    w, _ = layer()
    found = saliency("lamp", Weight(w, torch.Generator()))
    for o, i in itertools.product(range(3), range(6)):
        mine = float(w[o, i]) ** 2
        assert float(found[o, i]) == pytest.approx(
            mine / float(w[w.abs() >= w[o, i].abs()].double().square().sum())
        )


def test_wanda_by_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 5, generator=generator)
    net = nn.Sequential(nn.Linear(5, 4))
    seen = see(read(net, (x[:2],)), ["0.weight"], ["inputs"], [((x,), None)], generator)
    found = saliency("wanda", Weight(net[0].weight.detach(), generator, seen.inputs["0"]))
    expected = net[0].weight.detach().abs() * x.square().mean(0).sqrt()
    assert torch.allclose(found.float(), expected, rtol=1e-5)


def test_gradients_of_each_sample_at_the_outputs() -> None:
    """By one backward pass for each sample, of a convolution's sums, over all places."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()
    x, labels = torch.randn(5, 2, 6, 6), torch.tensor([0, 1, 2, 3, 0])
    data = [((x[:3],), labels[:3]), ((x[3:],), labels[3:])]
    seen = see(read(net, (x,)), ["0.weight", "3.weight"], ["gradients"], data, torch.Generator())
    total = torch.zeros(3, dtype=torch.float64)
    for sample, label in zip(x, labels, strict=True):
        sums = net[0](sample[None]).detach().requires_grad_()
        F.cross_entropy(net[1:](sums), label[None]).backward()
        assert sums.grad is not None
        total += sums.grad.double().square().sum((0, 2, 3))
    assert torch.allclose(seen.outputs["0"], total / 5, rtol=1e-4)
    squares = torch.zeros_like(net[3].weight)
    for part in (slice(0, 3), slice(3, 5)):
        net.zero_grad()
        F.cross_entropy(net(x[part]), labels[part]).backward()
        squares += net[3].weight.grad.square() / 2
    assert torch.allclose(seen.squares["3.weight"].float(), squares, rtol=1e-4)


def test_fit_around_zeros_is_each_columns_own_least_squares() -> None:
    w, h = layer(5, 8)
    generator = torch.Generator().manual_seed(4)
    products = torch.randn(8, 5, generator=generator).double()
    free = torch.rand(8, 5, generator=generator) > 0.4
    free[:, 1] = False
    start = w.T.double() * free
    found = solve_on(free, damped(h), products, start)
    for column in range(5):
        some = free[:, column]
        expected = torch.linalg.solve(damped(h)[some][:, some], products[some, column])
        assert torch.allclose(found[some, column], expected, rtol=1e-4, atol=1e-6)
        assert not bool(found[~some, column].any())


def test_two_of_four_are_those_with_the_highest_scores_of_four_inputs() -> None:
    scores = torch.rand(3, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = Pattern("2:4").strongest(scores)
    for o, k, g in itertools.product(range(3), range(2), range(2)):
        four = scores[o, 4 * g : 4 * g + 4, k]
        assert kept[o, 4 * g : 4 * g + 4, k].tolist() == [bool(s >= four.sort().values[2]) for s in four]


def test_blocks_leave_whole_the_weakest_on_average() -> None:
    scores = torch.rand(6, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pattern = Pattern("block", (2, 3))
    (kept,) = thresholded([pattern.units(scores)], 0.5, together=True)
    mask = pattern.mask(kept, scores.shape)
    means = {
        (o, i, k): float(scores[2 * o : 2 * o + 2, 3 * i : 3 * i + 3, k].mean())
        for o, i, k in itertools.product(range(3), range(2), range(2))
    }
    middle = sorted(means.values())[6]
    for (o, i, k), mean in means.items():
        block = mask[2 * o : 2 * o + 2, 3 * i : 3 * i + 3, k]
        assert bool(block.all()) == bool(block.any()) == (mean >= middle)


def test_together_and_apart() -> None:
    first, second = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 30, 0.5])
    apart = thresholded([first, second], 0.5, together=False)
    assert [each.tolist() for each in apart] == [[False, False, True, True], [False, True, True, False]]
    together = thresholded([first, second], 0.5, together=True)
    assert [each.tolist() for each in together] == [[False, False, False, True], [True, True, True, False]]


@pytest.mark.parametrize("schedule", ["cubic", "linear", "geometric"])
def test_schedules_rise_to_the_goal(schedule: str) -> None:
    shares = [reached(0.1, 0.9, step, 5, schedule) for step in range(6)]
    assert shares == sorted(shares) and shares[0] == pytest.approx(0.1) and shares[-1] == pytest.approx(0.9)
    if schedule == "cubic":
        assert shares[2] == pytest.approx(0.9 - 0.8 * 0.6**3)
    if schedule == "geometric":
        left = [1 - share for share in shares]
        assert left[1] / left[0] == pytest.approx(left[4] / left[3])


@pytest.mark.parametrize("learned", [SoftRounding, TunedWeight, TunedCodebook])
def test_codes_that_learn_leave_zeros(learned: type) -> None:
    """However far the learning pushes them."""
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    w[w.abs() < 0.5] = 0.0
    scheme = Scheme(
        "codebook3" if learned is TunedCodebook else "uint4", "channel", symmetric=learned is TunedCodebook
    )
    q = (
        fit_codebook(w, scheme, cluster)
        if learned is TunedCodebook
        else QTensor.quantize(w, scheme, w.amin(1), w.amax(1))
    )
    soft = learned(w, q)
    with torch.no_grad():
        soft.v += 3.0
    assert not bool(soft.weight()[w == 0].any()) and not bool(soft.hard().dequantize()[w == 0].any())
    assert not torch.equal(soft.hard().dequantize(), q.dequantize())
