"""The contract of every target: what it offers, and that a small network deploys as the reference computes."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit.gate import check_file
from fewbit.model.profiles import PROFILES
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Row
from fewbit.targets import get_target, registry

FUNCTIONS = (
    "runtime", "adapt", "check", "portable_bounds", "prepare", "write", "open", "open_exact", "describe", "probe",
    "coverage",
)  # fmt: skip
RULES = tuple(PROFILES)


def row(kind: str, fmt: str) -> Row:
    return Row("x.output", "x", "conv", kind, (2, 3), Scheme(fmt, symmetric=kind == "weight"), "minmax", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", registry.names())
def test_a_target_offers_what_the_gate_needs(name: str) -> None:
    target = get_target(name)
    assert all(callable(getattr(target, f, None)) for f in FUNCTIONS)
    assert target.REQUANTIZATION in RULES and target.TOLERANCE >= 0


@pytest.mark.parametrize("name", registry.names())
def test_adapting_twice_changes_nothing_more_and_keeps_the_width(name: str) -> None:
    target = get_target(name)
    for given in (row("activation", "int8"), row("weight", "int8")):
        once = target.adapt(given)
        assert target.adapt(once).scheme == once.scheme
        assert once.scheme is not None and once.scheme.spec.bits == 8 and once.site == given.site
        assert target.check(once) is None
    refusal = target.check(target.adapt(row("activation", "int12")))
    assert refusal is not None and "12" in refusal


@pytest.mark.parametrize("name", registry.names())
def test_a_small_network_agrees_with_the_reference(name: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    quantized = fewbit.quantize(net, torch.randn(64, 3, 6, 6), target=name)
    path = tmp_path / f"m{get_target(name).SUFFIX}"
    fewbit.export(quantized, path, target=name, time=False)
    target, x = get_target(name), torch.randn(9, 3, 6, 6)
    described = target.describe(path)
    result = check_file(target, path, described.program, described.codes, (x,))
    assert len(result.layers) >= 3 and result.exact
    answer, expected = target.open(path)(x)[0], quantized(x)
    unit = described.program.codings["_3"].scale
    # A tolerance is for each code of a layer: 288 of them, each with a weight of its own, meet in an output.
    reach = float(net[3].weight.detach().abs().sum(1).max()) * described.program.codings["_0"].scale
    torch.testing.assert_close(answer, expected, atol=1.01 * unit + target.TOLERANCE * reach, rtol=0)
