"""ONNX operators without weights that calculate: elementwise functions, comparisons, softmax."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.model import onnx_sizes
from fewbit.model.onnx_build import Constant, Operand, Sizes, Value
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_patterns import gated, layer_norm

Rule = Callable[[Call], Any]


def number(operand: Operand, rank: int | None = None) -> Any:
    """A constant of one element as a number, if it does not change the shape of a tensor of this rank."""
    if not isinstance(operand, Constant) or operand.array.size != 1:
        return operand
    fits = rank is None or operand.array.ndim <= rank
    return operand.array.item() if fits and operand.array.dtype.kind in "fiu" else operand


def _unary(
    function: Callable[..., Any], of_size: Callable[[Any], Any] | None = None, **settings: Any
) -> Rule:
    def rule(c: Call) -> Any:
        if of_size is not None and c.is_size(0):
            return c.apply(functools.partial(onnx_sizes.each, of_size), c.raw(0))
        return c.apply(function, c[0], **settings)

    return rule


def size_operand(c: Call, index: int) -> Any:
    """An operand of arithmetic of sizes, in its own shape."""
    operand = c.raw(index)
    if not isinstance(operand, Constant):
        return operand
    made = np.empty(operand.array.shape, object)
    made[...] = operand.array.tolist() if operand.array.ndim else operand.array.item()
    return Sizes(made)


def _binary(function: Callable[..., Any], of_sizes: Callable[[Any, Any], Any]) -> Rule:
    def rule(c: Call) -> Any:
        if c.is_size(0, 1):
            operands = [size_operand(c, i) for i in (0, 1)]
            return c.apply(functools.partial(onnx_sizes.each, of_sizes), *operands)
        return _calculated(c, function)

    return rule


def _or_else(pattern: Rule, rule: Rule) -> Rule:
    """The pattern where it is found, else the operator alone."""

    def either(c: Call) -> Any:
        found = pattern(c)
        return rule(c) if found is None else found

    return either


def _calculated(c: Call, function: Callable[..., Any]) -> Any:
    """The function of both operands; a calculated size among them is a number."""
    sizes = [isinstance(o, Value) and o.is_size and o.example.size == 1 for o in (c.raw(0), c.raw(1))]
    if any(sizes) and not all(sizes):
        return c.apply(
            functools.partial(_with_size, function), *(c.raw(i) if sizes[i] else c[i] for i in (0, 1))
        )
    return c.apply(function, *_operands(c))


def _with_size(function: Callable[..., Any], *operands: Any) -> Any:
    return function(*(o if isinstance(o, Tensor) else onnx_sizes.listed(o)[0] for o in operands))


def _operands(c: Call) -> list[Any]:
    """Both operands; a constant of one element is a number, so that the graph says `x * 0.5`."""
    first, second = c[0], c[1]
    if isinstance(first, Value):
        return [first, number(second, c.rank(0))]
    if isinstance(second, Value):
        return [number(first, c.rank(1)), second]
    return [first, second]


def _add(x: Any, y: Any) -> Any:
    return y + x if not isinstance(x, Tensor) else x + y


def _mul(x: Any, y: Any) -> Any:
    return y * x if not isinstance(x, Tensor) else x * y


def _div(x: Any, y: Any) -> Any:
    floating = any(t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, float) for t in (x, y))
    return x / y if floating else torch.div(x, y, rounding_mode="trunc")


def _pow(c: Call) -> Any:
    return c.apply(_power, c[0], number(c[1], c.rank(0)))


def _power(x: Any, y: Any) -> Tensor:
    made: Tensor = torch.pow(x, y)
    return made if made.dtype == x.dtype else made.to(x.dtype)


def _mod(c: Call) -> Any:
    if c.is_size(0, 1):
        operands = [size_operand(c, i) for i in (0, 1)]
        return c.apply(functools.partial(onnx_sizes.each, operator.mod), *operands)
    return c.apply(torch.fmod if c.attr("fmod", 0) else torch.remainder, *_operands(c))


def _reversed_if_number(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A comparison whose first operand may be a number."""

    def compare(x: Any, y: Any) -> Any:
        return function(x if isinstance(x, Tensor) else torch.tensor(x, dtype=y.dtype), y)

    return compare


