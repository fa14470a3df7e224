"""Functions of one number and of two, in terms of those that LiteRT has an operator for."""

import math
from collections.abc import Callable

import torch

from fewbit.targets._litert.expand import Call, Expand, Value
from fewbit.targets._litert.layout import FixedBatch


def _silu(c: Call) -> Value:
    return c("mul.Tensor", c.x, c("sigmoid.default", c.x))


def _elu(c: Call) -> Value:
    alpha, scale, inner = (float(c[k]) for k in ("alpha", "scale", "input_scale"))
    return _bent(c, alpha * scale, scale, inner)


def _celu(c: Call) -> Value:
    alpha = float(c["alpha"])
    return _bent(c, alpha, 1.0, 1 / alpha)


def _selu(c: Call) -> Value:
    scale = 1.0507009873554805
    return _bent(c, 1.6732632423543772 * scale, scale, 1.0)


def _bent(c: Call, below: float, above: float, inner: float) -> Value:
    """above * x where x > 0, below * (exp(inner * x) - 1) elsewhere. ELU itself has no reference kernel."""
    x = c("clamp_max.default", c.x, 0.0)
    if inner != 1:
        x = c("mul.Tensor", x, inner)
    negative = c("sub.Tensor", c("exp.default", x), 1.0)
    if below != 1:
        negative = c("mul.Tensor", negative, below)
    positive = c("relu.default", c.x)
    if above != 1:
        positive = c("mul.Tensor", positive, above)
    return c("add.Tensor", positive, negative)


