"""Every rounding algorithm keeps the contract of roundings."""

import pytest
import torch
from rounding_contract import CONTRACT, SCHEMES, extremes, weight

from fewbit.errors import FormatError, RecipeError
from fewbit.numerics import QTensor, Scheme, blocks
from fewbit.rounding import registry, required_statistics, round_weight, rounding_names


@pytest.mark.parametrize("name", rounding_names())
@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_contract(promise, name):
    promise(registry.module(name))


FIXED = [scheme for scheme in SCHEMES if not scheme.spec.learned]


@pytest.mark.parametrize("scheme", FIXED, ids=str)
def test_nearest_is_nearest(scheme):
    """Within half a step inside the range, and no other code of the block is nearer."""
    w = weight()
    lo, hi = extremes(w, scheme)
    q = round_weight("nearest", w, scheme, lo, hi)
    grid = scheme.spec.decode(scheme.spec.codes())
    grid = grid[(grid >= scheme.qmin) & (grid <= scheme.qmax)]
    for row, values, scale, zero_point in zip(
        blocks(w, scheme), blocks(q.dequantize(), scheme), q.scale, q.zero_point, strict=True
    ):
        best = (row[:, None] - (grid - zero_point) * scale).abs().min(dim=1).values
        assert torch.equal((row - values).abs(), best)
        if not scheme.spec.integer:
            continue
        inside = (row >= (scheme.qmin - zero_point) * scale) & (row <= (scheme.qmax - zero_point) * scale)
        assert bool(((row - values).abs()[inside] <= scale * 0.5001).all())


def test_nearest_is_the_default_of_a_quantized_tensor():
    w, scheme = weight(), Scheme("int4", "channel")
    assert torch.equal(
        round_weight("nearest", w, scheme, *extremes(w, scheme)).codes, QTensor.quantize(w, scheme).codes
    )


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("nearest", "codebook3", "rounding 'nearest' makes no codes of codebook3: use rounding='kmeans', or"),
        ("kmeans", "int4", "rounding 'kmeans' makes no codes of int4: use rounding='nearest', or"),
        ("twn", "int2", "rounding 'twn' makes no codes of int2: "),
    ],
)
def test_formats_that_a_rounding_cannot_do_are_refused(name, format, message):
    w, scheme = weight(), Scheme(format, "channel")
    with pytest.raises(FormatError, match=message):
        round_weight(name, w, scheme, *extremes(w, scheme))


def test_unknown_roundings_are_named():
    with pytest.raises(RecipeError) as error:
        required_statistics("neerest")
    assert str(error.value).startswith("unknown rounding 'neerest': did you mean 'nearest'? available: ")
