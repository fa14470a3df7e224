"""Coupling through operators that move, select, repeat, pool or reduce numbers."""

import math
from typing import Any

from torch import fx

from fewbit.pruning.coupling import Coupling, Size, name_of, rule, shape_of
from fewbit.pruning.labels import Axes, Axis


def _source(node: fx.Node) -> fx.Node:
    found: Any = node.args[0]
    return found


def _dims(node: fx.Node, position: int, rank: int) -> list[int]:
    """The dimensions that an argument names; all of them where it names none."""
    found: Any = node.args[position] if len(node.args) > position else None
    if found is None or found == []:
        return list(range(rank))
    return [dim % rank for dim in (found if isinstance(found, list | tuple) else [found])]


@rule("max_pool", "avg_pool", "adaptive_avg_pool", "global_avg_pool", "interpolate")
def over_space(c: Coupling, node: fx.Node) -> Axes:
    """Of an image; what is pooled has no labels, and keeps those that it has otherwise."""
    x, shape = c.axes(_source(node)), shape_of(node)
    c.freeze(x[2:], f"{name_of(node)} combines neighbours")
    return (*x[:2], *(None for _ in shape[2:]))


@rule("mean", "sum", "max", "var", "argmax")
def reduction(c: Coupling, node: fx.Node) -> Axes:
    x = c.axes(_source(node))
    dims = _dims(node, 1, len(x))
    c.freeze(tuple(x[dim] for dim in dims), f"{name_of(node)} makes one number of all")
    if len(shape_of(node)) == len(x):
        return tuple(None if dim in dims else axis for dim, axis in enumerate(x))
    return tuple(axis for dim, axis in enumerate(x) if dim not in dims)


@rule("softmax", "log_softmax", "cumsum", "flip")
def along(c: Coupling, node: fx.Node) -> Axes:
    x = c.axes(_source(node))
    for dim in _dims(node, 2 if "roll" in str(node.target) else 1, len(x)):  # in front of roll's: how far
        c.labels.freeze(x[dim], f"{name_of(node)} runs along all of them")
    return x


@rule("glu")
def gated(c: Coupling, node: fx.Node) -> Axes:
    x = list(c.axes(_source(node)))
    dim = int(node.args[1]) % len(x) if len(node.args) > 1 else len(x) - 1  # type: ignore[arg-type]
    axis = x[dim]
    if axis is not None:
        half = len(axis) // 2
        x[dim] = c.unite(axis[:half], axis[half:], node)
    return tuple(x)


@rule("cat")
def cat(c: Coupling, node: fx.Node) -> Axes:
    sources: Any = node.args[0]
    rank = len(shape_of(node))
    dim = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
    parts = [c.axes(each) for each in sources]
    out: list[Axis] = list(parts[0])
    for part in parts[1:]:
        for other, axis in enumerate(part):
            if other != dim:
                out[other] = c.unite(out[other], axis, node)
    out[dim] = _joined(c, node, [(p[dim], shape_of(s)[dim]) for p, s in zip(parts, sources, strict=True)])
    return tuple(out)


def _joined(c: Coupling, node: fx.Node, parts: list[tuple[Axis, int]]) -> Axis:
    """The labels of all parts; those of a part without any have to stay."""
    if all(axis is None for axis, _ in parts):
        return None
    out: list[int] = []
    for axis, size in parts:
        if axis is None:
            axis = c.labels.fresh(size, f"{name_of(node)} joins them with others")
        out += axis
    return tuple(out)


@rule("transpose")
def transpose(c: Coupling, node: fx.Node) -> Axes:
    x = list(c.axes(_source(node)))
    if isinstance(node.args[1], list | tuple):
        return tuple(x[int(dim)] for dim in node.args[1])  # type: ignore[arg-type]
    a, b = (int(dim) for dim in node.args[1:3])  # type: ignore[arg-type]
    x[a], x[b] = x[b], x[a]
    return tuple(x)


