"""Functions of one number and arithmetic between tensors, as ONNX nodes in float32."""

import math
from typing import Any

from fewbit.targets._onnx.floats_call import TYPES, Call, Rule, Value


def _plain(op_type: str, **attrs: Any) -> Rule:
    return lambda c: c.node(op_type, [_input(c)], **attrs)


def _input(c: Call) -> Value:
    """The first argument, in the result's type where integers become floats."""
    x = c["self"] if "self" in c.arguments else c["input"]
    if x.dtype != c.dtype and c.dtype in ("float32", "float64"):
        return Value(c.cast(x, c.dtype), c.dtype, x.shape)
    return x


def _clip(lo: str, hi: str, low: Any = None, high: Any = None) -> Rule:
    def rule(c: Call) -> str:
        bounds = [c.get(lo, low) if lo else low, c.get(hi, high) if hi else high]
        return c.node("Clip", [_input(c), *("" if v is None else c.cast(v, c.dtype) for v in bounds)])

    return rule


def _clamp_tensors(c: Call) -> str:
    name = c.cast(c["self"], c.dtype)
    for bound, op_type in ((c["min"], "Max"), (c["max"], "Min")):
        name = name if bound is None else c.node(op_type, [name, c.cast(bound, c.dtype)])
    return name


def _silu(c: Call) -> str:
    x = _input(c)
    return c.node("Mul", [x, c.node("Sigmoid", [x])])


def _elu(c: Call) -> str:
    x, alpha, scale, inner = _input(c), c["alpha"], c["scale"], c["input_scale"]
    if scale == inner == 1:
        return c.node("Elu", [x], alpha=float(alpha))
    raised = c.node("Sub", [c.node("Exp", [_scaled(c, x, inner)]), c.constant(1.0)])
    positive = c.node("Greater", [x, c.constant(0.0)])
    return c.node("Where", [positive, _scaled(c, x, scale), _scaled(c, raised, alpha * scale)])


def _scaled(c: Call, x: Any, factor: float) -> Any:
    return x if factor == 1 else c.node("Mul", [x, c.constant(float(factor))])


def _softplus(c: Call) -> str:
    x, beta = _input(c), float(c["beta"])
    scaled = _scaled(c, x, beta)
    smooth = _scaled(c, c.node("Softplus", [scaled]), 1 / beta)
    linear = c.node("Greater", [scaled, c.constant(float(c["threshold"]))])
    return c.node("Where", [linear, x, smooth])


def _log_sigmoid(c: Call) -> str:
    return c.node("Neg", [c.node("Softplus", [c.node("Neg", [_input(c)])])])


def _threshold(c: Call) -> str:
    x = _input(c)
    return c.node(
        "Where", [c.node("Greater", [x, c.cast(c["threshold"], c.dtype)]), x, c.cast(c["value"], c.dtype)]
    )


def _hardshrink(c: Call) -> str:
    return c.node("Shrink", [_input(c)], lambd=float(c["lambd"]), bias=0.0)


def _softshrink(c: Call) -> str:
    return c.node("Shrink", [_input(c)], lambd=float(c["lambd"]), bias=float(c["lambd"]))


def _expm1(c: Call) -> str:
    """exp(x) - 1 loses its digits near zero; there 2t / (1 - t) with t = tanh(x / 2) keeps them."""
    x, one = _input(c), c.constant(1.0)
    t = c.node("Tanh", [_scaled(c, x, 0.5)])
    near = c.node("Div", [_scaled(c, t, 2.0), c.node("Sub", [one, t])])
    small = c.node("Less", [c.node("Abs", [x]), one])
    return c.node("Where", [small, near, c.node("Sub", [c.node("Exp", [x]), one])])


def _log1p(c: Call) -> str:
    """Kahan's form: log(u) * x / (u - 1) with u = 1 + x, whose rounding errors cancel."""
    x, one = _input(c), c.constant(1.0)
    u = c.node("Add", [x, one])
    rounded = c.node("Sub", [u, one])
    exact = c.node("Mul", [c.node("Log", [u]), c.node("Div", [x, rounded])])
    plain = c.node("Log", [u])
    ordinary = c.node("Where", [c.node("Less", [c.node("Abs", [x]), one]), exact, plain])
    return c.node("Where", [c.node("Equal", [rounded, c.constant(0.0)]), x, ordinary])


def _logarithm(base: float) -> Rule:
    return lambda c: _scaled(c, c.node("Log", [_input(c)]), 1 / math.log(base))


def _rsqrt(c: Call) -> str:
    return c.node("Reciprocal", [c.node("Sqrt", [_input(c)])])