def _many(function: Callable[[Any, Any], Any], of_sizes: Callable[[Any, Any], Any] | None = None) -> Rule:
    def rule(c: Call) -> Any:
        indices = range(len(c.operands))
        if of_sizes is not None and c.is_size(*indices):
            each = functools.partial(onnx_sizes.each, of_sizes)
            return functools.reduce(
                lambda x, y: c.apply(each, x, y),
                [size_operand(c, i) for i in indices][1:],
                size_operand(c, 0),
            )
        operands = [c[i] for i in indices]
        return functools.reduce(lambda x, y: c.apply(function, x, y), operands[1:], operands[0])

    return rule


def _mean(c: Call) -> Any:
    operands = [c[i] for i in range(len(c.operands))]
    total = functools.reduce(lambda x, y: c.apply(_add, x, y), operands[1:], operands[0])
    return c.apply(_mul, total, 1 / len(operands)) if len(operands) > 1 else total


def _clip(c: Call) -> Any:
    if c.version < 11:
        lo, hi = c.attr("min"), c.attr("max")
        bounds: list[Any] = [None if b is None or abs(b) > 3.4e38 else b for b in (lo, hi)]
    else:
        bounds = [number(c[i]) if c.has(i) else None for i in (1, 2)]
        bounds = [None if isinstance(b, float) and abs(b) > 3.4e38 else b for b in bounds]
    if bounds == [None, None]:
        return c[0]
    if any(isinstance(b, Operand) for b in bounds):
        bounds = [c[i] if c.has(i) else None for i in (1, 2)]
    return c.apply(torch.clamp, c[0], *bounds)


def _elu(c: Call) -> Any:
    return c.apply(F.elu, c[0], alpha=float(c.attr("alpha", 1.0)))


def _selu(c: Call) -> Any:
    alpha, gamma = float(c.attr("alpha", 1.6732632)), float(c.attr("gamma", 1.0507010))
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.050701) < 1e-6:
        return c.apply(F.selu, c[0])
    return c.apply(lambda x, alpha, gamma: F.elu(x, alpha) * gamma, c[0], alpha=alpha, gamma=gamma)


def _hard_sigmoid(c: Call) -> Any:
    alpha, beta = float(c.attr("alpha", 0.2)), float(c.attr("beta", 0.5))
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return c.apply(F.hardsigmoid, c[0])
    return c.apply(_ramp, c[0], alpha=alpha, beta=beta)


def _ramp(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def _gelu(c: Call) -> Any:
    return c.apply(F.gelu, c[0], approximate=str(c.attr("approximate", "none")))


def _swish(c: Call) -> Any:
    alpha = float(c.attr("alpha", 1.0))
    return (
        c.apply(F.silu, c[0]) if alpha == 1 else c.apply(lambda x, a: x * torch.sigmoid(x * a), c[0], a=alpha)
    )


def _thresholded(c: Call) -> Any:
    return c.apply(lambda x, alpha: F.threshold(x, alpha, 0.0), c[0], alpha=float(c.attr("alpha", 1.0)))


def _shrink(c: Call) -> Any:
    return c.apply(_shrunk, c[0], bias=float(c.attr("bias", 0.0)), lambd=float(c.attr("lambd", 0.5)))


def _shrunk(x: Tensor, *, bias: float, lambd: float) -> Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x > lambd, x - bias, torch.where(x < -lambd, x + bias, zero))


def _round(c: Call) -> Any:
    return c.apply(torch.round, c[0])


