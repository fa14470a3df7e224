"""Scales for one and three levels against their definitions, and against the best that there is."""

import pytest
import torch

from fewbit.numerics import Scheme, fake_quantize, qparams
from fewbit.observers import make_observer


def rows(kind: str) -> torch.Tensor:
    """Four channels of different size, [4, 5000], one of them zeros."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 5000, generator=generator)
    x = {"normal": x, "heavy": x + 0.3 * x.pow(3), "sparse": x * (x.abs() > 1), "one side": x.abs()}[kind]
    return x * torch.tensor([[1.0], [0.0], [1e-5], [300.0]])


KINDS = ["normal", "heavy", "sparse", "one side"]


def bounds(name: str, scheme: Scheme, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    observer = make_observer(name, scheme)
    for part in x.split(1250, dim=1):
        observer.update(part)
    return observer.bounds()


def error(x: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return (fake_quantize(x, scale, zero, scheme) - x).double().square().mean(dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_xnor_is_the_mean_magnitude(kind):
    x, scheme = rows(kind), Scheme("binary", "channel")
    lo, hi = bounds("xnor", scheme, x)
    scale, _ = qparams(lo, hi, scheme)
    assert torch.allclose(scale, x.double().abs().mean(dim=1).float().clamp(min=2.0**-126), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_finds_the_scale_of_xnor(kind):
    """Which is the best there is for signs: exact zeros have an error too."""
    x, scheme = rows(kind), Scheme("binary", "channel")
    scale, _ = qparams(*bounds("mse", scheme, x), scheme)
    assert torch.allclose(scale, x.abs().mean(dim=1).clamp(min=2.0**-126), rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_twn_is_the_mean_beyond_the_threshold(kind):
    x, scheme = rows(kind), Scheme("ternary", "channel")
    scale, _ = qparams(*bounds("twn", scheme, x), scheme)
    for row, found in zip(x.double(), scale.tolist(), strict=True):
        size = row.abs()
        beyond = size[size > 0.7 * size.mean()]
        assert found == pytest.approx(float(beyond.mean()) if len(beyond) else 1.0, rel=2e-3)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_twn_is_close_to_the_best_scale(kind):
    x, scheme = rows(kind)[[0, 3]], Scheme("ternary", "channel")
    scale, _ = qparams(*bounds("twn", scheme, x), scheme)
    best = torch.stack([error(x, scale * f, scheme) for f in torch.linspace(0.3, 3, 200)]).amin(dim=0)
    assert bool((error(x, scale, scheme) <= 1.1 * best).all())


def test_unsigned_and_integer_schemes_take_these_ranges_too():
    x = rows("normal")
    for name in ("xnor", "twn"):
        lo, hi = bounds(name, Scheme("int8", "channel"), x)
        assert torch.allclose(-lo, hi, rtol=1e-6)
        assert bool((hi[[0, 2, 3]] < x[[0, 2, 3]].amax(dim=1)).all())
