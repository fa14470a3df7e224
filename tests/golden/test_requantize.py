"""Requantization rules against their definitions, in Python integers and exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.numerics.requantize import (
    RULES,
    f32_even,
    f64_away,
    q16_constants,
    q16_single,
    q31_constants,
    q31_double,
)

LOW, HIGH = -(2**31), 2**31 - 1
accumulators = st.one_of(st.integers(LOW, HIGH), st.integers(-(2**18), 2**18))
scales = st.floats(2.0**-24, 1023 / 1024, width=32)
limits = (-128, 127)


def clamp(value, low=limits[0], high=limits[1]):
    return max(low, min(high, value))


def nearest_float32(value):
    """A fraction rounded to float32, ties to even, by comparing neighbours: no library rounds for us."""
    guess = np.float32(float(value))
    near = [guess, np.nextafter(guess, np.float32(-np.inf)), np.nextafter(guess, np.float32(np.inf))]
    best = min(abs(Fraction(float(n)) - value) for n in near)
    ties = [n for n in near if abs(Fraction(float(n)) - value) == best]
    return min(ties, key=lambda n: int(n.view(np.uint32)) & 1)


def f32_even_by_definition(acc, scale, zero_point):
    product = nearest_float32(Fraction(float(nearest_float32(Fraction(acc)))) * Fraction(float(scale)))
    return clamp(round(Fraction(float(product))) + zero_point)  # a Fraction rounds half to even


def f64_away_by_definition(acc, scale, zero_point):
    """Python's floats are float64; what they make of the product is then rounded exactly, half away from zero."""
    product = Fraction(float(acc) * float(scale))
    return clamp((1 if product >= 0 else -1) * math.floor(abs(product) + Fraction(1, 2)) + zero_point)


# gemmlowp's fixedpoint.h, operation by operation.
def saturating_rounding_doubling_high_mul(a, b):
    if a == b == LOW:
        return HIGH
    ab = a * b
    nudge = (1 << 30) if ab >= 0 else 1 - (1 << 30)
    quotient = abs(ab + nudge) >> 31  # C's division truncates
    return quotient if ab + nudge >= 0 else -quotient


def rounding_divide_by_pot(x, exponent):
    mask = (1 << exponent) - 1
    remainder = x & mask
    threshold = (mask >> 1) + (1 if x < 0 else 0)
    return (x >> exponent) + (1 if remainder > threshold else 0)


def quantize_multiplier(scale):
    mantissa, shift = math.frexp(scale)
    exact = Fraction(mantissa) * 2**31
    multiplier = math.floor(exact + Fraction(1, 2))
    if multiplier == 2**31:
        multiplier, shift = multiplier // 2, shift + 1
    return (0, 0) if shift < -31 else (multiplier, shift)


def q31_double_by_definition(acc, scale, zero_point):
    multiplier, shift = quantize_multiplier(scale)
    x = clamp(acc * 2 ** max(shift, 0), LOW, HIGH)
    high = saturating_rounding_doubling_high_mul(x, multiplier)
    return clamp(rounding_divide_by_pot(high, max(-shift, 0)) + zero_point)


def q16_single_by_definition(acc, scale, zero_point, shift=None):
    if shift is None:
        mantissa, exponent = math.frexp(scale)
        multiplier, shift = math.floor(Fraction(mantissa) * 2**16 + Fraction(1, 2)), 16 - exponent
    else:
        multiplier = math.floor(Fraction(scale) * 2**shift + Fraction(1, 2))
    return clamp(math.floor(Fraction(acc * multiplier, 2**shift) + Fraction(1, 2)) + zero_point)


def run(rule, acc, scale, zero_point, **options):
    result = rule(
        torch.tensor([acc], dtype=torch.int32), torch.tensor([scale]), zero_point, *limits, **options
    )
    assert result.dtype == torch.int32
    return result.item()


@settings(max_examples=400)
@given(acc=accumulators, scale=scales, zero_point=st.integers(-128, 127))
def test_f32_even(acc, scale, zero_point):
    assert run(f32_even, acc, scale, zero_point) == f32_even_by_definition(acc, scale, zero_point)


@settings(max_examples=400)
@given(acc=accumulators, scale=st.one_of(scales, st.floats(1.0, 1000.0)), zero_point=st.integers(-128, 127))
def test_q31_double(acc, scale, zero_point):
    scale = float(np.float32(scale))
    assert run(q31_double, acc, scale, zero_point) == q31_double_by_definition(acc, scale, zero_point)


@settings(max_examples=400)
@given(acc=accumulators, scale=st.floats(2.0**-40, 1.0), zero_point=st.integers(-128, 127))
def test_f64_away(acc, scale, zero_point):
    result = f64_away(torch.tensor([acc], dtype=torch.int32), scale, zero_point, *limits)
    assert result.dtype == torch.int32
    assert result.item() == f64_away_by_definition(acc, scale, zero_point)


def test_f64_away_just_below_a_half():
    below = 0.49999999999999994  # 0.5 more is 1.0 in float64
    assert f64_away(torch.tensor([1, -1]), below, 0, -128, 127).tolist() == [0, 0]


@settings(max_examples=400)
@given(acc=accumulators, scale=scales, zero_point=st.integers(-128, 127))
def test_q16_single(acc, scale, zero_point):
    assert run(q16_single, acc, scale, zero_point) == q16_single_by_definition(acc, scale, zero_point)