def _softmax(function: Callable[..., Any]) -> Rule:
    def rule(c: Call) -> Any:
        rank, shape = c.rank(0), c.shape(0)
        axis = c.axis(int(c.attr("axis", -1 if c.version >= 13 else 1)), rank)
        if c.version >= 13 or math.prod(shape[axis + 1 :]) == 1:
            return c.apply(function, c[0], dim=axis)
        return c.apply(functools.partial(_flattened, function), c[0], axis=axis)

    return rule


def _flattened(function: Callable[..., Tensor], x: Tensor, *, axis: int) -> Tensor:
    """Softmax as it was before opset 13: over all dimensions from `axis` on, taken as one."""
    return function(x.flatten(axis), dim=-1).reshape(x.shape)


def _where(c: Call) -> Any:
    if c.is_size(0, 1, 2):
        chosen = functools.partial(onnx_sizes.each, lambda condition, x, y: x if condition else y)
        return c.apply(chosen, *(size_operand(c, i) for i in range(3)))
    return c.apply(torch.where, c[0], c[1], c[2])


def _is_inf(c: Call) -> Any:
    if not c.attr("detect_negative", 1) or not c.attr("detect_positive", 1):
        raise c.error("it looks for one sign only: expected both")
    return c.apply(torch.isinf, c[0])


RULES: dict[str, Rule] = {
    "Add": _binary(_add, operator.add),
    "Sub": _binary(operator.sub, operator.sub),
    "Mul": _or_else(gated, _binary(_mul, operator.mul)),
    "Div": _or_else(layer_norm, _binary(_div, onnx_sizes.divide)),
    "Pow": _pow,
    "Mod": _mod,
    "Sum": _many(_add),
    "Mean": _mean,
    "Min": _many(torch.minimum, min),
    "Max": _many(torch.maximum, max),
    "Equal": _binary(_reversed_if_number(torch.eq), operator.eq),
    "Greater": _binary(_reversed_if_number(torch.gt), operator.gt),
    "GreaterOrEqual": _binary(_reversed_if_number(torch.ge), operator.ge),
    "Less": _binary(_reversed_if_number(torch.lt), operator.lt),
    "LessOrEqual": _binary(_reversed_if_number(torch.le), operator.le),
    "And": _binary(torch.logical_and, lambda x, y: x and y),
    "Or": _binary(torch.logical_or, lambda x, y: x or y),
    "Xor": _binary(torch.logical_xor, operator.xor),
    "Not": _unary(torch.logical_not, operator.not_),
    "Where": _where,
    "Neg": _unary(torch.neg, operator.neg),
    "Abs": _unary(torch.abs, abs),
    "Sqrt": _unary(torch.sqrt, lambda x: x**0.5),
    "Reciprocal": _unary(torch.reciprocal, lambda x: 1 / x),
    "Floor": _unary(torch.floor, onnx_sizes.floor),
    "Ceil": _unary(torch.ceil, onnx_sizes.ceil),
    "Round": _round,
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Erf": _unary(torch.erf),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Tan": _unary(torch.tan),
    "Asin": _unary(torch.asin),
    "Acos": _unary(torch.acos),
    "Atan": _unary(torch.atan),
    "Sinh": _unary(torch.sinh),
    "Cosh": _unary(torch.cosh),
    "Asinh": _unary(torch.asinh),
    "Acosh": _unary(torch.acosh),
    "Atanh": _unary(torch.atanh),
    "Sign": _unary(torch.sign),
    "IsNaN": _unary(torch.isnan),
    "IsInf": _is_inf,
    "Relu": _unary(F.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "LeakyRelu": lambda c: c.apply(F.leaky_relu, c[0], negative_slope=float(c.attr("alpha", 0.01))),
    "Celu": lambda c: c.apply(F.celu, c[0], alpha=float(c.attr("alpha", 1.0))),
    "Elu": _elu,
    "Selu": _selu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Mish": _unary(F.mish),
    "Gelu": _gelu,
    "Swish": _swish,
    "ThresholdedRelu": _thresholded,
    "Shrink": _shrink,
    "Clip": _clip,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
}