def _square(c: Call) -> str:
    return c.node("Mul", [_input(c), _input(c)])


def _trunc(c: Call) -> str:
    x = _input(c)
    return c.node("Mul", [c.node("Sign", [x]), c.node("Floor", [c.node("Abs", [x])])])


def _leaky_relu(c: Call) -> str:
    return c.node("LeakyRelu", [_input(c)], alpha=float(c["negative_slope"]))


def _prelu(c: Call) -> str:
    x, weight = c["self"], c["weight"]
    rank = c.rank(x)
    slope = c.reshape(weight, [-1, *[1] * (rank - 2)]) if rank > 2 else weight.name
    return c.node("PRelu", [x, slope])


# ---- between two tensors ----


def _binary(op_type: str) -> Rule:
    def rule(c: Call) -> str:
        alpha = c.get("alpha", 1)
        other = c.cast(c["other"], c.dtype)
        if alpha != 1:
            other = c.node("Mul", [other, c.cast(alpha, c.dtype)])
        return c.node(op_type, [c.cast(c["self"], c.dtype), other])

    return rule


def _rsub(c: Call) -> str:
    x = c.cast(c["self"], c.dtype)
    if c["alpha"] != 1:
        x = c.node("Mul", [x, c.cast(c["alpha"], c.dtype)])
    return c.node("Sub", [c.cast(c["other"], c.dtype), x])


def _div_mode(c: Call) -> str:
    x, y, mode = c.cast(c["self"], c.dtype), c.cast(c["other"], c.dtype), c.get("rounding_mode", "floor")
    if c.dtype.startswith("int"):
        # ONNX divides integers towards zero; taking the remainder away first leaves the floor
        return c.node("Div", [c.node("Sub", [x, c.node("Mod", [x, y])]) if mode == "floor" else x, y])
    quotient = c.node("Div", [x, y])
    if mode == "trunc":
        return c.node("Mul", [c.node("Sign", [quotient]), c.node("Floor", [c.node("Abs", [quotient])])])
    return c.node("Floor", [quotient]) if mode == "floor" else quotient


def _remainder(c: Call) -> str:
    x, y = c.cast(c["self"], c.dtype), c.cast(c["other"], c.dtype)
    if c.dtype.startswith("int"):
        return c.node("Mod", [x, y])
    return c.node("Sub", [x, c.node("Mul", [c.node("Floor", [c.node("Div", [x, y])]), y])])


def _fmod(c: Call) -> str:
    return c.node("Mod", [c.cast(c["self"], c.dtype), c.cast(c["other"], c.dtype)], fmod=1)


def _pow(c: Call) -> str:
    base, exponent = c["self"], c["exponent"]
    if exponent == 2 and isinstance(base, Value):
        name = c.cast(base, c.dtype)
        return c.node("Mul", [name, name])
    return c.node("Pow", [c.cast(base, c.dtype), c.cast(exponent, c.dtype)])


def _compare(op_type: str) -> Rule:
    def rule(c: Call) -> str:
        operands = [c["self"], c["other"]]
        dtype = _common(operands)
        first, second = (c.cast(v, dtype) for v in operands)
        result = c.node("Equal" if op_type == "Differs" else op_type, [first, second])
        return c.node("Not", [result]) if op_type == "Differs" else result

    return rule


def _common(operands: list[Any]) -> str:
    """The type that torch compares in: the widest tensor's; a float number makes integers float."""
    order = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
    tensors = [v for v in operands if isinstance(v, Value)]
    widest = max((v.dtype for v in tensors), key=order.index)
    if any(isinstance(v, float) for v in operands) and order.index(widest) < order.index("float16"):
        return "float32"
    if widest == "bool" and any(isinstance(v, int) and not isinstance(v, bool | Value) for v in operands):
        return "int64"
    return widest


def _logical(op_type: str) -> Rule:
    def rule(c: Call) -> str:
        return c.node(op_type, [c.cast(c[k], "bool") for k in ("self", "other")])

    return rule


def _logical_not(c: Call) -> str:
    return c.node("Not", [c.cast(c["self"], "bool")])


def _where(c: Call) -> str:
    condition = c.cast(c["condition"], "bool")
    return c.node("Where", [condition, c.cast(c["self"], c.dtype), c.cast(c["other"], c.dtype)])


def _masked_fill(c: Call) -> str:
    return c.node("Where", [c["mask"], c.cast(c["value"], c.dtype), c.cast(c["self"], c.dtype)])


