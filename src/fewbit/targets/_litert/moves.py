"""Rules for operations that only move numbers: reshapes, transposes, slices, repetitions."""

from math import prod
from typing import Any

from fewbit.errors import TargetError
from fewbit.model.program import Op
from fewbit.targets._litert.layout import FixedBatch, Layout, Order, key
from fewbit.targets._litert.rules import Rule, emit_image, identity, image

Shape = tuple[int | None, ...]
_WEIGHTED = ("linear", "dynamic_linear", "module.Linear")


def _permute(layout: Layout, op: Op) -> None:
    """No operation: the same stored tensor in another order."""
    rank = layout.rank(op.inputs[0])
    axes = [int(a) % rank for a in op.attrs["args"][1]]
    _turned(layout, op, axes)


def _transpose(layout: Layout, op: Op) -> None:
    rank = layout.rank(op.inputs[0])
    a, b = (int(x) % rank for x in op.attrs["args"][1:3])
    axes = list(range(rank))
    axes[a], axes[b] = b, a
    _turned(layout, op, axes)


def _turned(layout: Layout, op: Op, axes: list[int]) -> None:
    stored, order = layout.where[op.inputs[0]]
    layout.alias(op, stored, tuple(axes.index(a) for a in order))


def _reshape(layout: Layout, op: Op) -> None:
    """In the program's order, unless only sizes of 1 are elsewhere, or one linear layer can be turned instead."""
    name = op.inputs[0]
    shape = layout.sizes.signature(op.output)
    stored, order = layout.where[name]
    signature = layout.sizes.signature(name)
    moving = [a for a in order if signature[a] != 1]
    if moving != sorted(moving):
        if _turn_weights(layout, op, stored, order) or _as_it_lies(layout, op, stored, order):
            return
        stored = layout.source(name)
    if layout.stored[stored] == shape:
        layout.alias(op, stored, identity(layout, op.output))
        return
    layout.alias(op, layout.reshape(stored, shape, op.output, op), identity(layout, op.output))


def _as_it_lies(layout: Layout, op: Op, stored: str, order: Order) -> bool:
    """Axes that are merged or split lie side by side in storage too: the result keeps the order of its input."""
    before, after = layout.sizes.signature(op.inputs[0]), layout.sizes.signature(op.output)
    groups = _groups(before, after)
    places = [[order.index(a) for a in ins] for ins, _ in groups]
    if not groups or any(p != list(range(p[0], p[0] + len(p))) for p in places):
        return False
    outs = {ins[0]: outs for ins, outs in groups}
    turned = tuple(a for axis in order for a in outs.get(axis, []))
    shape = tuple(after[a] for a in turned)
    layout.alias(op, layout.reshape(stored, shape, op.output, op), turned)
    return True


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Axes before and behind a reshape that hold the same numbers; empty where the free size is not one of its own."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        ins, outs = [i], [j]
        if (before[i] is None) != (after[j] is None):
            return []
        while (a := _count(before, ins)) != (b := _count(after, outs)):
            part, sizes = (ins, before) if a < b else (outs, after)
            if part[-1] + 1 >= len(sizes) or sizes[part[-1] + 1] is None:
                return []
            part.append(part[-1] + 1)
        found.append((ins, outs))
        i, j = ins[-1] + 1, outs[-1] + 1
    if i < len(before) or not found:
        found = [] if any(s != 1 for s in before[i:]) or not found else [*found[:-1], (
            [*found[-1][0], *range(i, len(before))], found[-1][1])]  # fmt: skip
    if found and j < len(after):
        found[-1][1].extend(range(j, len(after)))
    return found


def _count(sizes: Shape, axes: list[int]) -> int:
    return prod(sizes[a] or 1 for a in axes)


