"""Operations on two tensors or a tensor and a number, choices and types, in LiteRT's operators."""

from collections.abc import Callable

import torch

from fewbit.targets._litert.expand import Call, Expand, Value
from fewbit.targets._litert.floats_functions import overloads as _of
from fewbit.targets._litert.floats_functions import towards_zero
from fewbit.targets._litert.layout import FixedBatch


def _binary(name: str) -> Expand:
    """Both operands in the result's type, and no factor ``alpha``."""

    def expand(c: Call) -> Value | None:
        first, second, alpha = c["self"], c["other"], c.get("alpha", 1)
        if c.dtype == torch.bool and name in ("add", "mul"):
            return c(f"logical_{'or' if name == 'add' else 'and'}.default", first, second)
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
    return towards_zero(c, quotient) if mode == "trunc" else quotient


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
    return c("sub.Tensor", x, c("mul.Tensor", y, towards_zero(c, c("div.Tensor", x, y))))


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


def _bounded(step: str) -> Expand:
    return lambda c: c(f"{step}.default", c.tensor(c.args[0], c.dtype), c.tensor(c.args[1], c.dtype))


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


ARITHMETIC: dict[str, Expand] = {
    **{k: v for n in ("add", "sub", "mul", "div") for k, v in _of(n, _binary(n), "Tensor", "Scalar").items()},
    **{k: v for n in ("maximum", "minimum", "atan2") for k, v in _of(n, _binary(n), "default").items()},
    **_of("clamp_min", _bounded("maximum"), "Tensor"),
    **_of("clamp_max", _bounded("minimum"), "Tensor"),
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
