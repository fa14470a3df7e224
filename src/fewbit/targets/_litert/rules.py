"""How integer operations, and those that only move codes, become the runtime's operations over stored tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fewbit.errors import TargetError
from fewbit.model.program import Coding, Op
from fewbit.targets._litert.layout import NHWC, NLC, Layout, Order, constant, key

Rule = Callable[[Layout, Op], None]


def elementwise(layout: Layout, op: Op) -> None:
    """One input, any order."""
    stored, order = layout.where[op.inputs[0]]
    if stored in layout.rows and order == NLC:
        _emit_row(layout, op, [layout.rows[stored]])
    else:
        layout.emit(op, [stored], order)


def in_order(layout: Layout, op: Op) -> None:
    """Inputs and output in the program's own order."""
    layout.emit(op, [layout.source(name) for name in op.inputs], identity(layout, op.output))


def identity(layout: Layout, name: str) -> Order:
    return tuple(range(layout.rank(name)))


def _constant(layout: Layout, op: Op) -> None:
    layout.emit(op, [], identity(layout, op.output))
    layout.constants[op.output] = constant(op, "value")


def binary(layout: Layout, op: Op) -> None:
    """Two inputs that broadcast: both in the order of the first one that was computed."""
    rank = layout.rank(op.output)
    full = [n for n in op.inputs if layout.rank(n) == rank]
    order = next(
        (layout.order(n) for n in full if layout.where[n][0] not in layout.constants), None
    ) or identity(layout, op.output)
    sources = [widened(layout, n, order) for n in op.inputs]
    computed = [s for s in sources if s not in layout.constants]
    if order == NLC and computed and all(s in layout.rows for s in computed):
        _emit_row(layout, op, [layout.rows.get(s, s) for s in sources])
    else:
        layout.emit(op, sources, order)


def widened(layout: Layout, name: str, order: Order) -> str:
    """A value that broadcasts, in an order of the result's rank: missing axes in front become sizes of 1."""
    missing = len(order) - layout.rank(name)
    if not missing or layout.rank(name) == 0:
        return layout.source(name, order if not missing else None)
    if order == tuple(range(len(order))):
        return layout.source(name)
    stored = layout.source(name)
    shape = (1,) * missing + layout.stored[stored]
    wide = f"{stored}_wide{''.join(map(str, order))}"
    if wide not in layout.stored:
        layout.reshape(stored, tuple(shape[a] for a in order) if _one_size(shape) else shape, wide)
        if not _one_size(shape):
            turned = tuple(shape[a] for a in order)
            layout.emit_shares("aten.permute.default", wide, [list(order)], f"{wide}_turned", turned)
    return wide if _one_size(shape) else f"{wide}_turned"


def _one_size(shape: tuple[int | None, ...]) -> bool:
    """Whether at most one size is not 1, so that no order of the axes moves a number."""
    return sum(s != 1 for s in shape) <= 1


def image(layout: Layout, name: str) -> str:
    """A value of rank 4 with channels last; one of rank 3 as an image one row high."""
    if layout.rank(name) == 4:
        return layout.source(name, NHWC)
    if layout.rank(name) != 3:
        raise TargetError(f"{name}: {layout.rank(name) - 2}-d images have no operation in LiteRT")
    stored = layout.source(name, NLC)
    if stored in layout.rows:
        return layout.rows[stored]  # the image that was flattened a moment ago
    n, length, channels = layout.stored[stored]
    name = f"{stored}_image"
    return name if name in layout.stored else layout.reshape(stored, (n, 1, length, channels), name)


def emit_image(layout: Layout, op: Op, source: str, **changes: Any) -> None:
    """An operation on an image, channels last; its output back at the rank that the program gives it."""
    attrs = dict(changes.pop("attrs", op.attrs)) | {"layout": "NHWC"}
    if layout.rank(op.output) == 4:
        layout.emit(op, [source], NHWC, attrs=attrs, **changes)
        return
    _emit_row(layout, op, [source], attrs=attrs, **changes)


def _emit_row(layout: Layout, op: Op, sources: list[str], **changes: Any) -> None:
    """An operation on images one row high, whose output is seen as rows: the image is kept for what comes next."""
    n, channels, length = layout.sizes.signature(op.output)
    flat = f"{op.output}_flat"
    layout.emit(op, sources, (0,), name=flat, **changes)
    layout.stored[flat] = (n, 1, length, channels)
    row = layout.reshape(flat, (n, length, channels), f"{op.output}_row", op)
    layout.rows[row] = flat
    layout.alias(op, row, NLC)