def _turn_weights(layout: Layout, op: Op, stored: str, order: Order) -> bool:
    """Flattened images that only linear layers read: their weights' columns are turned instead of the image."""
    shape = layout.sizes.shape[op.inputs[0]]
    features = 1
    for size in shape[1:]:
        features *= size
    users = layout.users.get(op.output, [])
    flat = layout.sizes.shape[op.output] == (shape[0], features) and order[0] == 0
    if not flat or not users or any(key(u) not in _WEIGHTED or _grouped(u) for u in users):
        return False
    if op.output in layout.program.output_names():
        return False
    for user in users:
        weight = user.constants["weight"]
        turned = weight.reshape(weight.shape[0], *shape[1:]).permute(0, *order[1:]).flatten(1).contiguous()
        user.constants = user.constants | {"weight": turned}
    flattened = layout.reshape(stored, layout.sizes.signature(op.output), op.output, op)
    layout.alias(op, flattened, (0, 1))
    return True


def _grouped(op: Op) -> bool:
    """Whether columns of the weights share scales, so that they cannot change places."""
    scheme = op.attrs.get("schemes", {}).get("weight")
    return scheme is not None and scheme["granularity"] == "group"


def _unsqueeze(layout: Layout, op: Op) -> None:
    stored, order = layout.where[op.inputs[0]]
    rank = layout.rank(op.output)
    axis = int(op.attrs["args"][1]) % rank
    moved = [a + (a >= axis) for a in order]
    moved.insert(min(axis, len(moved)), axis)
    _resized(layout, op, stored, tuple(moved))


def _squeeze(layout: Layout, op: Op) -> None:
    stored, order = layout.where[op.inputs[0]]
    rank = len(order)
    gone = {int(a) % rank for a in _listed(op.attrs["args"][1])}
    gone = {a for a in gone if layout.sizes.shape[op.inputs[0]][a] == 1}
    kept = [a for a in order if a not in gone]
    _resized(layout, op, stored, tuple(sorted(kept).index(a) for a in kept))


def _resized(layout: Layout, op: Op, stored: str, order: Order) -> None:
    signature = layout.sizes.signature(op.output)
    shape = tuple(signature[a] for a in order)
    if layout.stored[stored] == shape:
        layout.alias(op, stored, order)
    else:
        layout.alias(op, layout.reshape(stored, shape, op.output, op), order)


