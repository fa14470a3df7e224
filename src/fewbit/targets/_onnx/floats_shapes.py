"""Operators that move, repeat or select numbers, as ONNX nodes; they work on codes as well as on floats."""

from typing import Any

from fewbit.targets._onnx.floats_call import END, Call, Rule, Value

_FIRST = -(2**63)


def _reshape(c: Call) -> str:
    sizes = c["shape"] if "shape" in c.arguments else c["size"]
    return c.node("Reshape", [c["self"], c.vector(sizes)], **({"allowzero": 1} if 0 in sizes else {}))


def _flatten(c: Call) -> str:
    x = c["self"]
    rank = c.rank(x)
    if rank == 0:
        return c.node("Reshape", [x, c.vector([1])])
    start, end = c.axis(c["start_dim"], x), c.axis(c["end_dim"], x)
    if end == rank - 1:
        return c.node("Reshape", [x, c.vector([0] * start + [-1])])
    return c.reshape(x, [0] * start + [-1] + c.sizes(x)[end + 1 :])


def _unsqueeze(c: Call) -> str:
    return c.node("Unsqueeze", [c["self"], c.vector([c["dim"]])])


def _squeeze(c: Call) -> str:
    return c.node("Squeeze", [c["self"], c.vector(c["dim"])])


def _transpose(c: Call) -> str:
    x = c["self"]
    order = list(range(c.rank(x)))
    if not order:
        return c.node("Identity", [x])
    first, second = c.axis(c["dim0"], x), c.axis(c["dim1"], x)
    order[first], order[second] = order[second], order[first]
    return c.node("Transpose", [x], perm=order)


def _permute(c: Call) -> str:
    return c.node("Transpose", [c["self"]], perm=[c.axis(d, c["self"]) for d in c["dims"]])


def _slice(c: Call) -> str:
    start, end = (0 if c["start"] is None else c["start"]), (END if c["end"] is None else c["end"])
    bounds = [c.vector([v]) for v in (start, end, c["dim"], c["step"])]
    return c.node("Slice", [c["self"], *bounds])


def _select(c: Call) -> str:
    index = c["index"]
    number = c.node("Squeeze", [index]) if isinstance(index, Value) else c.constant(index, "int64")
    return c.node("Gather", [c["self"], number], axis=c["dim"])


def _index_select(c: Call) -> str:
    return c.node("Gather", [c["self"], c["index"]], axis=c["dim"])


def _gather(c: Call) -> str:
    return c.node("GatherElements", [c["self"], c["index"]], axis=c["dim"])


def _index(c: Call) -> str | None:
    """x[i], x[:, i], x[i, :, j] ...; a mask of truth values has no rule here."""
    x, indices = c["self"], c["indices"]
    at = [i for i, index in enumerate(indices) if index is not None]
    chosen = [indices[i] for i in at]
    if any(index.dtype in ("bool", "uint8") for index in chosen):
        return None
    if len(at) == 1:
        return c.node("Gather", [x, chosen[0]], axis=at[0])
    rank, depth = c.rank(x), max(c.rank(index) for index in chosen)
    front = c.node("Transpose", [x], perm=[*at, *(i for i in range(rank) if i not in at)])
    total = chosen[0].name
    for index in chosen[1:]:
        total = c.node(
            "Add", [total, index]
        )  # only for its shape, which all of them share after broadcasting
    shape, last = c.node("Shape", [total]), c.vector([-1])
    columns = [c.node("Unsqueeze", [c.node("Expand", [index, shape]), last]) for index in chosen]
    found = c.node("GatherND", [front, c.node("Concat", columns, axis=-1)])
    if at[-1] - at[0] >= len(at) or at[0] == 0:
        return found  # torch too puts the chosen axes first where they do not lie side by side
    order = [*range(depth, depth + at[0]), *range(depth), *range(depth + at[0], depth + rank - len(at))]
    return c.node("Transpose", [found], perm=order)


def _split(c: Call) -> list[str]:
    sizes = c["split_sizes"]
    return c.nodes("Split", [c["self"], c.vector(sizes)], len(sizes), axis=c["dim"])


def _expand(c: Call) -> str:
    # ONNX broadcasts both ways, so 1 keeps a size as torch's -1 does
    return c.node("Expand", [c["self"], c.vector([1 if s == -1 else s for s in c["size"]])])


def _repeat(c: Call) -> str:
    x, repeats = c["self"], c["repeats"]
    missing = len(repeats) - c.rank(x)
    name = c.node("Unsqueeze", [x, c.vector(range(missing))]) if missing else x.name
    return c.node("Tile", [name, c.vector(repeats)])