def _cast(c: Call) -> str:
    return c.cast(c["self"], c.dtype) if c["self"].dtype != c.dtype else c.node("Identity", [c["self"]])


def _full(c: Call) -> str:
    """A tensor of one number; its shape from the sizes given, or from another tensor."""
    sizes = c.vector(c["size"]) if "size" in c.arguments else c.node("Shape", [c["self"]])
    value = c.get("fill_value", 1 if "ones" in c.target else 0)
    return c.node("Expand", [c.cast(value, c.dtype), sizes])


def _arange(c: Call) -> str:
    scalars = []
    for value in (c.get("start", 0), c["end"], c.get("step", 1)):
        name = c.cast(value, c.dtype)
        scalars.append(c.node("Squeeze", [name]) if isinstance(value, Value) else name)
    return c.node("Range", scalars)


_UNARY = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "selu": "Selu",
    "mish": "Mish",
    "hardswish": "HardSwish",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "abs": "Abs",
    "neg": "Neg",
    "sign": "Sign",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "asin": "Asin",
    "acos": "Acos",
    "atan": "Atan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "asinh": "Asinh",
    "acosh": "Acosh",
    "atanh": "Atanh",
    "erf": "Erf",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "isnan": "IsNaN",
    "isinf": "IsInf",
}
_PAIRS = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min"}
_COMPARISONS = {
    "eq": "Equal",
    "ne": "Differs",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}

RULES: dict[str, Rule] = {
    **{f"aten.{name}.default": _plain(op_type) for name, op_type in _UNARY.items()},
    "aten.hardsigmoid.default": _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    "aten.relu6.default": _clip("", "", 0.0, 6.0),
    "aten.hardtanh.default": _clip("min_val", "max_val"),
    "aten.clamp.default": _clip("min", "max"),
    "aten.clamp_min.default": _clip("min", ""),
    "aten.clamp_max.default": _clip("", "max"),
    "aten.clamp.Tensor": _clamp_tensors,
    "aten.gelu.default": lambda c: c.node("Gelu", [c["self"]], approximate=c["approximate"]),
    "aten.celu.default": lambda c: c.node("Celu", [c["self"]], alpha=float(c["alpha"])),
    "aten.silu.default": _silu,
    "aten.elu.default": _elu,
    "aten.softplus.default": _softplus,
    "aten.log_sigmoid.default": _log_sigmoid,
    "aten.leaky_relu.default": _leaky_relu,
    "aten.prelu.default": _prelu,
    "aten.threshold.default": _threshold,
    "aten.hardshrink.default": _hardshrink,
    "aten.softshrink.default": _softshrink,
    "aten.expm1.default": _expm1,
    "aten.log1p.default": _log1p,
    "aten.log2.default": _logarithm(2.0),
    "aten.log10.default": _logarithm(10.0),
    "aten.rsqrt.default": _rsqrt,
    "aten.square.default": _square,
    "aten.trunc.default": _trunc,
    **{f"aten.{n}.{o}": _binary(t) for n, t in _PAIRS.items() for o in ("Tensor", "Scalar", "default")},
    "aten.rsub.Scalar": _rsub,
    "aten.rsub.Tensor": _rsub,
    "aten.div.Tensor_mode": _div_mode,
    "aten.floor_divide.default": _div_mode,
    "aten.remainder.Tensor": _remainder,
    "aten.remainder.Scalar": _remainder,
    "aten.fmod.Tensor": _fmod,
    "aten.fmod.Scalar": _fmod,
    **{f"aten.pow.{o}": _pow for o in ("Tensor_Scalar", "Tensor_Tensor", "Scalar")},
    **{f"aten.{n}.{o}": _compare(t) for n, t in _COMPARISONS.items() for o in ("Tensor", "Scalar")},
    **{f"aten.logical_{n}.default": _logical(n.title()) for n in ("and", "or", "xor")},
    "aten.logical_not.default": _logical_not,
    **{f"aten.where.{o}": _where for o in ("self", "ScalarSelf", "ScalarOther", "Scalar")},
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.masked_fill.Tensor": _masked_fill,
    "aten.to.dtype": _cast,
    "aten._to_copy.default": _cast,
    **{
        f"aten.{n}.default": _full
        for n in (
            "full",
            "zeros",
            "ones",
            "full_like",
            "zeros_like",
            "ones_like",
            "new_zeros",
            "new_ones",
            "new_full",
        )
    },
    "aten.arange.default": _arange,
    "aten.arange.start": _arange,
    "aten.arange.start_step": _arange,
}
__all__ = ["RULES", "TYPES"]
