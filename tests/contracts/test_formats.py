"""Every format of every family keeps the contract of formats, and every scheme that of schemes."""

import json

import pytest
import torch
from format_contract import CONTRACT, LEARNED
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.numerics import (
    QTensor,
    Scheme,
    blocks,
    dynamic_qparams,
    encode,
    fake_quantize,
    format_names,
    get_format,
    qparams,
    unblocks,
)

INTEGERS = [name for name in format_names() if get_format(name).integer and get_format(name).scaled]


@pytest.mark.parametrize("name", format_names())
def test_contract(name):
    fmt = get_format(name)
    for promise in LEARNED if fmt.learned else CONTRACT:
        promise(fmt)


def test_all_names_are_there():
    assert set(INTEGERS) >= {f"{sign}int{bits}" for bits in range(1, 17) for sign in ("", "u")}
    families = {f"{kind}_{bits}" for kind in ("pow2", "apot", "exp") for bits in range(2, 9)}
    families |= {f"codebook{bits}{shared}" for bits in range(1, 9) for shared in ("", "_shared")}
    assert set(format_names()) >= families


def test_formats_are_equal_by_name():
    assert get_format("int8") == get_format("int8")
    assert get_format("int8") != get_format("uint8")
    assert len({get_format("int8"), get_format("int8"), get_format("int4")}) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in8", "unknown format 'in8': did you mean 'int8'? available: codebook4, "),
        ("int17", "format 'int17' has 17 bits: integer formats have 1 to 16 bits, e.g. 'int8'"),
        ("uint99", "format 'uint99' has 99 bits: integer formats have 1 to 16 bits, e.g. 'int8'"),
        ("int08", "unknown format 'int08': did you mean 'int8'?"),
        ("int" + "9" * 5000, "unknown format 'int999"),
        ("int8\n", "unknown format 'int8\\n'"),
        (8, "unknown format 8: "),
    ],
)
def test_unknown_formats_are_named(name, message):
    with pytest.raises(FormatError) as error:
        get_format(name)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int9x"}, "unknown format 'int9x': did you mean 'int9'?"),
        (
            {"format": "int8", "granularity": "chanel"},
            "unknown granularity 'chanel': did you mean 'channel'? available: tensor, channel, group",
        ),
        (
            {"format": "int8", "granularity": "group"},
            "granularity 'group' with group_size None: give a group size",
        ),
        (
            {"format": "int8", "group_size": 4},
            "granularity 'tensor' with group_size 4: give a group size exactly",
        ),
        (
            {"format": "int8", "granularity": "group", "group_size": 0},
            "group_size is 0: it must be a positive whole number",
        ),
        (
            {"format": "uint8", "narrow": True},
            "narrow=True drops the most negative code, and 'uint8' has none to spare",
        ),
        (
            {"format": "int1", "narrow": True},
            "narrow=True drops the most negative code, and 'int1' has none to spare",
        ),
    ],
)
def test_contradicting_schemes_are_refused(fields, message):
    with pytest.raises(FormatError) as error:
        Scheme(**fields)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"formt": "int8"}, "unknown key 'formt' in a scheme: did you mean 'format'?"),
        ({}, "a scheme has no key 'format'"),
        ({"format": "int8", "axis": "0"}, "scheme key 'axis' is '0': expected int"),
        ({"format": "int8", "symmetric": 1}, "scheme key 'symmetric' is 1: expected bool"),
        ({"format": ["int8"]}, "scheme key 'format' is ['int8']: expected str"),
    ],
)
def test_hostile_descriptions_of_schemes_are_refused(description, message):
    with pytest.raises(FormatError) as error:
        Scheme.from_json(description)
    assert str(error.value).startswith(message)


SCHEMES = [
    Scheme("int8"),
    Scheme("uint8", symmetric=False, dynamic=True),
    Scheme("int4", "channel", axis=1, narrow=True),
    Scheme("int3", "channel", axis=-1, symmetric=False),
    Scheme("uint4", "group", group_size=4, symmetric=False),
    Scheme("int16", "group", axis=2, group_size=6),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_schemes_survive_json(scheme):
    again = Scheme.from_json(json.loads(json.dumps(scheme.to_json())))
    assert again == scheme
    assert hash(again) == hash(scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_blocks_are_what_indexing_says(scheme):
    x = torch.arange(4 * 6 * 8, dtype=torch.float32).reshape(4, 6, 8)
    rows = blocks(x, scheme)
    if scheme.granularity == "tensor":
        expected = [x.flatten()]
    else:
        channels = [x.select(scheme.axis, i).flatten() for i in range(x.shape[scheme.axis])]
        size = scheme.group_size or channels[0].numel()
        expected = [group for channel in channels for group in channel.split(size)]
    assert torch.equal(rows, torch.stack(expected))
    assert torch.equal(unblocks(rows, x.shape, scheme), x)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_block_has_its_own_scale(scheme):
    """A tensor is quantized as each of its blocks would be by itself."""
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 7).reshape(1, 6, 1)
    q = QTensor.quantize(x, scheme)
    alone = Scheme(scheme.format, symmetric=scheme.symmetric, narrow=scheme.narrow)
    for row, codes, scale, zero_point in zip(
        blocks(x, scheme), blocks(q.codes, scheme), q.scale, q.zero_point, strict=True
    ):
        one = QTensor.quantize(row, alone)
        assert torch.equal(one.codes, codes)
        assert one.scale.item() == scale.item()
        assert one.zero_point.item() == zero_point.item()


def test_shapes_that_do_not_fit_are_refused():
    x = torch.zeros(4, 6)
    with pytest.raises(
        FormatError, match=r"group_size 4 does not divide the 6 numbers per channel.*\(4, 6\)"
    ):
        blocks(x, Scheme("int8", "group", group_size=4))
    with pytest.raises(FormatError, match=r"shape \(4, 6\) has no axis 2: choose an axis it has"):
        blocks(x, Scheme("int8", "channel", axis=2))
    with pytest.raises(FormatError, match="no axis 0"):
        blocks(torch.tensor(1.0), Scheme("int8", "channel"))


def test_nan_is_refused_with_its_place():
    x = torch.zeros(2, 3)
    x[1, 2] = torch.nan
    with pytest.raises(FormatError, match=r"NaN at index \(1, 2\)"):
        encode(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), Scheme("int8"))
    with pytest.raises(FormatError, match="range is not finite"):
        QTensor.quantize(x, Scheme("int8"))


