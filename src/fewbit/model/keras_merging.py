"""Keras layers and operators of several inputs: sums, products, concatenation, products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ModelError
from fewbit.model.keras_layout import Assembly, Value, identity


def alike(b: Assembly, path: str, values: Sequence[Value]) -> list[Value]:
    """The values with their axes in one order, that of the largest which convolutions have touched."""
    if len({value.order for value in values}) == 1:
        return list(values)
    rank = max(value.rank for value in values)
    touched = [value for value in values if value.rank == rank and not value.as_keras]
    chosen = (
        max(touched, key=lambda value: value.node.meta["val"].numel()).order if touched else identity(rank)
    )
    return [b.stored_as(value, chosen, path) for value in values]


def merge(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Value]:
    """A layer that folds its inputs by a function of two."""

    def build(b: Assembly, layer: Any, path: str, xs: Sequence[Value]) -> Value:
        values = alike(b, path, _equal_ranks(b, path, xs))
        return reduce(lambda x, y: x.same(b.function(path, function, x.node, y.node)), values)

    return build


def average(b: Assembly, layer: Any, path: str, xs: Sequence[Value]) -> Value:
    total = merge(torch.add)(b, layer, f"{path}.add", xs)
    return total.same(b.function(path, torch.mul, total.node, 1 / len(xs)))


def _equal_ranks(b: Assembly, path: str, xs: Sequence[Value]) -> list[Value]:
    """Keras gives the shorter ones axes of one behind the batch."""
    rank = max(x.rank for x in xs)
    return [_expanded(b, path, x, rank - x.rank) for x in xs]


def _expanded(b: Assembly, path: str, x: Value, count: int) -> Value:
    for _ in range(count):
        x = b.as_keras(x, path)
        x = Value(b.function(f"{path}.unsqueeze", torch.unsqueeze, x.node, 1), identity(x.rank + 1))
    return x


def concatenate(b: Assembly, layer: Any, path: str, xs: Sequence[Value]) -> Value:
    return joined(b, path, xs, int(layer.axis))


def joined(b: Assembly, path: str, xs: Sequence[Value], axis: int) -> Value:
    """The values one after the other along a Keras axis."""
    values = alike(b, path, xs)
    return values[0].same(b.function(path, _cat, *(v.node for v in values), dim=values[0].dim(axis)))


def _cat(*parts: Tensor, dim: int) -> Tensor:
    return torch.cat(parts, dim)


def dot(b: Assembly, layer: Any, path: str, xs: Sequence[Value]) -> Value:
    """The product of two matrices (or vectors) a sample, over one axis of each."""
    x, y = (b.as_keras(value, path) for value in xs)
    axes = (layer.axes, layer.axes) if isinstance(layer.axes, int) else tuple(layer.axes)
    if x.rank > 3 or y.rank > 3 or layer.normalize:
        raise ModelError(
            f"{path}: a Dot of {x.rank} and {y.rank} dimensions with normalize={layer.normalize}: expected at most 3 "
            "and False; reshape in front of it, or write it with other layers"
        )
    first, second = axes[0] % x.rank, axes[1] % y.rank
    left = x.node if first == x.rank - 1 else b.function(f"{path}.transpose", torch.transpose, x.node, 1, 2)
    right = y.node if second == 1 else b.function(f"{path}.transpose", torch.transpose, y.node, 1, 2)
    node = b.function(path, _product, left, right)
    return Value(node, identity(node.meta["val"].dim()))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """[n, i, k] times [n, k, j], where either may be a vector."""
    rows, columns = x.dim() == 2, y.dim() == 2
    product = torch.matmul(x.unsqueeze(1) if rows else x, y.unsqueeze(2) if columns else y)
    if rows and columns:
        return product.squeeze(2)
    return product.squeeze(1) if rows else product.squeeze(2) if columns else product