def _softplus_of(c: Call, x: Value) -> Value:
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), which no exponent can overflow."""
    small = c("exp.default", c("neg.default", c("abs.default", x)))
    return c("add.Tensor", c("relu.default", x), c("log.default", c("add.Tensor", small, 1.0)))


def _softplus(c: Call) -> Value:
    """Its threshold is where torch starts to leave out what float32 hardly sees, unless it is low."""
    beta, threshold = float(c["beta"]), float(c["threshold"])
    x = c.x if beta == 1 else c("mul.Tensor", c.x, beta)
    soft = _softplus_of(c, x)
    if threshold < 15:
        soft = c("where.self", c("gt.Scalar", x, threshold), x, soft)
    return soft if beta == 1 else c("mul.Tensor", soft, 1 / beta)


def _log_sigmoid(c: Call) -> Value:
    return c("neg.default", _softplus_of(c, c("neg.default", c.x)))


def _mish(c: Call) -> Value:
    return c("mul.Tensor", c.x, c("tanh.default", _softplus_of(c, c.x)))


def _hardsigmoid(c: Call) -> Value:
    return c("mul.Tensor", c("relu6.default", c("add.Tensor", c.x, 3.0)), 1 / 6)


def _clamp(low: str, high: str) -> Expand:
    def expand(c: Call) -> Value | None:
        bounds = (c.get(low) if low else None, c.get(high) if high else None)
        if c.dtype == torch.float32 and bounds in ((-1, 1), (0, 1), (0, 6), (0, None)):
            name, args = {1: ("hardtanh", bounds), 6: ("relu6", ()), None: ("relu", ())}[bounds[1]]
            if c.op.attrs["target"] == "aten.hardtanh.default" and name == "hardtanh":
                return None
            return c(f"{name}.default", c.x, *args)
        value = c.cast(c.x, c.dtype)
        if bounds[0] is not None:
            value = c("clamp_min.default", value, bounds[0])
        return value if bounds[1] is None else c("clamp_max.default", value, bounds[1])

    return expand


def _clamp_tensors(c: Call) -> Value:
    value = c.x
    for name, step in (("min", "maximum.default"), ("max", "minimum.default")):
        if c[name] is not None:
            value = c(step, value, c.cast(c[name], c.dtype))
    return value


def _threshold(c: Call) -> Value:
    fill = c.constant(float(c["value"]))
    return c("where.self", c("gt.Scalar", c.x, float(c["threshold"])), c.x, fill)


def _hardshrink(c: Call) -> Value:
    far = c("gt.Scalar", c("abs.default", c.x), float(c["lambd"]))
    return c("where.self", far, c.x, c.constant(0.0))


def _softshrink(c: Call) -> Value:
    lambd = float(c["lambd"])
    return c("sub.Tensor", c.x, c("clamp_max.default", c("clamp_min.default", c.x, -lambd), lambd))


def _expm1(c: Call) -> Value:
    return c("sub.Tensor", c("exp.default", c.x), 1.0)


def _log1p(c: Call) -> Value:
    return c("log.default", c("add.Tensor", c.x, 1.0))


def _logarithm(base: float) -> Expand:
    return lambda c: c("mul.Tensor", c("log.default", c.cast(c.x, c.dtype)), 1 / math.log(base))


def _reciprocal(c: Call) -> Value:
    return c("div.Tensor", c.constant(1.0), c.cast(c.x, c.dtype))


def _trunc(c: Call) -> Value:
    return _towards_zero(c, c.x)


def _towards_zero(c: Call, x: Value) -> Value:
    return c("mul.Tensor", c("sign.default", x), c("floor.default", c("abs.default", x)))


_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _erf(c: Call) -> Value:
    """Abramowitz and Stegun 7.1.26, wrong by at most 1.5e-7; LiteRT has GELU but not erf."""
    size = c("abs.default", c.x)
    t = c("div.Tensor", c.constant(1.0), c("add.Tensor", c("mul.Tensor", size, 0.3275911), 1.0))
    total = c("mul.Tensor", t, _ERF[4])
    for factor in reversed(_ERF[:4]):
        total = c("mul.Tensor", c("add.Tensor", total, factor), t)
    tail = c("mul.Tensor", total, c("exp.default", c("neg.default", c("square.default", c.x))))
    return c("mul.Tensor", c("sign.default", c.x), c("sub.Tensor", c.constant(1.0), tail))


def _tan(c: Call) -> Value:
    return c("div.Tensor", c("sin.default", c.x), c("cos.default", c.x))


def _ceil(c: Call) -> Value:
    """CEIL and ROUND have no reference kernels."""
    return c("neg.default", c("floor.default", c("neg.default", c.x)))


def _round(c: Call) -> Value:
    """To the nearest, ties to even: floor(x + 1/2), one less where that went too far."""
    up = c("floor.default", c("add.Tensor", c.x, 0.5))
    by = c("sub.Tensor", up, c.x)
    half = c("mul.Tensor", up, 0.5)
    odd = c("ne.Tensor", c("floor.default", half), half)
    tie = c("logical_and.default", c("eq.Scalar", by, 0.5), odd)
    far = c("logical_or.default", c("gt.Scalar", by, 0.5), tie)
    return c("sub.Tensor", up, c("to.dtype", far, torch.float32))


def _atan(c: Call) -> Value:
    """The angle of (x, 1); ATAN2 does not broadcast."""
    ones = c("to.dtype", c("ge.Scalar", c("abs.default", c.x), 0.0), torch.float32)
    return c("atan2.default", c.x, ones)


def _beside(c: Call) -> Value:
    """sqrt(1 - x^2)"""
    return c("sqrt.default", c("sub.Tensor", c.constant(1.0), c("square.default", c.x)))


def _asin(c: Call) -> Value:
    return c("atan2.default", c.x, _beside(c))


def _acos(c: Call) -> Value:
    return c("atan2.default", _beside(c), c.x)


def _asinh(c: Call) -> Value:
    size = c("abs.default", c.x)
    root = c("sqrt.default", c("add.Tensor", c("square.default", c.x), 1.0))
    return c("mul.Tensor", c("sign.default", c.x), c("log.default", c("add.Tensor", size, root)))


def _acosh(c: Call) -> Value:
    root = c("sqrt.default", c("sub.Tensor", c("square.default", c.x), 1.0))
    return c("log.default", c("add.Tensor", c.x, root))


def _atanh(c: Call) -> Value:
    both = c("add.Tensor", c.x, 1.0), c("sub.Tensor", c.constant(1.0), c.x)
    return c("mul.Tensor", c("log.default", c("div.Tensor", *both)), 0.5)


def _nan_to_num(c: Call) -> Value:
    limits = torch.finfo(torch.float32)
    number = c("where.self", c("ne.Tensor", c.x, c.x), c.constant(float(c.get("nan", 0.0))), c.x)
    high = c("clamp_max.default", number, float(c.get("posinf", limits.max)))
    return c("clamp_min.default", high, float(c.get("neginf", limits.min)))


def _sinh(c: Call) -> Value:
    both = c("exp.default", c.x), c("exp.default", c("neg.default", c.x))
    return c("mul.Tensor", c("sub.Tensor", *both), 0.5)


def _cosh(c: Call) -> Value:
    both = c("exp.default", c.x), c("exp.default", c("neg.default", c.x))
    return c("mul.Tensor", c("add.Tensor", *both), 0.5)


def _isnan(c: Call) -> Value:
    return c("ne.Tensor", c.x, c.x)


def _isinf(c: Call) -> Value:
    return c("gt.Scalar", c("abs.default", c.x), float(torch.finfo(torch.float32).max))


# ---- between two ----------------------------------------------------------------------------------------------------


def _binary(name: str) -> Expand:
    """Both operands in the result's type, and no factor ``alpha``."""

    def expand(c: Call) -> Value | None:
        first, second, alpha = c["self"], c["other"], c.get("alpha", 1)
        if name == "atan2" and first.shape != second.shape:
            raise c.error("atan2 of tensors of different shapes")
        plain = all(not isinstance(v, Value) or v.dtype == c.dtype for v in (first, second))
        if plain and alpha == 1 and c.op.attrs["target"] == f"aten.{name}.{_OVERLOAD.get(name, 'Tensor')}":
            return None
        first, second = c.cast(first, c.dtype), c.cast(second, c.dtype)
        if alpha != 1:
            second = second * alpha if not isinstance(second, Value) else c("mul.Tensor", second, alpha)
        return c(f"{name}.{_OVERLOAD.get(name, 'Tensor')}", first, second)

    return expand


