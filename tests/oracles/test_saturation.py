"""Portable weights: no two products of a channel can leave 16 bits, whichever two a CPU without VNNI adds."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit.errors import VerificationError
from fewbit.gate import has_vnni
from fewbit.numerics.scheme import Scheme
from fewbit.rounding import round_weight
from fewbit.targets._saturation import can_saturate, portable_bounds


def pairs_fit(codes: torch.Tensor) -> bool:
    """By definition: every pair of codes of a row, times the largest activation code."""
    rows = codes.flatten(1).tolist()
    pairs = (a + b for row in rows for a, b in itertools.combinations(row, 2))
    return all(-32768 <= 255 * pair <= 32767 for pair in pairs)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("clipped", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("seed", range(6))
def test_no_pair_can_saturate(granularity: str, seed: int, clipped: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4, 8, generator=generator) * torch.exp(torch.randn(6, 1, 1, generator=generator))
    weight[0, 0, :2] = weight[0].abs().max() * 1.5  # the worst: the two largest are equal
    scheme = Scheme("int8", granularity=granularity, group_size=8 if granularity == "group" else None)
    rows = {"tensor": weight.reshape(1, -1), "channel": weight.flatten(1), "group": weight.reshape(-1, 8)}[
        granularity
    ]
    plain = clipped * rows.min(1).values, clipped * rows.max(1).values
    bounds = portable_bounds(weight, *plain, scheme)
    q = round_weight("nearest", weight, scheme, *bounds)
    checked = q.codes.reshape(-1, 8) if granularity == "group" else q.codes
    assert pairs_fit(checked) and not can_saturate(checked)
    assert bool((bounds[1] >= torch.maximum(-plain[0], plain[1])).all())  # nothing is clipped for it
    assert not pairs_fit(round_weight("nearest", weight, scheme, *plain).codes.reshape(checked.shape))


def test_a_channel_with_one_large_weight_keeps_all_its_bits() -> None:
    weight = torch.tensor([[1.0, 0.001, -0.9, 0.002]])
    lo, hi = torch.tensor([-0.9]), torch.tensor([1.0])
    assert portable_bounds(weight, lo, hi, Scheme("int8", granularity="channel"))[1].item() == pytest.approx(
        1.001, 1e-3
    )


def test_fewer_bits_are_left_as_they_are() -> None:
    weight, one = torch.ones(2, 5), torch.ones(2)
    lo, hi = portable_bounds(weight, -one, one, Scheme("int7", granularity="channel"))
    assert torch.equal(lo, -one) and torch.equal(hi, one)


@pytest.mark.parametrize(
    ("codes", "expected"), [([64, 64], False), ([65, 64], True), ([-64, -64], False), ([-65, -64], True)]
)
def test_can_saturate_at_the_exact_limit(codes: list[int], expected: bool) -> None:
    assert can_saturate(torch.tensor([codes])) is expected
    assert pairs_fit(torch.tensor([codes])) is not expected


@pytest.mark.skipif(has_vnni(), reason="this CPU adds pairs of products in 32 bits")
def test_without_vnni_saturating_weights_are_found_and_portable_ones_exact(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 16))
    with torch.no_grad():
        net[0].weight.copy_(torch.ones(16, 64))
        net[0].weight[:, ::4] = -0.5
    x = torch.rand(64, 64)
    fewbit.export(fewbit.quantize(net, x), tmp_path / "portable.onnx", time=False)
    with pytest.raises(VerificationError, match="no VNNI and its kernels saturate"):
        fewbit.export(fewbit.quantize(net, x, portable=False), tmp_path / "fast.onnx", time=False)
    assert not (tmp_path / "fast.onnx").exists()