def _repeat_interleave(c: Call) -> str:
    x, dim = c["self"], c["dim"]
    if dim is None:
        pairs = c.node("Unsqueeze", [c.node("Reshape", [x, c.vector([-1])]), c.vector([1])])
        return c.node("Reshape", [c.node("Expand", [pairs, c.vector([1, c["repeats"]])]), c.vector([-1])])
    axis, sizes = c.axis(dim, x), c.sizes(x)
    pairs = c.node("Unsqueeze", [x, c.vector([axis + 1])])
    shape = [1] * (len(sizes) + 1)
    shape[axis + 1] = c["repeats"]
    return c.reshape(c.node("Expand", [pairs, c.vector(shape)]), [*sizes[:axis], -1, *sizes[axis + 1 :]])


def _flip(c: Call) -> str:
    dims = c["dims"]
    n = len(dims)
    if not n:
        return c.node("Identity", [c["self"]])
    return c.node("Slice", [c["self"], *(c.vector(v) for v in ([-1] * n, [_FIRST] * n, dims, [-1] * n))])


def _roll(c: Call) -> str:
    x = c["self"]
    if not c["dims"]:
        flat = c.node("Reshape", [x, c.vector([-1])])
        known = c.known(x, range(c.rank(x)))
        length = (
            Value(c.node("Shape", [flat]), "int64", (1,), size=True)
            if known is None
            else c.count(x, c.axes(None, x))
        )
        return c.reshape(_rolled(c, flat, c["shifts"][0], 0, length), c.sizes(x))
    name = x.name
    for shift, dim in zip(c["shifts"], c["dims"], strict=True):
        name = _rolled(c, name, shift, c.axis(dim, x), c.size(x, dim))
    return name


def _rolled(c: Call, name: str, shift: Any, axis: int, length: Any) -> str:
    """The two parts that a roll exchanges; the cut is the negative shift modulo the length."""
    if isinstance(length, int) and isinstance(shift, int):
        cut: Any = -shift % length if length else 0
    else:
        negative = c.node("Neg", [shift]) if isinstance(shift, Value) else c.vector([-shift])
        cut = Value(c.node("Mod", [negative, c.vector([length])]), "int64", (1,), size=True)
    at, end, along, zero = c.vector([cut]), c.vector([END]), c.vector([axis]), c.vector([0])
    parts = [c.node("Slice", [name, at, end, along]), c.node("Slice", [name, zero, at, along])]
    return c.node("Concat", parts, axis=axis)


def _pixel_shuffle(c: Call) -> str:
    x, r = c["self"], c["upscale_factor"]
    *lead, channels, height, width = c.sizes(x)
    n = len(lead)
    apart = c.reshape(x, [*lead, channels // (r * r), r, r, height, width])
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    tall, wide = c.product(height, r), c.product(width, r)
    return c.reshape(c.node("Transpose", [apart], perm=order), [*lead, channels // (r * r), tall, wide])


def _pixel_unshuffle(c: Call) -> str:
    x, r = c["self"], c["downscale_factor"]
    *lead, channels, height, width = c.sizes(x)
    n = len(lead)
    low, narrow = c.quotient(height, r), c.quotient(width, r)
    apart = c.reshape(x, [*lead, channels, low, r, narrow, r])
    order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    return c.reshape(c.node("Transpose", [apart], perm=order), [*lead, channels * r * r, low, narrow])


def _channel_shuffle(c: Call) -> str:
    x, groups = c["self"], c["groups"]
    sizes = c.sizes(x)
    apart = c.reshape(x, [sizes[0], groups, sizes[1] // groups, *sizes[2:]])
    return c.reshape(c.node("Transpose", [apart], perm=[0, 2, 1, *range(3, len(sizes) + 1)]), sizes)


def _sym_size(c: Call) -> str:
    axis = c.axis(c["dim"], c["self"])
    return c.node("Shape", [c["self"]], start=axis, end=axis + 1)


def _identity(c: Call) -> str:
    return c.node("Identity", [c["self"]])


RULES: dict[str, Rule] = {
    "aten.reshape.default": _reshape,
    "aten.view.default": _reshape,
    "aten.flatten.using_ints": _flatten,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.squeeze.dims": _squeeze,
    "aten.transpose.int": _transpose,
    "aten.permute.default": _permute,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.index.Tensor": _index,
    "aten.split_with_sizes.default": _split,
    "aten.expand.default": _expand,
    "aten.repeat.default": _repeat,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.flip.default": _flip,
    "aten.roll.default": _roll,
    "aten.pixel_shuffle.default": _pixel_shuffle,
    "aten.pixel_unshuffle.default": _pixel_unshuffle,
    "aten.channel_shuffle.default": _channel_shuffle,
    "aten.sym_size.int": _sym_size,
    **dict.fromkeys(
        ["aten.contiguous.default", "aten.clone.default", "aten.detach.default", "aten.alias.default"],
        _identity,
    ),
}