def test_codes_that_do_not_fit_are_refused():
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(FormatError, match="codes run from -8 to 8: this int4 scheme has -8 to 7"):
        QTensor.from_codes(torch.tensor([-8, 8]), one, zero, Scheme("int4"))
    with pytest.raises(FormatError, match="codes run from -8 to 0: this int4 scheme has -7 to 7"):
        QTensor.from_codes(torch.tensor([-8, 0]), one, zero, Scheme("int4", narrow=True))
    with pytest.raises(FormatError, match=r"scale has shape \(1,\): this scheme needs \(2,\)"):
        QTensor.from_codes(torch.zeros(2, 3, dtype=torch.int8), one, zero, Scheme("int4", "channel"))


def test_bytes_are_those_of_dense_storage():
    x = torch.randn(3, 5)
    assert QTensor.quantize(x, Scheme("int8")).nbytes == 15 + 4
    assert QTensor.quantize(x, Scheme("int3", "channel")).nbytes == 6 + 3 * 4  # 45 bits
    assert QTensor.quantize(x, Scheme("uint12", "channel", symmetric=False)).nbytes == 23 + 3 * 4 + 3 * 2


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dynamic_ranges_are_those_of_the_tensor_and_export(scheme):
    class Dynamic(torch.nn.Module):
        def forward(self, x):
            return fake_quantize(x, *dynamic_qparams(x, scheme), scheme)

    x = torch.randn(4, 6, 8)
    expected = QTensor.quantize(x, scheme).dequantize()
    assert torch.equal(Dynamic()(x), expected)
    assert torch.equal(torch.export.export(Dynamic(), (torch.zeros(4, 6, 8),)).module()(x), expected)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200)
@given(
    name=st.sampled_from(INTEGERS),
    symmetric=st.booleans(),
    narrow=st.booleans(),
    values=st.lists(finite, min_size=1, max_size=20),
)
def test_any_finite_tensor_is_coded_within_half_a_step(name, symmetric, narrow, values):
    """For a range that holds every number: codes in range, zero exact, finite, within half a step."""
    one_bit = get_format(name).bits == 1  # -1 and 0, or 0 and 1: only a zero point fits them to both signs
    scheme = Scheme(
        name, symmetric=symmetric and not one_bit, narrow=narrow and not one_bit and get_format(name).qmin < 0
    )
    x = torch.tensor(values, dtype=torch.float32)
    q = QTensor.quantize(x, scheme)
    codes = q.codes.to(torch.int64)
    assert bool(((codes >= scheme.qmin) & (codes <= scheme.qmax)).all())
    scale = q.scale.item()
    assert 2.0**-126 <= scale < torch.inf
    assert fake_quantize(torch.zeros(1), q.scale, q.zero_point, scheme).item() == 0.0
    back = q.dequantize()
    assert bool(torch.isfinite(back).all())
    inside = x.abs() <= torch.finfo(torch.float32).max / 2
    error = (back.to(torch.float64) - x.to(torch.float64)).abs()[inside]
    # A rounded zero point shifts an affine range by up to half a step, so that its end is cut by as much.
    steps = 0.5 if symmetric else 1.0
    slack = scale * steps + 3e-7 * x.to(torch.float64).abs()[inside]
    assert bool((error <= slack).all())


@settings(max_examples=200)
@given(lo=finite, hi=finite, name=st.sampled_from(INTEGERS))
def test_affine_ranges_cover_their_bounds(lo, hi, name):
    scheme = Scheme(name, symmetric=False)
    limit = torch.finfo(torch.float32).max / 2
    lo, hi = max(min(lo, hi, 0.0), -limit), min(max(lo, hi, 0.0), limit)
    scale, zero_point = qparams(torch.tensor([lo]), torch.tensor([hi]), scheme)
    s, z = scale.item(), zero_point.item()
    assert scheme.qmin <= z <= scheme.qmax
    assert (scheme.qmin - z) * s <= lo + 0.5001 * s
    assert (scheme.qmax - z) * s >= hi - 0.5001 * s
