"""Functions of one number and of two, in terms of those that LiteRT has an operator for."""

import math

import torch

from fewbit.targets._litert.expand import Call, Expand, Value


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
    return towards_zero(c, c.x)


def towards_zero(c: Call, x: Value) -> Value:
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


def _erfc(c: Call) -> Value:
    return c("sub.Tensor", c.constant(1.0), _erf(c))


def _exp2(c: Call) -> Value:
    return c("exp.default", c("mul.Tensor", c.x, math.log(2.0)))


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


def overloads(names: str, expand: Expand, *overloads: str) -> dict[str, Expand]:
    """One expansion for several operators, each in several forms."""
    return {f"aten.{name}.{overload}": expand for name in names.split() for overload in overloads}


FUNCTIONS: dict[str, Expand] = {
    **overloads("silu", _silu, "default"),
    **overloads("elu", _elu, "default"),
    **overloads("celu", _celu, "default"),
    **overloads("selu", _selu, "default"),
    **overloads("softplus", _softplus, "default"),
    **overloads("log_sigmoid", _log_sigmoid, "default"),
    **overloads("mish", _mish, "default"),
    **overloads("hardsigmoid", _hardsigmoid, "default"),
    **overloads("hardtanh", _clamp("min_val", "max_val"), "default"),
    **overloads("clamp", _clamp("min", "max"), "default"),
    **overloads("clamp", _clamp_tensors, "Tensor"),
    **overloads("threshold", _threshold, "default"),
    **overloads("hardshrink", _hardshrink, "default"),
    **overloads("softshrink", _softshrink, "default"),
    **overloads("expm1", _expm1, "default"),
    **overloads("log1p", _log1p, "default"),
    **overloads("log2", _logarithm(2.0), "default"),
    **overloads("log10", _logarithm(10.0), "default"),
    **overloads("reciprocal", _reciprocal, "default"),
    **overloads("trunc", _trunc, "default"),
    **overloads("erf", _erf, "default"),
    **overloads("erfc", _erfc, "default"),
    **overloads("exp2", _exp2, "default"),
    **overloads("tan", _tan, "default"),
    **overloads("atan", _atan, "default"),
    **overloads("sinh", _sinh, "default"),
    **overloads("cosh", _cosh, "default"),
    **overloads("ceil", _ceil, "default"),
    **overloads("round", _round, "default"),
    **overloads("asin", _asin, "default"),
    **overloads("acos", _acos, "default"),
    **overloads("asinh", _asinh, "default"),
    **overloads("acosh", _acosh, "default"),
    **overloads("atanh", _atanh, "default"),
    **overloads("nan_to_num", _nan_to_num, "default"),
    **overloads("isnan", _isnan, "default"),
    **overloads("isinf", _isinf, "default"),
}