@rule("slice")
def selection(c: Coupling, node: fx.Node) -> Any:
    x, name = list(c.axes(_source(node))), str(node.target)
    dim = int(node.args[1]) % len(x) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    axis = x[dim]
    if "slice" not in name:
        c.labels.freeze(axis, f"{name_of(node)} takes some by number")
        return tuple(x[:dim] + ([None] if "index" in name else []) + x[dim + 1 :])
    if axis is None:
        return tuple(x)
    args: Any = node.args
    start, end, step = (args[i] if len(args) > i else None for i in (2, 3, 4))
    if any(isinstance(each, fx.Node) for each in (start, end)) or step not in (None, 1):
        c.labels.freeze(axis, f"{name_of(node)} takes some by number")
        x[dim] = None
        return tuple(x)
    first, last, _ = slice(start, end).indices(len(axis))
    x[dim] = axis[first:last] if last - first > 1 else None
    if last - first <= 1:
        c.labels.freeze(axis[first:last], f"{name_of(node)} takes one alone")
    if start is not None:
        c.size(node, 2, None, axis[:first])
    if end is not None:
        c.size(node, 3, None, axis[:last])
    return tuple(x)


@rule("split")
def split(c: Coupling, node: fx.Node) -> Any:
    found: Any = c.values[_source(node)]
    if "getitem" in getattr(node.target, "__name__", ""):
        index: Any = node.args[1]
        return found[index] if isinstance(found, list) else (None,) * len(shape_of(node))
    x, sizes = list(c.axes(_source(node))), list(node.args[1])  # type: ignore[arg-type]
    dim = int(node.args[2]) % len(x) if len(node.args) > 2 else 0  # type: ignore[arg-type]
    axis, out, start = x[dim], [], 0
    for position, size in enumerate(sizes):
        part = None if axis is None else axis[start : start + int(size)]
        if part is not None and len(part) < 2:
            c.labels.freeze(part, f"{name_of(node)} takes one alone")
            part = None
        c.size(node, 1, position, part)
        out.append((*x[:dim], part, *x[dim + 1 :]))
        start += int(size)
    return out


