"""ONNX operators that reduce or accumulate along axes, and products by subscripts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbit.model import onnx_sizes
from fewbit.model.onnx_build import Sizes
from fewbit.model.onnx_call import Call

Rule = Callable[[Call], Any]


def _reduce(function: Callable[..., Tensor]) -> Rule:
    def rule(c: Call) -> Any:
        axes = c.axes(1)
        if not axes and c.attr("noop_with_empty_axes", 0):
            return c.raw(0)
        rank, keep = c.rank(0), bool(c.attr("keepdims", 1))
        dims = tuple(range(rank)) if not axes else tuple(sorted(c.axis(a, rank) for a in axes))
        if not dims:
            return c.raw(0)
        if function is _prod and c.is_size(0):
            return c.apply(_size_product, c.raw(0), keep=keep)
        return c.apply(function, c[0], dim=dims, keepdim=keep)

    return rule


def _size_product(x: Any, *, keep: bool) -> Any:
    total = math.prod(onnx_sizes.listed(x))
    return onnx_sizes.sizes([total]) if keep else onnx_sizes.scalar(total)


def _prod(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return functools.reduce(lambda t, d: torch.prod(t, d, keepdim=keepdim), reversed(dim), x)


def _l1(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.sum(torch.abs(x), dim=dim, keepdim=keepdim)


def _l2(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.sqrt(torch.sum(x * x, dim=dim, keepdim=keepdim))


def _square(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.sum(x * x, dim=dim, keepdim=keepdim)


def _log_sum(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.log(torch.sum(x, dim=dim, keepdim=keepdim))


def _total(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.sum(x, dim=dim, keepdim=keepdim, dtype=x.dtype)


def _extreme(function: Callable[..., Tensor]) -> Rule:
    def rule(c: Call) -> Any:
        if c.attr("select_last_index", 0):
            raise c.error("select_last_index: expected the first index of equal values")
        axis = c.axis(int(c.attr("axis", 0)), c.rank(0))
        return c.apply(function, c[0], dim=axis, keepdim=bool(c.attr("keepdims", 1)))

    return rule


def _cumsum(c: Call) -> Any:
    axis = c.axis(int(c.fixed(1, "axis").item()), c.rank(0))
    settings: dict[str, Any] = {name: bool(c.attr(name, 0)) for name in ("exclusive", "reverse")}
    if not any(settings.values()):
        return c.apply(_plain_cumsum, c[0], dim=axis)
    return c.apply(_cumulated, c[0], dim=axis, **settings)


def _plain_cumsum(x: Tensor, *, dim: int) -> Tensor:
    return torch.cumsum(x, dim, dtype=x.dtype)


def _cumulated(x: Tensor, *, dim: int, exclusive: bool, reverse: bool) -> Tensor:
    x = x.flip(dim) if reverse else x
    total = torch.cumsum(x, dim, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(dim) if reverse else total


def _einsum(c: Call) -> Any:
    equation = str(c.attr("equation", ""))
    return c.apply(_by_subscripts, *(c[i] for i in range(len(c.operands))), equation=equation)


def _by_subscripts(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *operands)


def _top_k(c: Call) -> Any:
    axis = c.axis(int(c.attr("axis", -1)), c.rank(0))
    count = Sizes(onnx_sizes.scalar(c.attr("k"))) if c.version < 10 else c.sizes(1)
    largest = bool(c.attr("largest", 1))
    return c.apply_many(_largest, 2, c[0], count, dim=axis, largest=largest)


def _largest(x: Tensor, count: Any, *, dim: int, largest: bool) -> list[Tensor]:
    return list(torch.topk(x, onnx_sizes.listed(count)[0], dim, largest, True))


RULES: dict[str, Rule] = {
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(_total),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_prod),
    "ReduceL1": _reduce(_l1),
    "ReduceL2": _reduce(_l2),
    "ReduceSumSquare": _reduce(_square),
    "ReduceLogSum": _reduce(_log_sum),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ArgMax": _extreme(torch.argmax),
    "ArgMin": _extreme(torch.argmin),
    "CumSum": _cumsum,
    "Einsum": _einsum,
    "TopK": _top_k,
}