def _conv(layout: Layout, op: Op) -> None:
    weight = constant(op, "weight")
    attrs = dict(op.attrs)
    if weight.dim() == 3:
        weight = weight.unsqueeze(2)
        attrs |= {"stride": [1, *attrs["stride"]], "dilation": [1, *attrs["dilation"]]}
        attrs["pad"] = [*attrs["pad"], 0, 0] if attrs["pad"] else []
    source = image(layout, op.inputs[0])
    pads, height, width = [*attrs["pad"], 0, 0, 0, 0][:4], *layout.stored[source][1:3]
    assert height is not None and width is not None
    same = [
        p
        for size, axis in ((width, 1), (height, 0))
        for p in same_padding(size, weight.shape[2 + axis], attrs["stride"][axis], attrs["dilation"][axis])
    ]
    if any(pads) and pads != same:
        zero = int(layout.codings[source].zero_point) if source in layout.codings else 0.0
        source, attrs["pad"] = _padded(layout, op, source, pads, zero), []
    emit_image(layout, op, source, attrs=attrs, constants=op.constants | {"weight": weight})


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Numbers added before and after an axis by the runtime's padding SAME."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def _pool_attrs(values: list[int], rank: int) -> list[int]:
    return [1, *values] if rank == 3 else list(values)


def _avg_pool(layout: Layout, op: Op) -> None:
    """The runtime's average keeps its input's scale; another scale is a step of its own, but for a whole image."""
    rank = layout.rank(op.inputs[0])
    if rank == 4 and tuple(op.attrs["kernel"]) == layout.sizes.shape[op.inputs[0]][2:]:
        whole = {k: v for k, v in op.attrs.items() if k == "clamp"}
        _global_avg_pool(layout, dataclasses.replace(op, kind="global_avg_pool", attrs=whole))
        return
    attrs = {k: _pool_attrs(op.attrs[k], rank) for k in ("kernel", "stride")}
    source = image(layout, op.inputs[0])
    coding, wanted = layout.codings[source], layout.program.codings[op.output]
    if coding == wanted:
        emit_image(layout, op, source, attrs=op.attrs | attrs)
        return
    pooled = dataclasses.replace(op, output=f"{op.output}_mean", attrs=attrs)
    _known_like(layout, op, pooled.output)
    emit_image(layout, pooled, source, attrs=attrs, coding=coding)
    if layout.rank(op.output) == 3:
        layout.codings[f"{pooled.output}_row"] = coding
    _requantized(layout, op, pooled.output)


def _known_like(layout: Layout, op: Op, name: str) -> None:
    """A new value with the sizes of the output of ``op``."""
    layout.sizes.shape[name] = layout.sizes.shape[op.output]
    layout.sizes.free[name] = layout.sizes.free[op.output]


def _requantized(layout: Layout, op: Op, name: str) -> None:
    """The output of ``op`` is another value brought to its coding, and clamped as it is."""
    stored, order = layout.where[name]
    attrs = {"clamp": op.attrs["clamp"]} if "clamp" in op.attrs else {}
    layout.emit(op, [stored], order, kind="requantize", attrs=attrs, constants={})


def _global_avg_pool(layout: Layout, op: Op) -> None:
    source = image(layout, op.inputs[0])
    if op.attrs.get("squeeze"):
        layout.emit(op, [source], (0, 1), attrs=op.attrs | {"layout": "NHWC"})
    else:
        emit_image(layout, op, source)


def max_pool(layout: Layout, op: Op) -> None:
    """Pads of its own become a padding with the smallest code (or number) in front."""
    args, rank = op.attrs["args"], layout.rank(op.inputs[0])
    kernel = _pool_attrs(_list(args[1], rank - 2), rank)
    stride = _pool_attrs(_list(args[2], rank - 2), rank) if len(args) > 2 and args[2] else kernel
    padding = (
        [0, *_list(args[3], 1)] if rank == 3 and len(args) > 3 else _list(args[3] if len(args) > 3 else 0, 2)
    )
    dilation = _list(args[4] if len(args) > 4 else 1, rank - 2)
    if any(d != 1 for d in dilation):
        raise TargetError(f"{op.layer or op.node}: max pooling with dilation has no operation in LiteRT")
    ends = list(padding)
    if len(args) > 5 and args[5]:  # ceil mode: the last windows need room of their own, or leave some unused
        sizes, outs = ([1, *layout.sizes.shape[n][2:]][-2:] for n in (op.inputs[0], op.output))
        ends = [
            max(0, (o - 1) * s + k - n - p)
            for n, o, k, s, p in zip(sizes, outs, kernel, stride, padding, strict=True)
        ]
    source = image(layout, op.inputs[0])
    if any(padding) or any(ends):
        coding = layout.codings.get(source)
        lowest = int(coding.scheme.qmin) if coding else float(torch.finfo(torch.float32).min)
        source = _padded(layout, op, source, [padding[1], ends[1], padding[0], ends[0]], lowest)
    attrs = {"target": "aten.max_pool2d.default", "args": [{"$": 0}, kernel, stride, [0, 0]], "kwargs": {}}
    emit_image(
        layout, op, source, attrs=attrs, kind="aten.max_pool2d.default", coding=layout.codings.get(source)
    )