def _listed(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _slice(layout: Layout, op: Op) -> None:
    args = op.attrs["args"]
    axis = int(args[1]) if len(args) > 1 else 0
    start, end, step = ((args[i] if len(args) > i else None) for i in (2, 3, 4))
    _cut(layout, op, op.inputs[0], axis, start, end, 1 if step is None else step)


def _cut(layout: Layout, op: Op, name: str, axis: int, start: Any, end: Any, step: int) -> None:
    """One axis from ``start`` up to ``end``, in whatever order the value is stored."""
    stored, order = layout.where[name]
    axis %= len(order)
    if axis in layout.sizes.free[name]:
        raise FixedBatch
    size = layout.sizes.shape[name][axis]
    start = 0 if start is None else _bounded(layout, start, size)
    end = size if end is None else _bounded(layout, end, size)
    signature = layout.sizes.signature(op.output)
    args = [order.index(axis), start, end, int(step)]
    shape = tuple(signature[a] for a in order)
    layout.alias(op, layout.emit_shares("aten.slice.Tensor", stored, args, op.output, shape, op), order)


def _bounded(layout: Layout, value: Any, size: int) -> int:
    if not isinstance(value, int):
        raise TargetError(f"a slice up to a computed place ({value}) cannot be written for LiteRT")
    return min(max(value + size if value < 0 else value, 0), size)


def _select(layout: Layout, op: Op) -> None:
    """A slice one wide and a reshape: XNNPACK has no slice that drops its axis."""
    stored, order = layout.where[op.inputs[0]]
    axis, index = int(op.attrs["args"][1]) % len(order), int(op.attrs["args"][2])
    if axis in layout.sizes.free[op.inputs[0]]:
        raise FixedBatch
    size = layout.sizes.shape[op.inputs[0]][axis]
    place, at = order.index(axis), index % size
    cut = tuple(1 if i == place else s for i, s in enumerate(layout.stored[stored]))
    args = [place, at, at + 1, 1]
    one = layout.emit_shares("aten.slice.Tensor", stored, args, f"{op.output}_one", cut, op)
    left = tuple(a - (a > axis) for a in order if a != axis)
    rest = tuple(s for i, s in enumerate(cut) if i != place)
    layout.alias(op, layout.reshape(one, rest, op.output, op), left)


def _split(layout: Layout, op: Op) -> None:
    """Nothing by itself: each part is a slice of its own."""
    layout.where[op.output] = layout.where[op.inputs[0]]


def _getitem(layout: Layout, op: Op) -> None:
    split = next(o for o in layout.program.ops if o.output == op.inputs[0])
    if split.attrs.get("target") != "aten.split_with_sizes.default":
        raise TargetError(f"{op.layer or op.node}: takes one of several results, which LiteRT cannot do here")
    args = split.attrs["args"]
    parts = [int(n) for n in args[1]]
    axis = int(args[2]) if len(args) > 2 else 0
    index = int(op.attrs["index"])
    start = sum(parts[:index])
    _cut(layout, op, split.inputs[0], axis, start, start + parts[index], 1)


def _expand(layout: Layout, op: Op) -> None:
    name = op.inputs[0]
    if layout.sizes.free[op.output] != layout.sizes.free[name]:
        raise FixedBatch
    source = layout.source(name)
    wide = layout.sizes.signature(op.output)
    missing = len(wide) - len(layout.stored[source])
    if missing:
        source = layout.reshape(source, (1,) * missing + layout.stored[source], f"{op.output}_wide")
    repeats = [1 if w == s else int(w or 1) for w, s in zip(wide, layout.stored[source], strict=True)]
    layout.alias(op, _tiled(layout, op, source, repeats), identity(layout, op.output))


def _repeat(layout: Layout, op: Op) -> None:
    if layout.sizes.free[op.output] and op.attrs["args"][1][0] != 1:
        raise FixedBatch
    repeats = [int(r) for r in op.attrs["args"][1]]
    source = layout.source(op.inputs[0])
    missing = len(repeats) - len(layout.stored[source])
    if missing:
        source = layout.reshape(source, (1,) * missing + layout.stored[source], f"{op.output}_wide")
    layout.alias(op, _tiled(layout, op, source, repeats), identity(layout, op.output))


def _tiled(layout: Layout, op: Op, source: str, repeats: list[int]) -> str:
    if all(r == 1 for r in repeats):
        return source
    shape = layout.sizes.signature(op.output)
    return layout.emit_shares("aten.repeat.default", source, [repeats], op.output, shape, op)


def _nearest(layout: Layout, op: Op) -> None:
    """Enlarged by repeating pixels; by whole factors, where every runtime agrees which one is nearest."""
    name = op.inputs[0]
    rank = layout.rank(name)
    before, after = layout.sizes.shape[name][2:], layout.sizes.shape[op.output][2:]
    if any(a % b for a, b in zip(after, before, strict=True)):
        raise TargetError(
            f"{op.layer or op.node}: enlarging {before} to {after} has no exact operation in LiteRT"
        )
    size = [1, *after] if rank == 3 else list(after)
    source = image(layout, name)
    target = "aten.upsample_nearest2d.vec"
    attrs = {"target": target, "args": [{"$": 0}, size, None], "kwargs": {}}
    emit_image(layout, op, source, attrs=attrs, kind=target, coding=layout.codings.get(source))


MOVES: dict[str, Rule] = {
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.reshape.default": _reshape,
    "aten.flatten.using_ints": _reshape,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.squeeze.dims": _squeeze,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.split_with_sizes.default": _split,
    "getitem": _getitem,
    "aten.expand.default": _expand,
    "aten.repeat.default": _repeat,
    "aten.upsample_nearest1d.vec": _nearest,
    "aten.upsample_nearest2d.vec": _nearest,
}