_OVERLOAD = {"maximum": "default", "minimum": "default", "atan2": "default"}


def _rsub(c: Call) -> Value:
    x = c.cast(c["self"], c.dtype)
    if c["alpha"] != 1:
        x = c("mul.Tensor", x, c["alpha"])
    return c("sub.Tensor", c.tensor(c["other"], c.dtype), x)


def _div_mode(c: Call) -> Value:
    mode = c.get("rounding_mode", "floor" if "floor" in c.op.attrs["target"] else None)
    x, y = c.tensor(c["self"], c.dtype), c.tensor(c["other"], c.dtype)
    if mode == "floor":
        return _floor_of(c, x, y)
    if not c.dtype.is_floating_point:
        if mode == "trunc":
            return c("div.Tensor_mode", x, y, rounding_mode="trunc")
        x, y = c.cast(x, torch.float32), c.cast(y, torch.float32)
    quotient = c("div.Tensor", x, y)
    return _towards_zero(c, quotient) if mode == "trunc" else quotient


def _floor_divide(c: Call) -> Value | None:
    if all(isinstance(v, Value) and v.dtype == c.dtype for v in (c["self"], c["other"])):
        return None if c.dtype != torch.int64 else _floor_of(c, c["self"], c["other"])
    return _floor_of(c, c.tensor(c["self"], c.dtype), c.tensor(c["other"], c.dtype))


def _floor_of(c: Call, x: Value, y: Value) -> Value:
    """FLOOR_DIV has no kernel for int64."""
    if c.dtype != torch.int64:
        return c("floor_divide.default", x, y)
    narrow = (c("to.dtype", v, torch.int32) for v in (x, y))
    return c("to.dtype", c("floor_divide.default", *narrow), torch.int64)


def _remainder(c: Call) -> Value | None:
    x, y = c.tensor(c["self"], c.dtype), c.tensor(c["other"], c.dtype)
    if (x, y) == (c["self"], c["other"]):
        return None
    return c("remainder.Tensor", x, y)


def _fmod(c: Call) -> Value:
    """x - y trunc(x / y)"""
    x, y = c.tensor(c["self"], c.dtype), c.tensor(c["other"], c.dtype)
    return c("sub.Tensor", x, c("mul.Tensor", y, _towards_zero(c, c("div.Tensor", x, y))))