@rule("repeat")
def repeat(c: Coupling, node: fx.Node) -> Axes:
    x, name = list(c.axes(_source(node))), str(node.target)
    sizes, shape = shape_of(_source(node)), shape_of(node)
    if "interleave" in name:
        dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if dim is None:
            return tuple(c.mixed(node, f"{name_of(node)} flattens"))
        axis, count = x[dim % len(x)], int(node.args[1])  # type: ignore[arg-type]
        x[dim % len(x)] = None if axis is None else tuple(label for label in axis for _ in range(count))
        return tuple(x)
    x = [*(None for _ in shape[len(x) :]), *x]
    sizes = (1,) * (len(shape) - len(sizes)) + sizes
    for dim, axis in enumerate(x):
        x[dim] = None if axis is None else axis * (shape[dim] // sizes[dim])
        if "expand" in name:
            c.size(node, 1, dim, x[dim])
    return tuple(x)


@rule("pad")
def pad(c: Coupling, node: fx.Node) -> Axes:
    """What is added in front of channels and behind them may leave as well: less is added then."""
    x = list(c.axes(_source(node)))
    amounts: Any = node.args[1]
    mode = node.args[2] if len(node.args) > 2 else "constant"
    for back in range(len(amounts) // 2):
        dim = len(x) - 1 - back
        axis, ends = x[dim], amounts[2 * back : 2 * back + 2]
        if axis is None or ends == [0, 0]:
            continue
        if mode != "constant" or any(not isinstance(end, int) or end < 0 for end in ends):
            c.labels.freeze(axis, f"{name_of(node)} repeats or drops some")
            x[dim] = None
            continue
        before, after = (c.labels.fresh(end) for end in ends)
        x[dim] = before + axis + after
        c.size(node, 1, 2 * back, before)
        c.size(node, 1, 2 * back + 1, after)
    return tuple(x)


@rule("pixel_shuffle")
def pixels(c: Coupling, node: fx.Node) -> Any:
    x, name = c.axes(_source(node)), str(node.target)
    axis, count = x[1], shape_of(node)[1]
    if "unshuffle" in name:
        each = count // shape_of(_source(node))[1]
        return (x[0], None if axis is None else tuple(i for i in axis for _ in range(each)), None, None)
    if "pixel" in name:
        if axis is None:
            return (x[0], None, None, None)
        each = len(axis) // count
        parts = [axis[i : i + each] for i in range(0, len(axis), each)]
        for part in parts:
            c.labels.unite_all(part)
        return (x[0], tuple(part[0] for part in parts), None, None)
    groups = int(node.args[1])  # type: ignore[arg-type]
    if axis is None:
        return x
    each = len(axis) // groups
    for position in range(each):  # groups keep their sizes: all lose the same positions
        c.labels.unite_all([axis[group * each + position] for group in range(groups)])
    shuffled = tuple(axis[group * each + position] for position in range(each) for group in range(groups))
    return (x[0], shuffled, *x[2:])


@rule("reshape")
def reshape(c: Coupling, node: fx.Node) -> Axes:
    """Each run of axes that becomes another run with as many numbers is followed by itself."""
    source = _source(node)
    x, before, after = c.axes(source), shape_of(source), shape_of(node)
    out: list[Axis] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start, first = i, j
        i, j = _run(before, after, i, j)
        if all(axis is None for axis in x[start:i]):
            out += [None] * (j - first)
        else:
            out += _regrouped(c, node, list(before[start:i]), list(x[start:i]), list(after[first:j]))
    if "reshape" in str(node.target):
        _resized(c, node, out)
    return tuple(out)


def _resized(c: Coupling, node: fx.Node, out: list[Axis]) -> None:
    """Sizes written in a reshape: numbers are counted again, one that is computed is left to PyTorch."""
    sizes: Any = node.args[1]
    inferred = -1 in sizes
    for dim, (axis, size) in enumerate(zip(out, sizes, strict=True)):
        if axis is None or size == -1:
            continue
        if isinstance(size, int):
            c.size(node, 1, dim, axis)
        elif not inferred:
            c.sizes.append(Size(node, 1, dim, axis, inferred=True))
            inferred = True
        else:
            c.labels.freeze(axis, f"{name_of(node)} computes their number")


def _run(before: tuple[int, ...], after: tuple[int, ...], i: int, j: int) -> tuple[int, int]:
    """Where the next runs of axes with the same product end."""
    a = b = 1
    while True:
        if a == b > 1:
            return i, j
        if a <= b and i < len(before):
            a, i = a * before[i], i + 1
        elif j < len(after):
            b, j = b * after[j], j + 1
        else:
            return len(before), len(after)


def _regrouped(
    c: Coupling, node: fx.Node, before: list[int], axes: list[Axis], after: list[int]
) -> list[Axis]:
    """One axis of those that merge keeps its labels, and one of those that they become gets them."""
    keep = next(dim for dim, axis in enumerate(axes) if axis is not None)
    for other in axes[keep + 1 :]:
        c.labels.freeze(other, f"{name_of(node)} merges them with others that may leave")
    axis = axes[keep] or ()
    inner = math.prod(before[keep + 1 :])
    flat = [axis[index // inner % len(axis)] for index in range(math.prod(before))]
    key = tuple(before), tuple(after)
    candidates = {dim: _merged(flat, after, dim) for dim, size in enumerate(after) if size > 1}
    chosen = c.choices.get(key)
    if chosen is None:
        chosen = max(candidates, key=lambda dim: c.labels.units(candidates[dim]))
    if len(candidates) > 1:
        c.open_choices[key] = list(candidates)
    for group in candidates[chosen]:
        c.labels.unite_all(group)
    return [tuple(g[0] for g in candidates[chosen]) if dim == chosen else None for dim in range(len(after))]


def _merged(flat: list[int], shape: list[int], dim: int) -> list[list[int]]:
    """The labels that meet in each index of an axis, when numbers in one row get a shape."""
    inner = math.prod(shape[dim + 1 :])
    groups: list[list[int]] = [[] for _ in range(shape[dim])]
    for index, label in enumerate(flat):
        groups[index // inner % shape[dim]].append(label)
    return groups
