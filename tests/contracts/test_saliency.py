"""What every criterion for single weights keeps to."""

import pytest
import torch
from torch import Tensor

from fewbit.pruning.saliency import Weight, saliency, saliency_names

NAMES = saliency_names()


def weight(order: Tensor | None = None) -> Weight:
    """A layer of 6 outputs and 8 inputs, its outputs in that order."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    value, before = draw(6, 8), draw(6, 8)
    x = draw(64, 8).double() @ draw(8, 8).double()
    outputs, squares = draw(6).double().square(), draw(6, 8).double().square()
    rows = torch.arange(6) if order is None else order
    hessian = (x.T @ x / 64)[None]
    return Weight(
        value[rows], torch.Generator().manual_seed(1), hessian.diagonal(dim1=1, dim2=2), hessian, outputs[rows],
        squares[rows], before[rows],
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_number_has_a_score_and_the_weight_is_left_alone(name: str) -> None:
    given = weight()
    before = given.value.clone()
    found = saliency(name, given)
    assert found.shape == given.value.shape and found.dtype == torch.float64
    assert bool(found.isfinite().all()) and float(found.std()) > 0
    assert torch.equal(given.value, before)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_scores_do_not_mind_the_order_of_outputs(name: str) -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(saliency(name, weight(order)), saliency(name, weight())[order], rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("random", "movement")])
def test_a_smaller_weight_is_needed_less(name: str) -> None:
    given = weight()
    first = saliency(name, given)[2, 3]
    given.value[2, 3] *= 0.01
    assert float(saliency(name, given)[2, 3]) < float(first)


def test_a_weight_that_moved_away_from_zero_is_needed_more() -> None:
    generator = torch.Generator()
    now, before = torch.tensor([[1.0, 1.0, -2.0]]), torch.tensor([[0.5, 1.5, -1.0]])
    found = saliency("movement", Weight(now, generator, before=before))[0]
    assert found.tolist() == [0.5, -0.5, 2.0]
