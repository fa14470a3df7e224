"""Reductions and functions over an axis, in terms of those that LiteRT has an operator for."""

import math
from typing import Any

import torch

from fewbit.targets._litert.expand import Call, Expand, Value


def _reduce(name: str) -> Expand:
    """One form for all overloads: axes listed, input in the result's type."""

    def expand(c: Call) -> Value | None:
        x, keep = c["self"], bool(c.get("keepdim", False))
        axes = c.axes(c.get("dim"), x)
        dtype = x.dtype if name in ("amax", "amin") else c.dtype
        if not axes:
            return c.tensor(x, dtype)
        target = _FORMS[name]
        if c.op.attrs["target"] == f"aten.{target}" and x.dtype == dtype and c.get("dim") == axes:
            return None
        return c(target, c.tensor(x, dtype), axes, keep)

    return expand


_FORMS = {"mean": "mean.dim", "sum": "sum.dim_IntList", "amax": "amax.default", "amin": "amin.default"}


def _prod(c: Call) -> Value | None:
    x, axis = c["self"], c.get("dim")
    if axis is None:
        x, axis = c("reshape.default", x, [-1]), 0
    if x is c["self"] and x.dtype == c.dtype and c.op.attrs["target"] == "aten.prod.dim_int":
        return None
    return c("prod.dim_int", c.tensor(x, c.dtype), axis, bool(c.get("keepdim", False)))


def _variance(root: bool) -> Expand:
    def expand(c: Call) -> Value:
        x, keep = c["self"], bool(c.get("keepdim", False))
        axes = c.axes(c.get("dim"), x)
        correction = c.arguments.get("correction", c.arguments.get("unbiased", True))
        correction = 1.0 if correction is None else float(correction)
        if correction and any(a in c.expansion.sizes.free.get(x.name, ()) for a in axes):
            raise c.error("a variance over the batch; use correction=0")
        count = math.prod(x.shape[a] for a in axes)
        squares = c("square.default", c("sub.Tensor", x, c("mean.dim", x, axes, True)))
        mean = c("mean.dim", squares, axes, keep)
        if correction:
            mean = c("mul.Tensor", mean, count / (count - correction) if count > correction else math.nan)
        return c("sqrt.default", mean) if root else mean

    return expand


def _with_mean(expand: Expand) -> Expand:
    def both(c: Call) -> list[Any]:
        x, keep = c["self"], bool(c.get("keepdim", False))
        return [expand(c), c("mean.dim", x, c.axes(c.get("dim"), x), keep)]

    return both


def _logsumexp(c: Call) -> Value:
    x, axes = c["self"], c.axes(c["dim"], c["self"])
    top = c("amax.default", x, axes, True)
    total = c("sum.dim_IntList", c("exp.default", c("sub.Tensor", x, top)), axes, True)
    result = c("add.Tensor", c("log.default", total), top)
    return result if c["keepdim"] else c("squeeze.dims", result, axes)


def _arg(name: str) -> Expand:
    """Without a dimension the place in the flattened tensor; kept dimensions are put back."""

    def expand(c: Call) -> Value | None:
        x, axis, keep = c["self"], c.get("dim"), bool(c["keepdim"])
        if axis is not None and not keep:
            return None
        if axis is None:
            found = c(f"{name}.default", c("reshape.default", x, [-1]), 0, False)
            return c("reshape.default", found, [1] * x.rank) if keep else found
        return c("unsqueeze.default", c(f"{name}.default", x, axis, False), axis % x.rank)

    return expand


def _extreme(name: str) -> Expand:
    """max and min along a dimension: the values, and where they are."""

    def expand(c: Call) -> list[Value]:
        x, keep = c["self"], bool(c["keepdim"])
        axis = c["dim"] % max(x.rank, 1)
        places = c(f"arg{name}.default", x, axis, keep)
        return [c(f"a{name}.default", x, [axis], keep), places]

    return expand