def _pow(c: Call) -> Value | None:
    base, exponent = c["self"], c["exponent"]
    if not isinstance(exponent, Value):
        x = c.cast(base, c.dtype)
        simple: dict[float, Callable[[], Value]] = {
            1.0: lambda: x,
            2.0: lambda: c("square.default", x),
            3.0: lambda: c("mul.Tensor", c("square.default", x), x),
            0.5: lambda: c("sqrt.default", x),
            -0.5: lambda: c("rsqrt.default", x),
            -1.0: lambda: c("div.Tensor", c.constant(1.0), x),
        }
        if c.dtype.is_floating_point and float(exponent) in simple:
            return simple[float(exponent)]()
    x, y = c.tensor(base, c.dtype), c.tensor(exponent, c.dtype)
    if (x, y) == (base, exponent):
        return None
    return c("pow.Tensor_Tensor", x, y)


def _compare(name: str) -> Expand:
    """Both operands in the wider type; a float number makes integers float."""

    def expand(c: Call) -> Value | None:
        first, second = c["self"], c["other"]
        dtype = torch.result_type(*(v.meta if isinstance(v, Value) else v for v in (first, second)))
        if dtype == torch.float64:
            dtype = torch.float32
        if dtype == torch.bool:
            return c(f"{name}.Tensor", c.tensor(first, torch.int32), c.tensor(second, torch.int32))
        plain = first.dtype == dtype and (not isinstance(second, Value) or second.dtype == dtype)
        if plain:
            return None
        first = c.tensor(first, dtype)
        overload = "Tensor" if isinstance(second, Value) else "Scalar"
        return c(f"{name}.{overload}", first, c.cast(second, dtype))

    return expand


def _logical(name: str) -> Expand:
    def expand(c: Call) -> Value | None:
        first, second = c["self"], c["other"]
        if name == "xor":
            numbers = [c.tensor(c.tensor(v, torch.bool), torch.int32) for v in (first, second)]
            return c("ne.Tensor", *numbers)
        if first.dtype == second.dtype == torch.bool and c.op.attrs["target"].startswith("aten.logical"):
            return None
        return c(f"logical_{name}.default", c.tensor(first, torch.bool), c.tensor(second, torch.bool))

    return expand


def _bitwise(name: str) -> Expand:
    def expand(c: Call) -> Value:
        if c.dtype != torch.bool:
            raise c.error("LiteRT has no bitwise operators here; use logical ones on truth values")
        if name == "not":
            return c("logical_not.default", c.x)
        return c(f"logical_{name}.default", *(c.tensor(c[k], torch.bool) for k in ("self", "other")))

    return expand


def _logical_not(c: Call) -> Value | None:
    return None if c.x.dtype == torch.bool else c("logical_not.default", c.tensor(c.x, torch.bool))


def _where(c: Call) -> Value | None:
    condition, first, second = c["condition"], c["self"], c["other"]
    given = (c.tensor(condition, torch.bool), c.tensor(first, c.dtype), c.tensor(second, c.dtype))
    return None if given == (condition, first, second) else c("where.self", *given)


def _masked_fill(c: Call) -> Value:
    return c("where.self", c["mask"], c.tensor(c["value"], c.dtype), c.tensor(c["self"], c.dtype))


def _cast(c: Call) -> Value | None:
    """To bool is "not zero"; what has the type already is left as it is."""
    if c.x.dtype == c.dtype:
        return c.x
    if c.dtype == torch.bool:
        return c("ne.Scalar", c.x, 0)
    if c.op.attrs["target"] != "aten.to.dtype":
        return c("to.dtype", c.x, c.dtype)
    return None


def _full_like(c: Call) -> Value:
    """A tensor of one number in the shape of another: a condition that never holds, as zeros, plus the number."""
    value = c.get("fill_value", 1 if "ones" in c.op.attrs["target"] else 0)
    if c.dtype == torch.bool:
        raise c.error("a tensor of truth values in the shape of another tensor")
    never = c("lt.Scalar", c("abs.default", c.tensor(c.x, torch.float32)), -1.0)
    return c("add.Tensor", c("to.dtype", never, c.dtype), value)


