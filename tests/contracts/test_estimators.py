"""Every estimator keeps the contract of estimators: trained values are codes' values, and gradients flow."""

import pytest
import torch

from fewbit.errors import RecipeError
from fewbit.numerics import QTensor, Scheme, blocks
from fewbit.numerics.qtensor import fake_quantize
from fewbit.rounding import round_weight
from fewbit.training.estimators import (
    activation_estimator,
    estimator_names,
    serves_activations,
    serves_weights,
    weight_estimator,
)

WEIGHTS = [
    Scheme("int8", "channel", narrow=True),
    Scheme("int4", "channel", narrow=True),
    Scheme("int2", "channel", symmetric=False),
    Scheme("int3", "tensor"),
    Scheme("int4", "group", group_size=9),
    Scheme("int4", "channel", axis=1),
    Scheme("ternary", "channel"),
    Scheme("binary", "channel"),
    Scheme("apot_4", "channel"),
    Scheme("pow2_4", "channel"),
    Scheme("float8_e4m3", "channel"),
    Scheme("bfloat16"),
    Scheme("codebook2", "channel"),
    Scheme("codebook2_shared", "channel"),
    Scheme("codebook4_shared", "channel"),
]
ACTIVATIONS = [
    Scheme("uint8", symmetric=False),
    Scheme("uint4"),
    Scheme("uint1", symmetric=False),
    Scheme("int4"),
    Scheme("int16"),
    Scheme("float8_e4m3"),
]
PAIRS = [(n, s) for n in estimator_names() for s in WEIGHTS if serves_weights(n, s.spec)]
STEPS = [(n, s) for n in estimator_names() for s in ACTIVATIONS if serves_activations(n, s)]


def label(value):
    return value if isinstance(value, str) else f"{value.format}-{value.granularity}-{value.symmetric}"


def made(name, scheme):
    weight = torch.randn(8, 6, 3, 3) * torch.linspace(0.1, 1.5, 8).reshape(8, 1, 1, 1)
    rows = blocks(weight, scheme)
    q = round_weight(
        scheme.spec.rounding, weight, scheme, rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    )
    return weight.requires_grad_(), q, weight_estimator(name, weight.detach(), q)


@pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=label)
def test_what_is_trained_is_what_its_codes_stand_for(name, scheme):
    weight, _, estimator = made(name, scheme)
    for step in range(3):
        estimator.progress = step / 2
        value = estimator(weight)
        q = estimator.hard(weight.detach())
        assert torch.equal(value.detach(), q.dequantize()) or torch.allclose(
            value.detach(), q.dequantize(), rtol=1e-5, atol=1e-7
        )
        again = QTensor.from_codes(q.codes, q.scale, q.zero_point, q.scheme, q.codebook)
        assert torch.equal(again.dequantize(), q.dequantize())
        with torch.no_grad():  # far from where it began, every part of it
            weight += 0.3 * torch.randn_like(weight)
            for p in estimator.parameters():
                p.mul_(1 + 0.2 * torch.rand_like(p))


@pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=label)
def test_training_begins_near_the_weight(name, scheme):
    weight, _, estimator = made(name, scheme)
    value = estimator(weight).detach()
    assert torch.nn.functional.cosine_similarity(value.flatten(), weight.detach().flatten(), dim=0) > 0.4


@pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=label)
def test_gradients_reach_weights_and_all_that_learns(name, scheme):
    weight, _, estimator = made(name, scheme)
    (estimator(weight) * torch.randn(8, 6, 3, 3)).sum().backward()
    for tensor in (weight, *estimator.parameters()):
        assert tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())
        assert bool(tensor.grad.abs().sum() > 0)


@pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=label)
def test_descent_brings_a_weight_to_its_goal(name, scheme):
    """A weight that must become another one gets near it: gradients point the right way."""
    weight, _, estimator = made(name, scheme)
    goal = (
        estimator(weight).detach().flip(2, 3)
    )  # the same values elsewhere in each block, so that it can be reached
    optimizer = torch.optim.Adam([weight, *estimator.parameters()], 0.02)
    losses = []
    for step in range(200):
        estimator.progress = step / 200
        loss = (estimator(weight) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "scheme"), STEPS, ids=label)
def test_steps_give_what_the_deployed_step_gives(name, scheme):
    estimator = activation_estimator(name, scheme, torch.tensor([0.13]), torch.tensor([0], dtype=torch.int32))
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    found = estimator(x)
    assert torch.allclose(found, fake_quantize(x.detach(), *estimator.exact(), scheme), atol=1e-6)
    (found * torch.randn_like(found)).sum().backward()
    assert bool((x.grad != 0).any()) and all(
        p.grad is not None for p in estimator.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(("name", "scheme"), STEPS, ids=label)
def test_steps_compute_in_16_bits_too(name, scheme):
    estimator = activation_estimator(name, scheme, torch.tensor([0.25]), torch.tensor([0], dtype=torch.int32))
    x = torch.randn(4, 6, 5, 5).bfloat16().requires_grad_()
    found = estimator(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_an_estimator_that_does_not_serve_is_refused_with_those_that_do():
    weight, q, _ = made("lsq", Scheme("int4", "channel"))
    with pytest.raises(RecipeError, match=r"'twn' makes no int4 weights; for int4 use one of: .*lsq"):
        weight_estimator("twn", weight.detach(), q)
    with pytest.raises(RecipeError, match="unknown estimator 'lsk': did you mean 'lsq'"):
        weight_estimator("lsk", weight.detach(), q)
    with pytest.raises(RecipeError, match=r"'twn' serves weights only; for uint4 use one of: .*lsq"):
        activation_estimator("twn", Scheme("uint4"), torch.ones(1), torch.zeros(1))