def _norm(c: Call) -> Value:
    order = float(c.get("ord", c.get("p", 2)) or 2)
    x, keep = c["self"], bool(c.get("keepdim", False))
    axes = c.axes(c.get("dim"), x)
    if order == 2:
        return c("sqrt.default", c("sum.dim_IntList", c("square.default", x), axes, keep))
    size = c("abs.default", x)
    if math.isinf(order):
        return c("amax.default" if order > 0 else "amin.default", size, axes, keep)
    if order == 1:
        return c("sum.dim_IntList", size, axes, keep)
    total = c("sum.dim_IntList", c("pow.Tensor_Scalar", size, order), axes, keep)
    return c("pow.Tensor_Scalar", total, 1 / order)


def _truth(name: str) -> Expand:
    """any and all: the largest and the smallest of zeros and ones."""

    def expand(c: Call) -> Value:
        x = c["self"]
        numbers = c.tensor(c.tensor(x, torch.bool), torch.float32)
        axes = c.axes(c.get("dim"), x)
        reduced = c(
            "amax.default" if name == "any" else "amin.default", numbers, axes, bool(c.get("keepdim", False))
        )
        return c("gt.Scalar", reduced, 0.5)

    return expand


def _softmax(name: str) -> Expand:
    def expand(c: Call) -> Value | None:
        if c.op.attrs["target"] == f"aten.{name}.int" and c.x.dtype == c.dtype and c.get("dtype") is None:
            return None
        return c(f"{name}.int", c.tensor(c["self"], c.dtype), c["dim"])

    return expand


def _glu(c: Call) -> Value:
    axis = c["dim"] % c.x.rank
    half = c.x.shape[axis] // 2
    first, second = (c("slice.Tensor", c.x, axis, i * half, (i + 1) * half, 1) for i in range(2))
    return c("mul.Tensor", first, c("sigmoid.default", second))


def _cumsum(c: Call) -> Value | None:
    return (
        None
        if c.x.dtype == c.dtype and c.get("dtype") is None
        else c("cumsum.default", c.tensor(c.x, c.dtype), c["dim"])
    )


def _overloads(name: str, expand: Expand, *overloads: str) -> dict[str, Any]:
    return {f"aten.{name}.{o}": expand for o in overloads}


REDUCTIONS: dict[str, Expand] = {
    **_overloads("mean", _reduce("mean"), "dim", "default"),
    **_overloads("sum", _reduce("sum"), "dim_IntList", "default"),
    **_overloads("amax", _reduce("amax"), "default"),
    **_overloads("amin", _reduce("amin"), "default"),
    **_overloads("max", _reduce("amax"), "default"),
    **_overloads("min", _reduce("amin"), "default"),
    **_overloads("prod", _prod, "dim_int", "default"),
    **_overloads("var", _variance(False), "default", "dim", "correction"),
    **_overloads("std", _variance(True), "default", "dim", "correction"),
    **_overloads("var_mean", _with_mean(_variance(False)), "default", "dim", "correction"),
    **_overloads("std_mean", _with_mean(_variance(True)), "default", "dim", "correction"),
    **_overloads("logsumexp", _logsumexp, "default"),
    **_overloads("argmax", _arg("argmax"), "default"),
    **_overloads("argmin", _arg("argmin"), "default"),
    **_overloads("max", _extreme("max"), "dim"),
    **_overloads("min", _extreme("min"), "dim"),
    **_overloads("linalg_vector_norm", _norm, "default"),
    **_overloads("norm", _norm, "ScalarOpt_dim", "Scalar"),
    **_overloads("any", _truth("any"), "default", "dim", "dims"),
    **_overloads("all", _truth("all"), "default", "dim", "dims"),
    **_overloads("softmax", _softmax("softmax"), "int"),
    **_overloads("log_softmax", _softmax("log_softmax"), "int"),
    **_overloads("glu", _glu, "default"),
    **_overloads("cumsum", _cumsum, "default"),
}