def _full(c: Call) -> Value:
    """A tensor of one number, of sizes that are known."""
    if c.expansion.sizes.free.get(c.op.output):
        raise FixedBatch
    value = c.get("fill_value", 1 if "ones" in c.op.attrs["target"] else 0)
    return c.constant(torch.full(c.shape, value, dtype=c.dtype))


def _identity(c: Call) -> Value:
    return c.x


def _of(names: str, expand: Expand, *overloads: str) -> dict[str, Expand]:
    return {f"aten.{name}.{overload}": expand for name in names.split() for overload in overloads}


FUNCTIONS: dict[str, Expand] = {
    **_of("silu", _silu, "default"),
    **_of("elu", _elu, "default"),
    **_of("celu", _celu, "default"),
    **_of("selu", _selu, "default"),
    **_of("softplus", _softplus, "default"),
    **_of("log_sigmoid", _log_sigmoid, "default"),
    **_of("mish", _mish, "default"),
    **_of("hardsigmoid", _hardsigmoid, "default"),
    **_of("hardtanh", _clamp("min_val", "max_val"), "default"),
    **_of("clamp", _clamp("min", "max"), "default"),
    **_of("clamp", _clamp_tensors, "Tensor"),
    **_of("threshold", _threshold, "default"),
    **_of("hardshrink", _hardshrink, "default"),
    **_of("softshrink", _softshrink, "default"),
    **_of("expm1", _expm1, "default"),
    **_of("log1p", _log1p, "default"),
    **_of("log2", _logarithm(2.0), "default"),
    **_of("log10", _logarithm(10.0), "default"),
    **_of("reciprocal", _reciprocal, "default"),
    **_of("trunc", _trunc, "default"),
    **_of("erf", _erf, "default"),
    **_of("tan", _tan, "default"),
    **_of("atan", _atan, "default"),
    **_of("sinh", _sinh, "default"),
    **_of("cosh", _cosh, "default"),
    **_of("ceil", _ceil, "default"),
    **_of("round", _round, "default"),
    **_of("asin", _asin, "default"),
    **_of("acos", _acos, "default"),
    **_of("asinh", _asinh, "default"),
    **_of("acosh", _acosh, "default"),
    **_of("atanh", _atanh, "default"),
    **_of("nan_to_num", _nan_to_num, "default"),
    **_of("isnan", _isnan, "default"),
    **_of("isinf", _isinf, "default"),
    **{k: v for n in ("add", "sub", "mul", "div") for k, v in _of(n, _binary(n), "Tensor", "Scalar").items()},
    **{k: v for n in ("maximum", "minimum", "atan2") for k, v in _of(n, _binary(n), "default").items()},
    **_of("rsub", _rsub, "Scalar", "Tensor"),
    **_of("div", _div_mode, "Tensor_mode", "Scalar_mode"),
    **_of("floor_divide", _floor_divide, "default", "Scalar"),
    **_of("remainder", _remainder, "Tensor", "Scalar"),
    **_of("fmod", _fmod, "Tensor", "Scalar"),
    **_of("pow", _pow, "Tensor_Scalar", "Tensor_Tensor", "Scalar"),
    **{
        k: v
        for n in ("eq", "ne", "lt", "le", "gt", "ge")
        for k, v in _of(n, _compare(n), "Tensor", "Scalar").items()
    },
    **{k: v for n in ("and", "or", "xor") for k, v in _of(f"logical_{n}", _logical(n), "default").items()},
    **{k: v for n in ("and", "or", "xor") for k, v in _of(f"bitwise_{n}", _bitwise(n), "Tensor").items()},
    **{k: v for n in ("and", "or", "xor") for k, v in _of(f"__{n}__", _bitwise(n), "Tensor").items()},
    **_of("bitwise_not", _bitwise("not"), "default"),
    **_of("logical_not", _logical_not, "default"),
    **_of("where", _where, "self", "ScalarSelf", "ScalarOther", "Scalar"),
    **_of("masked_fill", _masked_fill, "Scalar", "Tensor"),
    **_of("to", _cast, "dtype"),
    **_of("_to_copy", _cast, "default"),
    **_of("full_like zeros_like ones_like", _full_like, "default"),
    **_of("new_full new_zeros new_ones", _full, "default"),
    **_of("contiguous clone detach alias", _identity, "default"),
}
