"""Operators that gather, repeat or rearrange, in terms of those that LiteRT has an operator for."""

from typing import Any

import torch

from fewbit.targets._litert.expand import Call, Expand, Value


def _stack(c: Call) -> Value:
    axis = c["dim"] % (c["tensors"][0].rank + 1)
    return c("cat.default", [c("unsqueeze.default", c.tensor(t, c.dtype), axis) for t in c["tensors"]], axis)


def _cat(c: Call) -> Value | None:
    if all(t.dtype == c.dtype for t in c["tensors"]):
        return None
    return c("cat.default", [c.tensor(t, c.dtype) for t in c["tensors"]], c["dim"])


def _view(c: Call) -> Value:
    return c("reshape.default", c.x, list(c["size"]))


def _repeat_interleave(c: Call) -> Value:
    x, axis = c.x, c["dim"]
    if axis is None:
        x, axis = c("reshape.default", x, [-1]), 0
    axis, times = axis % x.rank, c["repeats"]
    apart = c("unsqueeze.default", x, axis + 1)
    copies = c("repeat.default", apart, [times if i == axis + 1 else 1 for i in range(x.rank + 1)])
    return c("flatten.using_ints", copies, axis, axis + 1)


def _tile(c: Call) -> Value:
    repeats = list(c["dims"])
    return c("repeat.default", c.x, [1] * (c.x.rank - len(repeats)) + repeats)


def _flip(c: Call) -> Value | None:
    """One axis at a time."""
    axes = c.axes(c["dims"], c.x) if c["dims"] else []
    if len(axes) == 1 and c["dims"] == axes:
        return None
    x = c.x
    for axis in axes:
        x = c("flip.default", x, [axis])
    return x


def _roll(c: Call) -> Value:
    if not c["dims"]:
        flat = _rolled(c, c("reshape.default", c.x, [-1]), c["shifts"][0], 0)
        return c.reshape(flat, list(c.x.shape))
    x = c.x
    for shift, axis in zip(c["shifts"], c["dims"], strict=True):
        x = _rolled(c, x, shift, axis % x.rank)
    return x


def _rolled(c: Call, x: Value, shift: int, axis: int) -> Value:
    size = x.shape[axis]
    cut = -shift % size
    if not cut:
        return x
    parts = [c("slice.Tensor", x, axis, cut, size, 1), c("slice.Tensor", x, axis, 0, cut, 1)]
    return c("cat.default", parts, axis)


def _pixel_shuffle(c: Call) -> Value:
    *_, channels, height, width = c.x.shape
    r = int(c["upscale_factor"])
    n, out = _batch(c), channels // (r * r)
    apart = c.reshape(n, [n.shape[0], out, r, r, height, width])
    turned = c("permute.default", apart, [0, 1, 4, 2, 5, 3])
    return _unbatched(c, c.reshape(turned, [n.shape[0], out, height * r, width * r]))


