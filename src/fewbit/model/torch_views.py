"""In-place operators as functional ones: later uses of the tensor, and of every view of it, see what was
written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fewbit.errors import ModelError

if TYPE_CHECKING:
    from fewbit.model.torch_convert import Converter

aten = torch.ops.aten
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten._unsafe_view.default, aten.view_as.default})  # fmt: skip
COPIES = frozenset({aten.contiguous.default, aten.alias.default, aten.detach.default, aten.to.dtype,
    aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default,
    aten.lift_fresh_copy.default})  # fmt: skip
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.tensor_split.sections})  # fmt: skip


def is_inplace(target: Any) -> bool:
    """Whether an operator writes into its first argument (`relu_`, but not `batch_norm`)."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.name.endswith("_") or target is aten.detach_.default:
        return False
    info = schema.arguments[0].alias_info if schema.arguments else None
    return info is not None and info.is_write


def storage(node: fx.Node) -> Any:
    """What two nodes share when one is a view of the other."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


class Views:
    """Who is a view of whom, and which views have not yet seen a write."""

    def __init__(self) -> None:
        self.same: dict[fx.Node, fx.Node] = {}  # in-place result -> the node that first named the tensor
        self.parent: dict[fx.Node, fx.Node] = {}
        self.stale: set[fx.Node] = set()

    def root(self, node: fx.Node) -> fx.Node:
        return self.same.get(node, node)

    def record(self, node: fx.Node) -> None:
        """Remember that `node` is a view of its first argument, if it is."""
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source.target in SPLITS:
            source = source.args[0]
        if isinstance(source, fx.Node) and storage(source) is not None and storage(source) == storage(node):
            self.parent[node] = self.root(source)

    def written(self, node: fx.Node) -> None:
        """After a write to `node`: every view of it or of its ancestors is stale, save the path that was
        written.
        """
        path = [node]
        while path[-1] in self.parent:
            path.append(self.parent[path[-1]])
        for view in self.parent:
            ancestor = self.parent[view]
            while ancestor not in path and ancestor in self.parent:
                ancestor = self.parent[ancestor]
            if ancestor in path and view not in path:
                self.stale.add(view)


def _same_place(first: Any, second: Any) -> bool:
    """Whether two nodes are the very same numbers in memory: `y[:, 0] += 1` ends in such a copy onto
    itself.
    """
    a, b = (n.meta["val"] if isinstance(n, fx.Node) else None for n in (first, second))
    if a is None or b is None or storage(first) is None or storage(first) != storage(second):
        return False
    return str((a.shape, a.stride(), a.storage_offset())) == str((b.shape, b.stride(), b.storage_offset()))


def write(c: Converter, node: fx.Node) -> Any:
    """The functional form of an in-place operator; its argument's name stands for the result from here on."""
    argument: Any = node.args[0]
    root = c.views.root(argument)
    if node.target is aten.copy_.default and _same_place(argument, node.args[1]):
        c.views.same[node] = root
        return c.get(argument)
    result = _functional(c, node)
    c.views.same[node] = root
    value = result
    while (parent := c.views.parent.get(root)) is not None:
        before, c.values[root] = c.values[root], value
        value = value if before is c.get(parent) else _write_back(c, root, parent, value)
        root = parent
    c.values[root] = value
    c.views.written(c.views.root(argument))
    return result


def _functional(c: Converter, node: fx.Node) -> Any:
    target: Any = node.target
    name = target._schema.name.split("::")[1][:-1]
    x, rest = node.args[0], node.args[1:]
    if name in ("zero", "fill"):
        return c.emit(aten.full_like.default, (c.arg(x), *(c.number(r) for r in rest or (0,))), node)
    if name == "copy":
        source: Any = rest[0]
        equal = source.meta["val"].dtype == node.meta["val"].dtype and str(source.meta["val"].shape) == str(
            node.meta["val"].shape
        )
        return c.get(source) if equal else c.emit(aten.copy.default, c.arg((x, source)), node)
    packet = getattr(aten, name, None)
    overload = getattr(packet, target._overloadname, None) or getattr(packet, "default", None)
    if overload is None:
        raise ModelError(f"the in-place operator {target} has no functional form: write {name}_ out of place")
    return c.call_as(overload, node)


def _write_back(c: Converter, view: fx.Node, parent: fx.Node, value: Any) -> Any:
    """The parent with `value` in the place that the view shows."""
    base = c.materialise(c.get(parent))
    value = c.materialise(value)
    kind: Any = view.target
    args: Any = view.args
    if kind in COPIES:
        return value
    if kind in RESHAPES:
        return c.reshaped(value, parent)
    if kind is aten.transpose.int:
        return c.emit(kind, (value, *args[1:]), parent)
    if kind is aten.t.default:
        return c.emit(aten.transpose.int, (value, 0, 1), parent)
    if kind is aten.permute.default:
        order = [d % len(args[1]) for d in args[1]]
        return c.emit(kind, (value, [order.index(d) for d in range(len(order))]), parent)
    if kind is aten.slice.Tensor:
        return c.emit(aten.slice_scatter.default, (base, value, *c.arg(args[1:])), parent)
    if isinstance(args[0], fx.Node) and args[0].target is aten.unbind.int:
        dim = args[0].args[1] if len(args[0].args) > 1 else 0
        return c.emit(aten.select_scatter.default, (base, value, dim, args[1]), parent)
    if kind is aten.select.int:
        return c.emit(aten.select_scatter.default, (base, value, *c.arg(args[1:])), parent)
    if isinstance(args[0], fx.Node) and args[0].target in SPLITS - {aten.unbind.int}:
        return _write_part(c, view, parent, base, value)
    raise ModelError(
        f"{view.name!r} is written in place through {kind}: expected a slice, select, reshape or transpose; "
        "write out of place instead (y = y + 1 rather than y += 1)"
    )


def _write_part(c: Converter, view: fx.Node, parent: fx.Node, base: Any, value: Any) -> Any:
    split: Any = view.args[0]
    index: Any = view.args[1]
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    sizes = [part.shape[dim] for part in split.meta["val"]]
    start = sum(sizes[:index])
    return c.emit(aten.slice_scatter.default, (base, value, dim, start, start + sizes[index]), parent)
