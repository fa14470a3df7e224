"""The rules by which runtimes turn an integer accumulator into an output code; each is exact, bit for bit.

Sources: ONNX Runtime's and XNNPACK's float32 requantization; gemmlowp's fixed-point multiplication (Jacob et
al., arXiv 1712.05877, section 2.2), as TFLite's reference kernels, TFLite Micro and CMSIS-NN use it. All
rules share a signature:

    rule(acc, scale, zero_point, qmin, qmax) -> codes

    acc: an integer tensor, any shape; values within int32.
    scale: s_in * s_w / s_out, positive, a float tensor that broadcasts against acc (say [C, 1, 1]), or a
        float.
    zero_point: of the output, an integer tensor that broadcasts against acc, or an int.
    qmin, qmax: the output's clamp, fused activation included, as codes.
    codes: int32, in the broadcast shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.errors import FormatError


def f32_even(acc: Tensor, scale: Tensor | float, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
    """round_half_even(float32(acc) * float32(scale)) + zero_point, clamped: ONNX Runtime and XNNPACK.

    Accumulators of 2**24 and more are rounded to float32 first, as in the runtimes; where that must not
    happen, the caller proves a bound.
    """
    product = acc.to(torch.float32) * torch.as_tensor(scale, dtype=torch.float32, device=acc.device)
    # Clamped before the conversion to integers, which is undefined beyond their range.
    return (torch.round(product) + zero_point).clamp(qmin, qmax).to(torch.int32)


def q31_constants(scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Multiplier and shift of `q31_double`: scale ~ multiplier * 2**(shift - 31), multiplier in [2**30,
    2**31).

    Scales below 2**-32 become 0. Both int64, in scale's shape. Raises FormatError for a scale that is not
    positive and below 2**30.
    """
    mantissa, shift = _split(scale, 30)
    multiplier = torch.floor(mantissa * 2.0**31 + 0.5).to(
        torch.int64
    )  # half away from zero, exact in float64
    carry = multiplier == 2**31
    multiplier, shift = torch.where(carry, 2**30, multiplier), shift + carry
    vanishes = shift < -31
    return torch.where(vanishes, 0, multiplier), torch.where(vanishes, 0, shift)


def q31_double(acc: Tensor, scale: Tensor | float, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
    """int32 multiplier and shift, rounded twice: TFLite's reference kernels, TFLite Micro and CMSIS-NN.

    A rounding doubling high multiplication (half up), then a rounding right shift (half away from zero).
    Where a scale of 1 or more shifts the accumulator out of int32, it saturates; the C code overflows there.
    """
    multiplier, shift = q31_constants(scale)
    return (scale_q31(acc, multiplier, shift) + zero_point).clamp(qmin, qmax).to(torch.int32)


def scale_q31(acc: Tensor, multiplier: Tensor | int, shift: Tensor | int) -> Tensor:
    """acc * multiplier * 2**(shift - 31), rounded twice as ``q31_double`` does: int64, neither offset nor clamped."""
    multiplier, shift = (torch.as_tensor(v, device=acc.device) for v in (multiplier, shift))
    x = (acc.to(torch.int64) << shift.clamp(min=0)).clamp(-(2**31), 2**31 - 1)
    # gemmlowp adds a nudge that depends on the sign and divides towards zero: together that is half up.
    high = (x * multiplier + 2**30) >> 31
    right = (-shift).clamp(min=0)
    mask = (torch.ones_like(right) << right) - 1
    threshold = (mask >> 1) + (high < 0)
    return (high >> right) + ((high & mask) > threshold)


def f64_away(acc: Tensor, scale: Tensor | float, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
    """acc * scale in float64, rounded half away from zero: LiteRT's fully connected reference kernel."""
    product = acc.to(torch.float64) * torch.as_tensor(scale, dtype=torch.float64, device=acc.device)
    magnitude = product.abs()
    whole = torch.trunc(magnitude)  # adding a half before cutting would itself round
    rounded = torch.sign(product) * (whole + (magnitude - whole >= 0.5))
    return (rounded + zero_point).clamp(qmin, qmax).to(torch.int32)


def q16_constants(scale: Tensor | float, shift: int | None = None) -> tuple[Tensor, Tensor]:
    """Multiplier and shift of `q16_single`: scale ~ multiplier * 2**-shift, multiplier below 2**16.

    Args:
        scale: positive.
        shift: one shift for all, say 24, which byte-wise chips do for free; by default each scale gets the
            shift that brings its multiplier into [2**15, 2**16), its most precise.

    Returns:
        both int64, in scale's shape.

    Raises:
        FormatError: a scale that is not positive or too large, or whose multiplier is not within 1 .. 65535.
    """
    if shift is not None:
        value = torch.as_tensor(scale, dtype=torch.float64)
        multiplier = torch.floor(value * 2.0**shift + 0.5)
        if not bool(((multiplier >= 1) & (multiplier < 2**16)).all()):
            raise FormatError(
                f"a requantization scale has no 16-bit multiplier at shift {shift}: "
                f"scales must lie within {2.0**-shift:g} and {65535 * 2.0**-shift:g}; choose another shift"
            )
        return multiplier.to(torch.int64), torch.full(multiplier.shape, shift, dtype=torch.int64)
    mantissa, exponent = _split(scale, 15)
    multiplier = torch.floor(mantissa * 2.0**16 + 0.5).to(torch.int64)
    carry = multiplier == 2**16
    # A shift beyond 62 has no meaning in int64; accumulators are below 2**31, so the product has long become
    # zero.
    return torch.where(carry, 2**15, multiplier), (16 - exponent - carry.to(torch.int64)).clamp(max=62)


def q16_single(
    acc: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    qmin: int,
    qmax: int,
    shift: int | None = None,
) -> Tensor:
    """(acc * multiplier + 2**(shift - 1)) >> shift with a 16-bit multiplier, half up: for chips of 8 bits.

    The one rule that is not a runtime's but fewbit's own; `shift` as in `q16_constants`.
    """
    multiplier, places = q16_constants(scale, shift)
    multiplier, places = multiplier.to(acc.device), places.to(acc.device)
    half = torch.ones_like(places) << (places - 1)
    scaled = (acc.to(torch.int64) * multiplier + half) >> places
    return (scaled + zero_point).clamp(qmin, qmax).to(torch.int32)


def _split(scale: Tensor | float, limit: int) -> tuple[Tensor, Tensor]:
    """scale = mantissa * 2**exponent: float64 in [0.5, 1), int64. Raises FormatError from 2**limit on."""
    value = torch.as_tensor(scale, dtype=torch.float64)
    good = (value > 0) & (value < 2.0**limit)
    if not bool(good.all()):
        found = float(value[~good].reshape(-1)[0])
        raise FormatError(f"requantization scale {found:g}: expected a positive number below 2**{limit}")
    mantissa, exponent = torch.frexp(value)
    return mantissa, exponent.to(torch.int64)


RULES: dict[str, Callable[..., Tensor]] = {
    "f32_even": f32_even,
    "q31_double": q31_double,
    "f64_away": f64_away,
    "q16_single": q16_single,
}
"""The rules by name, as a target declares them."""
