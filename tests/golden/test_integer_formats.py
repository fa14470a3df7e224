"""Codes of integer formats, written out: ties, infinities, extremes, subnormal numbers, for every width."""

import pytest
import torch

from fewbit.numerics import QTensor, Scheme, encode, fake_quantize, get_format, qparams

WIDTHS = range(1, 17)


def codes(x, scale, zero_point, name, **fields):
    scheme = Scheme(name, **fields)
    x = torch.tensor(x, dtype=torch.float32)
    return encode(x, torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32), scheme).tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_limits_and_code_types(bits):
    signed, unsigned = get_format(f"int{bits}"), get_format(f"uint{bits}")
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)
    assert (signed.bits, unsigned.bits) == (bits, bits)
    assert signed.code_dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert unsigned.code_dtype == (torch.uint8 if bits <= 8 else torch.int32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_infinities_and_extremes_saturate(bits):
    big = torch.finfo(torch.float32).max
    x = [-torch.inf, -big, -1e-45, -0.0, 0.0, 1e-45, big, torch.inf]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert codes(x, 1.0, 0, f"int{bits}") == [low, low, 0, 0, 0, 0, high, high]
    if bits > 1:
        assert codes(x, 1.0, 0, f"int{bits}", narrow=True) == [-high, -high, 0, 0, 0, 0, high, high]
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    expected = [0, 0, middle, middle, middle, middle, top, top]
    assert codes(x, 1.0, middle, f"uint{bits}", symmetric=False) == expected


@pytest.mark.parametrize("bits", [b for b in WIDTHS if b >= 4])
def test_ties_go_to_even(bits):
    x = [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]
    assert codes(x, 1.0, 0, f"int{bits}") == [-4, -2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize("bits", [b for b in WIDTHS if b >= 4])
def test_ties_of_normalised_values_go_to_even(bits):
    v = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert get_format(f"int{bits}").encode(v).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]
    assert get_format(f"uint{bits}").encode(v).tolist() == [0, 0, 0, 0, 0, 2, 2, 4]


def test_ties_are_rounded_before_the_zero_point_is_added():
    """With an odd zero point, rounding the sums 2.5, 3.5, 4.5, ... to even would give 2, 4, 4, 6, 6, 8."""
    x = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    assert codes(x, 1.0, 5, "uint8", symmetric=False) == [3, 3, 5, 5, 7, 7]


def test_the_division_is_a_division():
    """x / scale and x * (1 / scale) differ in float32 now and then, and near a tie the code with them."""
    scale = torch.tensor(0.003)
    x = torch.arange(-127, 127) * scale + scale / 2
    by_division = torch.round(x / scale)
    by_product = torch.round(x * (1 / scale))
    assert not torch.equal(by_division, by_product), "the example must tell the two apart"
    assert codes(x.tolist(), 0.003, 0, "int8") == by_division.to(torch.int32).tolist()


def test_all_eight_bit_codes_of_a_ramp():
    x = torch.arange(-300, 300) / 2
    q = QTensor.quantize(x, Scheme("int8"), torch.tensor(-127.0), torch.tensor(127.0))
    expected = [max(-128, min(127, round(float(v)))) for v in x]  # Python rounds half to even, too
    assert q.codes.tolist() == expected
    assert q.dequantize().tolist() == [float(c) for c in expected]


@pytest.mark.parametrize(
    ("name", "fields", "lo", "hi", "scale", "zero_point"),
    [
        ("int8", {}, -1.0, 0.5, 1 / 127, 0),
        ("int8", {"narrow": True}, -1.0, 0.5, 1 / 127, 0),
        ("int4", {}, 0.0, 14.0, 2.0, 0),
        ("uint8", {}, 0.0, 25.5, 0.1, 0),  # nothing below zero: all codes for the positive side
        ("uint8", {}, -12.7, 1.0, 0.1, 128),
        ("uint8", {"symmetric": False}, 0.0, 25.5, 0.1, 0),
        ("uint8", {"symmetric": False}, -10.0, 15.5, 0.1, 100),
        ("int8", {"symmetric": False}, -10.0, 15.5, 0.1, -28),
        ("int8", {"symmetric": False}, 2.0, 25.5, 0.1, -128),  # widened to zero
        ("int8", {"symmetric": False}, -25.5, -2.0, 0.1, 127),
        ("uint4", {"symmetric": False}, -1.0, 2.0, 0.2, 5),
        ("int16", {"symmetric": False}, -1.0, 1.0, 2 / 65535, 0),  # z = -32768 + 32767.5, half to even
        ("int8", {}, 0.0, 0.0, 1.0, 0),  # a range of zero width
        ("uint8", {"symmetric": False}, 0.0, 0.0, 1.0, 0),
        ("int8", {}, 0.0, 1e-44, 2.0**-126, 0),  # scales stay normal numbers
    ],
)
def test_scales_and_zero_points(name, fields, lo, hi, scale, zero_point):
    scheme = Scheme(name, **fields)
    s, z = qparams(torch.tensor([lo], dtype=torch.float64), torch.tensor([hi], dtype=torch.float64), scheme)
    assert s.dtype == torch.float32
    assert z.dtype == torch.int32
    assert s.item() == torch.tensor(scale, dtype=torch.float32).item()
    assert z.item() == zero_point


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_numbers_never_become_infinite(bits, symmetric):
    big = torch.finfo(torch.float32).max
    x = torch.tensor([-big, big / 3, big])
    for name in (f"int{bits}", f"uint{bits}"):
        assert bool(torch.isfinite(QTensor.quantize(x, Scheme(name, symmetric=symmetric)).dequantize()).all())


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("int1", [-2.0, -1.1, 0.5, 2.0], [-2.0, -2.0, 0.0, 0.0]),
        ("uint1", [-2.0, -1.1, 0.5, 1.0], [-2.0, -2.0, 0.0, 0.0]),
        ("uint1", [0.0, 0.9, 1.1, 2.0], [0.0, 0.0, 2.0, 2.0]),
    ],
)
def test_one_bit_is_zero_and_one_number(name, x, expected):
    assert QTensor.quantize(torch.tensor(x), Scheme(name)).dequantize().tolist() == expected


@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_subnormal_tensors_are_coded(bits):
    """With the smallest scale, 2**-126, a subnormal number is 0 or one step."""
    x = torch.tensor([1e-45, 2.0**-127, 2.0**-126 * 0.75])
    q = QTensor.quantize(x, Scheme(f"int{bits}"))
    assert q.scale.item() == 2.0**-126
    assert q.codes.tolist() == [0, 0, 1]


def test_fake_quantize_is_quantize_then_dequantize_bit_for_bit():
    x = torch.randn(64, 33) * 3
    for scheme in (
        Scheme("int8"),
        Scheme("uint8", symmetric=False),
        Scheme("uint5", "channel", axis=1, symmetric=False),
        Scheme("int11", "group", group_size=11),
    ):
        q = QTensor.quantize(x, scheme)
        assert torch.equal(fake_quantize(x, q.scale, q.zero_point, scheme), q.dequantize())
