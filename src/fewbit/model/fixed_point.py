"""Softmax and hard swish on 8-bit codes in fixed point, as TFLite's reference kernels compute them.

Exponentials come from squares of a short polynomial, the reciprocal from Newton's steps: the arithmetic of gemmlowp's
``fixedpoint.h`` (Jacob et al., arXiv 1712.05877, appendix). TFLite Micro and CMSIS-NN share the softmax. A number with
k integer bits is an int32 that stands for raw / 2**(31 - k).
"""

import numpy as np

Ints = np.ndarray
_LARGEST = 2**31 - 1
_INTEGER_BITS = 5  # of a scaled difference to the largest input
_SUM_BITS = 12  # of the sum of exponentials
# exp(-2**k) for k from -2 to 4, as 31-bit fractions.
_POWERS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)


def softmax_codes(x: Ints, multiplier: int, shift: int) -> Ints:
    """Codes 0 to 255 (256ths, the largest kept below 1) over the last axis of int64 codes.

    ``multiplier`` and ``shift``: of the scale times 2**26, as ``quantized_beta`` gives them.
    """
    difference = x - x.max(-1, keepdims=True)
    radius = int(np.floor(((1 << _INTEGER_BITS) - 1) * 2.0 ** (31 - _INTEGER_BITS) / 2.0**shift))
    seen = difference >= -radius
    scaled = _high(np.where(seen, difference, 0) << shift, multiplier)
    powers = _exp(scaled)
    total = np.where(seen, _divided(powers, _SUM_BITS), 0).sum(-1, keepdims=True)
    reciprocal, over = _reciprocal(total)
    codes = _divided(_high(reciprocal, powers), over + 31 - 8)
    return np.where(seen, codes, 0)


def quantized_beta(scale: float) -> tuple[int, int]:
    """Multiplier and left shift of an input's scale, for differences with 5 integer bits."""
    real = min(float(np.float32(scale)) * 2.0 ** (31 - _INTEGER_BITS), 2.0**31 - 1)
    mantissa, exponent = np.frexp(real)
    fixed = int(np.floor(mantissa * 2.0**31 + 0.5))
    return (fixed // 2, int(exponent) + 1) if fixed == 2**31 else (fixed, int(exponent))


def hard_swish_codes(x: Ints, scale: float, out_scale: float) -> Ints:
    """x * min(max(x + 3, 0), 6) / 6 for int64 codes without their zero point; codes without the output's zero point.

    In 16 bits: x with 7 more bits, and (x + 3) / 6 clamped to [-1, 1] with 15.
    """
    fine = np.float64(np.float32(1 / 128) * np.float32(scale))
    out_multiplier, out_shift = _multiplier16(float(fine / np.float64(np.float32(out_scale))))
    gate_multiplier, gate_shift = _multiplier16(float(fine / np.float64(np.float32(3.0 / 32768))))
    wide = x << 7
    value = _high16(wide, out_multiplier)
    gate = wide if gate_shift <= 0 else np.clip(wide << (gate_shift - 1), -(2**15), 2**15 - 1)
    gate = _high16(gate, gate_multiplier)
    if gate_shift > 0:
        gate = np.clip(gate << 1, -(2**15), 2**15 - 1)
    elif gate_shift < 0:
        gate = _divided(gate, -gate_shift)
    gate = (gate + (1 << 15)) >> 1
    product = gate * value
    result = np.clip(np.sign(product) * (np.abs(product) >> 15), -(2**15), 2**15 - 1)  # cut towards zero
    return result << out_shift if out_shift >= 0 else _divided(result, -out_shift)


def _multiplier16(real: float) -> tuple[int, int]:
    """A 16-bit multiplier and a shift: real ~ multiplier * 2**(shift - 15)."""
    mantissa, exponent = np.frexp(real)
    fixed = int(np.floor(mantissa * 2.0**31 + 0.5))
    if fixed == 2**31:
        fixed, exponent = fixed // 2, exponent + 1
    return min((fixed + (1 << 15)) >> 16, 2**15 - 1), int(exponent)


def _high16(a: Ints, b: int) -> Ints:
    """The upper half of a doubled 16-bit product, rounded."""
    product = a * np.int64(b)
    total = product + np.where(product >= 0, 1 << 14, 1 - (1 << 14))
    return np.clip(np.sign(total) * (np.abs(total) >> 15), -(2**15), 2**15 - 1)


def _high(a: Ints, b: Ints | int) -> Ints:
    """The upper half of a doubled product, rounded half up (away from zero for negative ones below a half)."""
    product = a * np.int64(b) if isinstance(b, int) else a * b
    nudge = np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    total = product + nudge
    return np.clip(np.sign(total) * (np.abs(total) >> 31), -(2**31), _LARGEST)


def _divided(x: Ints, places: Ints | int) -> Ints:
    """x / 2**places, halves away from zero."""
    mask = (np.int64(1) << places) - 1
    remainder = x & mask
    return (x >> places) + (remainder > (mask >> 1) + (x < 0))


def _exp(a: Ints) -> Ints:
    """exp(a) for a <= 0 with 5 integer bits, as a 31-bit fraction."""
    fraction_bits = 31 - _INTEGER_BITS
    quarter = 1 << (fraction_bits - 2)
    low = (a & (quarter - 1)) - quarter
    result = _exp_near_zero(low << _INTEGER_BITS)
    remainder = low - a
    for exponent, power in zip(range(-2, _INTEGER_BITS), _POWERS, strict=True):
        bit = 1 << (fraction_bits + exponent)
        result = np.where(remainder & bit, _high(result, power), result)
    return np.where(a == 0, _LARGEST, result)


def _exp_near_zero(a: Ints) -> Ints:
    """exp(a) for a in [-1/4, 0): the Taylor series around -1/8 up to the fourth power."""
    middle, third = 1895147668, 715827883  # exp(-1/8), 1/3
    x = a + (1 << 28)
    x2 = _high(x, x)
    x3, x4 = _high(x2, x), _high(x2, x2)
    tail = _divided(_high(_divided(x4, 2) + x3, third) + x2, 1)
    return np.minimum(middle + _high(x + tail, middle), _LARGEST)


def _reciprocal(total: Ints) -> tuple[Ints, Ints]:
    """1 / total as a 31-bit fraction in [1/2, 1], and by how many bits the total exceeds 1."""
    leading = 32 - np.floor(np.log2(total.astype(np.float64))).astype(np.int64) - 1
    rest = (total << leading) - (np.int64(1) << 31)
    half = (rest + _LARGEST + 1) // 2  # (1 + x) / 2, rounded
    x = 1515870810 + _high(half, -1010580540)  # 48/17 - 32/17 d, with 2 integer bits
    for _ in range(3):
        step = (1 << 29) - _high(half, x)
        x = x + np.clip(_high(x, step) << 2, -(2**31), _LARGEST)
    return np.clip(x << 1, -(2**31), _LARGEST), _SUM_BITS - leading