def _padded(layout: Layout, op: Op, source: str, pad: list[int], value: float) -> str:
    """An image with one number (or code) around it."""
    n, h, w, c = layout.stored[source]
    assert h is not None and w is not None
    shape = (n, h + pad[2] + pad[3], w + pad[0] + pad[1], c)
    coding = layout.codings.get(source)
    name = f"{op.output}_padded"
    attrs: dict[str, Any] = {"pad": pad, "value": value, "layout": "NHWC"}
    if coding is None:
        attrs = pad_attrs([0, 0, *pad], value)
    domain = "integer" if coding else "float"
    layout.ops.append(Op("pad", domain, op.layer, f"{op.node}_pad", [source], name, attrs))
    layout.stored[name] = shape
    if coding:
        layout.codings[name] = coding
    return name


def pad_attrs(pad: list[int], value: float, mode: str = "constant") -> dict[str, Any]:
    """A padding of floats, amounts from the last stored axis on."""
    number: Any = {"float": str(value)} if abs(value) == float("inf") else value
    return {"target": "aten.pad.default", "args": [{"$": 0}, pad, mode, number], "kwargs": {}}


def _list(value: Any, n: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * n if len(values) == 1 else values


def _pad(layout: Layout, op: Op) -> None:
    name, rank = op.inputs[0], layout.rank(op.inputs[0])
    order = layout.order(name)
    flat = list(op.attrs["pad"]) + [0] * (2 * rank - len(op.attrs["pad"]))
    pairs = [tuple(flat[2 * (rank - 1 - axis) : 2 * (rank - axis)]) for axis in range(rank)]
    turned = [pairs[axis] for axis in order]
    pad = [p for pair in reversed(turned) for p in pair]
    layout.emit(op, [layout.source(name, order)], order, attrs=op.attrs | {"pad": pad})


def _linear(layout: Layout, op: Op) -> None:
    name = op.inputs[0]
    order = layout.order(name)
    if order[-1] != len(order) - 1:
        order = identity(layout, name)
    layout.emit(op, [layout.source(name, order)], order)


def _concat(layout: Layout, op: Op) -> None:
    order = layout.order(op.inputs[0])
    wanted = layout.program.codings[op.output]
    sources = []
    for i, name in enumerate(op.inputs):
        stored = layout.source(name, order)
        if layout.codings[stored] != wanted:
            stored = _brought(layout, op, stored, wanted, f"{op.output}_part{i}")
        sources.append(stored)
    attrs = {"axis": order.index(op.attrs["axis"])}
    if "clamp" in op.attrs:
        attrs["clamp"] = op.attrs["clamp"]
    layout.emit(op, sources, order, attrs=attrs)


def _brought(layout: Layout, op: Op, stored: str, coding: Coding, name: str) -> str:
    """A stored tensor requantized to another coding."""
    layout.ops.append(Op("requantize", "integer", op.layer, f"{op.node}_{name}", [stored], name))
    layout.stored[name] = layout.stored[stored]
    layout.codings[name] = coding
    return name


def last_axis(layout: Layout, op: Op) -> None:
    """An operation over the last axis."""
    order = layout.order(op.inputs[0])
    if order[-1] != len(order) - 1:
        order = identity(layout, op.inputs[0])
    layout.emit(op, [layout.source(op.inputs[0], order)], order)


RULES: dict[str, Rule] = {
    "quantize": elementwise,
    "dequantize": elementwise,
    "table": elementwise,
    "clip": elementwise,
    "requantize": elementwise,
    "rescale": elementwise,
    "constant": _constant,
    "add": binary,
    "mul": binary,
    "conv": _conv,
    "linear": _linear,
    "matmul": in_order,
    "avg_pool": _avg_pool,
    "global_avg_pool": _global_avg_pool,
    "pad": _pad,
    "concat": _concat,
    "softmax": last_axis,
    "leaky_relu": elementwise,
    "hard_swish": elementwise,
    "aten.max_pool1d.default": max_pool,
    "aten.max_pool2d.default": max_pool,
}
__all__ = [
    "RULES",
    "Rule",
    "binary",
    "elementwise",
    "emit_image",
    "identity",
    "image",
    "in_order",
    "key",
    "last_axis",
]
