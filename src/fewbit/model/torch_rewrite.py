"""The operators without parameters, as tables: what vanishes, and which few canonical forms the rest take."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fewbit.model.torch_convert import Bound, Converter

aten = torch.ops.aten

DROPPED: frozenset[Any] = frozenset({aten._assert_tensor_metadata.default, aten._assert_scalar.default,
    aten._assert_async.msg, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default})  # fmt: skip

IDENTITIES: frozenset[Any] = frozenset({aten.contiguous.default, aten.clone.default, aten.detach.default,
    aten.alias.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
    aten.lift_fresh_copy.default, aten.type_as.default, aten.detach_.default, aten.resolve_conj.default,
    aten.expand_as.default})  # fmt: skip


def inplace(c: Converter, node: fx.Node, a: Bound) -> Any:
    """An in-place operator as its functional form; later uses of its argument see the result."""
    target: Any = node.target
    functional = getattr(getattr(aten, target._schema.name.split("::")[1][:-1]), target._overloadname)
    result = c.emit(functional, c.arg(node.args), node, c.arg(node.kwargs))
    argument = node.args[0]
    c.same[node] = c.same.get(argument, argument)  # type: ignore[arg-type]
    return result


def reshape(c: Converter, node: fx.Node, a: Bound) -> Any:
    shape = list(node.meta["val"].shape)
    free = [index for index, size in enumerate(shape) if not isinstance(size, int)]
    x = c.arg(node.args[0])
    if len(free) == 1:
        shape[free[0]] = -1
    elif len(free) > 1:
        return None
    return c.emit(aten.reshape.default, (x, shape), node)


REWRITES: dict[Any, Any] = {
    aten.relu_.default: inplace,
    aten.add_.Tensor: inplace,
    aten.hardswish_.default: inplace,
    aten.silu_.default: inplace,
    aten.hardtanh_.default: inplace,
    aten.view.default: reshape,
    aten.reshape.default: reshape,
    aten.unflatten.int: reshape,
}