def _pixel_unshuffle(c: Call) -> Value:
    *_, channels, height, width = c.x.shape
    r = int(c["downscale_factor"])
    n = _batch(c)
    apart = c.reshape(n, [n.shape[0], channels, height // r, r, width // r, r])
    turned = c("permute.default", apart, [0, 1, 3, 5, 2, 4])
    return _unbatched(c, c.reshape(turned, [n.shape[0], channels * r * r, height // r, width // r]))


def _batch(c: Call) -> Value:
    return c("unsqueeze.default", c.x, 0) if c.x.rank == 3 else c.x


def _unbatched(c: Call, x: Value) -> Value:
    return c("squeeze.dims", x, [0]) if c.x.rank == 3 else x


def _channel_shuffle(c: Call) -> Value:
    n, channels, *rest = c.x.shape
    apart = c.reshape(c.x, [n, c["groups"], channels // c["groups"], *rest])
    turned = c("transpose.int", apart, 1, 2)
    return c.reshape(turned, list(c.x.shape))


def _index_select(c: Call) -> Value | None:
    return None if c.x.rank else c.x


def _gather(c: Call) -> Value | None:
    """Along the last axis, in every row by places of its own."""
    x, index = c["self"], c["index"]
    axis, last = c["dim"] % x.rank, x.rank - 1
    if axis != last:
        found = _gathered(c, c("transpose.int", x, axis, last), c("transpose.int", index, axis, last))
        return c("transpose.int", found, axis, last)
    if x.shape[:-1] == index.shape[:-1]:
        return None
    return _gathered(c, x, index)


def _gathered(c: Call, x: Value, index: Value) -> Value:
    """Along the last axis, with as many rows as there are indices for."""
    for axis in range(x.rank - 1):
        if x.shape[axis] != index.shape[axis]:
            x = c("slice.Tensor", x, axis, 0, index.shape[axis], 1)
    return c("gather.default", x, x.rank - 1, index)


def _index(c: Call) -> Value:
    """x[i], x[:, i], x[:, i, j]: tensors of places along axes side by side, which are counted as one."""
    x, indices = c["self"], list(c["indices"])
    at = [i for i, index in enumerate(indices) if index is not None]
    chosen = [indices[i] for i in at]
    if at[-1] - at[0] >= len(at) or any(index.dtype == torch.bool for index in chosen):
        raise c.error("indexing by truth values, or along axes that are not side by side")
    place, axis = chosen[0], at[0]
    for i, index in zip(at[1:], chosen[1:], strict=True):
        place = c("add.Tensor", c("mul.Tensor", place, x.shape[i]), index)
    if len(at) > 1:
        x = c("flatten.using_ints", x, axis, at[-1])
    return _taken(c, x, axis, place)


def _taken(c: Call, x: Value, axis: int, index: Value) -> Value:
    if index.rank == 1:
        return c("index_select.default", x, axis, index)
    found = c("index_select.default", x, axis, c("reshape.default", index, [-1]))
    if axis:
        return c.reshape(found, [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])
    return c("reshape.default", found, [-1, *index.shape[1:], *x.shape[1:]])


def _embedding(c: Call) -> Value:
    """A table that is no layer's parameter."""
    return _taken(c, c["weight"], 0, c["indices"])


def _one_hot(c: Call) -> Value:
    count = int(c["num_classes"])
    if count < 0:
        raise c.error("one_hot without a number of classes")
    places = c.constant(torch.arange(count, dtype=torch.int32))
    here = c("eq.Tensor", c("unsqueeze.default", c.tensor(c.x, torch.int32), c.x.rank), places)
    return c.tensor(here, c.dtype)


def _unbind(c: Call) -> list[Value]:
    axis = c["dim"] % c.x.rank
    return [c("select.int", c.x, axis, i) for i in range(c.x.shape[axis])]


def _chunk(c: Call) -> list[Value]:
    axis, size = c["dim"] % c.x.rank, c.x.shape[c["dim"]]
    step = -(-size // int(c["chunks"]))
    return [c("slice.Tensor", c.x, axis, i, min(i + step, size), 1) for i in range(0, size, step)]


def _triangle(upper: bool) -> Expand:
    """A matrix with one triangle kept: chosen by a constant of truth values."""

    def expand(c: Call) -> Value:
        ones = torch.ones(c.x.shape[-2:], dtype=torch.bool)
        kept = ones.triu(c["diagonal"]) if upper else ones.tril(c["diagonal"])
        return c("where.self", c.constant(kept), c.x, c.constant(0, c.x.dtype))

    return expand


def _slice_scatter(c: Call) -> Value:
    """A tensor with a part of it replaced: what is before, the part, what is behind."""
    x, part, axis = c["self"], c["src"], c["dim"] % c["self"].rank
    size, start, end = x.shape[axis], c["start"], c["end"]
    start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
    end = size if end is None else min(max(end + size if end < 0 else end, 0), size)
    if c["step"] != 1:
        raise c.error("a part with gaps cannot be replaced")
    return _replaced(c, x, part, axis, (start, end))


def _select_scatter(c: Call) -> Value:
    x, axis = c["self"], c["dim"] % c["self"].rank
    at = c["index"] % x.shape[axis]
    return _replaced(c, x, c("unsqueeze.default", c["src"], axis), axis, (at, at + 1))


def _replaced(c: Call, x: Value, part: Value, axis: int, place: tuple[int, int]) -> Value:
    (start, end), size = place, x.shape[axis]
    parts = [c("slice.Tensor", x, axis, 0, start, 1)] if start else []
    parts.append(c.tensor(part, c.dtype))
    parts += [c("slice.Tensor", x, axis, end, size, 1)] if end < size else []
    return c("cat.default", parts, axis) if len(parts) > 1 else parts[0]


def _unfold(c: Call) -> Value:
    """Windows along an axis, their numbers along a new last one."""
    x, axis, size, step = c.x, c["dimension"] % c.x.rank, c["size"], c["step"]
    span = (c.shape[axis] - 1) * step + 1
    starts = [c("slice.Tensor", x, axis, i, i + span, step) for i in range(size)]
    return c("cat.default", [c("unsqueeze.default", s, x.rank) for s in starts], x.rank)


def _same(c: Call) -> Any:
    return c.x


SHAPES: dict[str, Expand] = {
    "aten.stack.default": _stack,
    "aten.cat.default": _cat,
    "aten.view.default": _view,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.tile.default": _tile,
    "aten.flip.default": _flip,
    "aten.roll.default": _roll,
    "aten.pixel_shuffle.default": _pixel_shuffle,
    "aten.pixel_unshuffle.default": _pixel_unshuffle,
    "aten.channel_shuffle.default": _channel_shuffle,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.index.Tensor": _index,
    "aten.embedding.default": _embedding,
    "aten.one_hot.default": _one_hot,
    "aten.unbind.int": _unbind,
    "aten.chunk.default": _chunk,
    "aten.tril.default": _triangle(False),
    "aten.triu.default": _triangle(True),
    "aten.slice_scatter.default": _slice_scatter,
    "aten.select_scatter.default": _select_scatter,
    "aten.unfold.default": _unfold,
    "module.Dropout": _same,
}