@settings(max_examples=200)
@given(acc=accumulators, scale=st.floats(2.0**-24, 2.0**-9, width=32), zero_point=st.integers(-128, 127))
def test_q16_single_with_one_shift_for_all(acc, scale, zero_point):
    expected = q16_single_by_definition(acc, scale, zero_point, 24)
    assert run(q16_single, acc, scale, zero_point, shift=24) == expected


@pytest.mark.parametrize("rule", list(RULES))
def test_every_output_near_every_tie(rule):
    """Power-of-two scales, where every second accumulator is a tie, over more than the whole output range."""
    definition = {
        "f32_even": f32_even_by_definition,
        "q31_double": q31_double_by_definition,
        "f64_away": f64_away_by_definition,
        "q16_single": q16_single_by_definition,
    }[rule]
    acc = torch.arange(-700, 700, dtype=torch.int32)
    for scale in (0.5, 0.25, 0.125):
        result = RULES[rule](acc, torch.tensor(scale), 3, *limits).tolist()
        assert result == [definition(a, scale, 3) for a in acc.tolist()]


def test_ties_by_hand():
    """-2.5, -1.5, -0.5, 0.5, 1.5, 2.5 under each rule: even; half up, then away from zero; away; half up."""
    acc, half = torch.tensor([-5, -3, -1, 1, 3, 5]), torch.tensor(0.5)
    assert f32_even(acc, half, 0, -128, 127).tolist() == [-2, -2, 0, 0, 2, 2]
    assert q31_double(acc, half, 0, -128, 127).tolist() == [-2, -1, 0, 1, 2, 3]
    assert f64_away(acc, half, 0, -128, 127).tolist() == [-3, -2, -1, 1, 2, 3]
    assert q16_single(acc, half, 0, -128, 127).tolist() == [-2, -1, 0, 1, 2, 3]
    quarter = torch.tensor(0.25)  # now q31_double shifts right, and its second rounding decides
    acc = torch.tensor([-10, -6, -2, 2, 6, 10])
    assert q31_double(acc, quarter, 0, -128, 127).tolist() == [-3, -2, -1, 1, 2, 3]
    assert q16_single(acc, quarter, 0, -128, 127).tolist() == [-2, -1, 0, 1, 2, 3]


def test_scales_by_channel_and_fused_clamps():
    acc = torch.tensor([[100, -100], [100, -100]])
    scale = torch.tensor([[0.5], [0.25]])
    for rule in RULES.values():
        assert rule(acc, scale, 10, 10, 50).tolist() == [[50, 10], [35, 10]]
        assert rule(acc, scale, torch.tensor([[0], [5]]), -128, 127).tolist() == [[50, -50], [30, -20]]


def test_constants_by_hand():
    multiplier, shift = q31_constants(torch.tensor([0.5, 0.75, 1.0, 0.3, 2.0**-33], dtype=torch.float64))
    assert multiplier.tolist() == [2**30, 3 * 2**29, 2**30, 1288490189, 0]
    assert shift.tolist() == [0, 0, 1, -1, 0]
    almost = torch.tensor(1.0 - 2.0**-40, dtype=torch.float64)  # rounds up to 2**31, and is carried
    assert [int(v) for v in q31_constants(almost)] == [2**30, 1]
    multiplier, shift = q16_constants(torch.tensor([0.5, 0.3, 1.0 - 2.0**-40], dtype=torch.float64))
    assert multiplier.tolist() == [2**15, 39322, 2**15]
    assert shift.tolist() == [16, 17, 15]
    assert [int(v) for v in q16_constants(0.003, 24)] == [50332, 24]


def test_impossible_scales_are_refused():
    for rule in (q31_double, q16_single):
        with pytest.raises(FormatError, match="requantization scale 0: expected a positive number"):
            rule(torch.tensor([1]), torch.tensor(0.0), 0, *limits)
        with pytest.raises(FormatError, match="requantization scale nan: expected a positive number"):
            rule(torch.tensor([1]), torch.tensor(torch.nan), 0, *limits)
    with pytest.raises(FormatError, match="no 16-bit multiplier at shift 24"):
        q16_constants(torch.tensor([0.001, 0.5]), 24)


def test_f32_even_multiplies_in_float32():
    """A product just beside a tie may become the tie in float32, and then goes to even."""
    generator = np.random.default_rng(1)
    acc = generator.integers(-30_000, 30_000, (1000, 1), dtype=np.int32)
    scale = generator.uniform(1e-3, 4e-3, (1, 3000)).astype(np.float32)
    exact = np.clip(np.rint(acc.astype(np.float64) * scale), *limits)
    found = f32_even(torch.from_numpy(acc), torch.from_numpy(scale), 0, *limits).numpy()
    rows, columns = np.nonzero(found != exact)
    assert len(rows) >= 5, "the examples must tell the two apart"
    for row, column in zip(rows, columns, strict=True):
        expected = f32_even_by_definition(int(acc[row, 0]), scale[0, column], 0)
        assert found[row, column] == expected
    assert np.array_equal(found, np.clip(np.rint(acc.astype(np.float32) * scale), *limits))


def test_f32_even_rounds_large_accumulators_first():
    """2**24 + 1 and 2**24 + 3 are no float32 numbers: they become 2**24 and 2**24 + 4."""
    acc = torch.tensor([2**24 + 1, 2**24 + 2, 2**24 + 3], dtype=torch.int32)
    assert f32_even(acc, torch.tensor(1.0), -(2**24), -128, 127).tolist() == [0, 2, 4]
