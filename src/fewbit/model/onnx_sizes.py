"""Arithmetic of sizes: vectors of Python integers, or of torch's symbols for the free ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Sizes = np.ndarray  # of dtype object


def sizes(values: Iterable[Any]) -> Sizes:
    """A vector of sizes."""
    items = list(values)
    made = np.empty(len(items), object)
    made[:] = items
    return made


def scalar(value: Any) -> Sizes:
    """One size, without a dimension."""
    made = np.empty((), object)
    made[()] = value
    return made


def listed(values: Any) -> list[Any]:
    """The sizes one by one: numbers where they are known."""
    return [v.item() if isinstance(v, np.generic) else v for v in np.asarray(values).reshape(-1).tolist()]


def each(function: Callable[..., Any], *operands: Any) -> Sizes:
    """The function of every element, with numpy's broadcasting."""
    made = np.frompyfunc(function, len(operands), 1)(*operands)
    return made if isinstance(made, np.ndarray) else scalar(made)


def shape_of(x: Tensor, start: int = 0, end: int | None = None) -> Sizes:
    return sizes(list(x.shape)[start:end])


def count_of(x: Tensor) -> Sizes:
    return scalar(math.prod(x.shape))


def cast(x: Sizes, dtype: torch.dtype) -> Sizes:
    """The numbers as floats, or as integers (towards zero), or as truth values."""
    if dtype.is_floating_point:
        return each(lambda v: torch.sym_float(v) if isinstance(v, torch.SymInt) else float(v), x)
    if dtype == torch.bool:
        return each(bool, x)
    return each(_truncated, x)


def _truncated(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value
    return torch.sym_int(value) if isinstance(value, torch.SymFloat) else int(value)


def divide(a: Any, b: Any) -> Any:
    """A quotient as ONNX has it: of integers without its fraction."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    if isinstance(a, int) and isinstance(b, int) and (a < 0) != (b < 0):
        return -(-a // b)
    return a // b


def floor(value: Any) -> Any:
    return float(math.floor(value)) if isinstance(value, float) else torch.sym_float(math.floor(value))


def ceil(value: Any) -> Any:
    return float(math.ceil(value)) if isinstance(value, float) else torch.sym_float(math.ceil(value))


def tensor_of(x: Sizes) -> Tensor:
    """The sizes as a tensor, for operators that calculate with them as with data."""
    flat = listed(x)
    if all(isinstance(v, bool | int | float) for v in flat):
        kind = torch.bool if any(isinstance(v, bool) for v in flat) else None
        kind = torch.float32 if any(isinstance(v, float) for v in flat) else kind or torch.int64
        return torch.tensor(flat, dtype=kind).reshape(x.shape)
    dtype = torch.float32 if any(isinstance(v, float | torch.SymFloat) for v in flat) else torch.int64
    return torch.stack([torch.scalar_tensor(v, dtype=dtype) for v in flat]).reshape(x.shape)
