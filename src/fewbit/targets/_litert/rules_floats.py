"""How float operations become the runtime's over stored tensors: axes follow the order in which a value is stored."""

import dataclasses
from typing import Any

from fewbit.errors import TargetError
from fewbit.model.program import Op
from fewbit.numerics.scheme import Scheme
from fewbit.targets._litert.floats_windows import paddings, per_dim
from fewbit.targets._litert.layout import NHWC, FixedBatch, Layout, key
from fewbit.targets._litert.moves import MOVES
from fewbit.targets._litert.rules import (
    RULES,
    Rule,
    binary,
    elementwise,
    emit_image,
    identity,
    image,
    in_order,
    pad_attrs,
    same_padding,
)

_UNPACKED = (
    "LiteRT unpacks 4-bit weights for float inputs with slow kernels; with activations='dynamic' it reads them as "
    "they are"
)

# ---- axes -----------------------------------------------------------------------------------------------------------


def _changed(op: Op, at: int, value: Any) -> dict[str, Any]:
    """The attributes with another positional argument."""
    args = list(op.attrs["args"])
    args[at] = value
    return op.attrs | {"args": args}


def _along(layout: Layout, op: Op) -> None:
    """Something done along one axis, in any order: a sum of the numbers before, a reversal."""
    name, axis = op.inputs[0], op.attrs["args"][1]
    order = layout.order(name)
    axes = [order.index(a % len(order)) for a in (axis if isinstance(axis, list) else [axis])]
    attrs = _changed(op, 1, axes if isinstance(axis, list) else axes[0])
    layout.emit(op, [layout.source(name, order)], order, attrs=attrs)


def _reduce(layout: Layout, op: Op) -> None:
    """Over axes wherever they are stored; what is left keeps its order."""
    name, args = op.inputs[0], op.attrs["args"]
    order = layout.order(name)
    listed = isinstance(args[1], list)
    axes = sorted(a % len(order) for a in (args[1] if listed else [args[1]]))
    stored = [order.index(a) for a in axes]
    attrs = _changed(op, 1, stored if listed else stored[0])
    keep = len(args) > 2 and bool(args[2])
    if not keep:
        kept = [a for a in order if a not in axes]
        order = tuple(sorted(kept).index(a) for a in kept)
    layout.emit(op, [layout.where[name][0]], order, attrs=attrs)


def _last_axis(layout: Layout, op: Op) -> None:
    """Over an axis that must be stored last."""
    name = op.inputs[0]
    order = layout.order(name)
    axis = int(op.attrs["args"][1]) % len(order)
    if order[-1] != axis:
        order = (*(a for a in order if a != axis), axis)
    layout.emit(op, [layout.source(name, order)], order, attrs=_changed(op, 1, -1))


def _topk(layout: Layout, op: Op) -> None:
    """Two results, each taken by an operation of its own."""
    args = op.attrs["args"]
    rank = layout.rank(op.inputs[0])
    if op.attrs["kwargs"] or (len(args) > 3 and not args[3]):
        raise TargetError(f"{op.layer or op.node}: LiteRT finds the largest numbers, not the smallest")
    axis = (int(args[2]) if len(args) > 2 else -1) % rank
    order = (*(a for a in range(rank) if a != axis), axis)
    attrs = op.attrs | {"args": [args[0], args[1], -1]}
    layout.ops.append(dataclasses.replace(op, inputs=[layout.source(op.inputs[0], order)], attrs=attrs))
    layout.where[op.output] = (op.output, order)


def _getitem(layout: Layout, op: Op) -> None:
    source = next((o for o in reversed(layout.ops) if o.output == op.inputs[0]), None)
    if source is None or key(source) != "aten.topk.default":
        MOVES["getitem"](layout, op)
    else:
        layout.emit(op, list(op.inputs), layout.order(op.inputs[0]))


def _cat(layout: Layout, op: Op) -> None:
    """In the order of the first operand that is computed; parts of length 0 are left out."""
    rank = layout.rank(op.output)
    args = op.attrs["args"]
    names = [op.inputs[part["$"]] for part in args[0]]
    names = [n for n in names if 0 not in layout.sizes.shape[n] or len(args[0]) == 1]
    axis = (int(args[1]) if len(args) > 1 else 0) % rank
    if axis in layout.sizes.free[op.output]:
        raise FixedBatch
    order = next((layout.order(n) for n in names if layout.where[n][0] not in layout.constants), None)
    order = order or identity(layout, op.output)
    inputs = [layout.source(n, order) for n in names]
    unique = list(dict.fromkeys(inputs))
    attrs = op.attrs | {"args": [[{"$": unique.index(i)} for i in inputs], order.index(axis)]}
    wide = {a for n in names for a in layout.sizes.free[n]}
    missing = [n for n in names if layout.sizes.free[n] != wide]
    if missing:
        raise FixedBatch  # a constant part would have to be repeated for each sample
    layout.emit(op, unique, order, attrs=attrs)


def _index_select(layout: Layout, op: Op) -> None:
    name = op.inputs[0]
    order = layout.order(name)
    axis = int(op.attrs["args"][1]) % len(order)
    attrs = _changed(op, 1, order.index(axis))
    layout.emit(op, [layout.where[name][0], layout.source(op.inputs[1])], order, attrs=attrs)


def _broadcast(layout: Layout, op: Op) -> None:
    """Operands that broadcast; one of them may be named twice."""
    binary(layout, op)


def _product(layout: Layout, op: Op) -> None:
    """Matrices as they are stored where only the two last axes are exchanged: the equation says so."""
    names = [op.inputs[part["$"]] for part in op.attrs["args"][1]]
    letters = ["...ij", "...kj" if "kj" in op.attrs["args"][0] else "...jk"]
    inputs = []
    for i, name in enumerate(names):
        order = layout.order(name)
        rank = len(order)
        if i == 1 and order == (*range(rank - 2), rank - 1, rank - 2):
            inputs.append(layout.source(name, order))
            letters[i] = f"...{letters[i][-1]}{letters[i][-2]}"
        else:
            inputs.append(layout.source(name))
    unique = list(dict.fromkeys(inputs))
    args = [f"{letters[0]},{letters[1]}->...ik", [{"$": unique.index(n)} for n in inputs]]
    layout.emit(op, unique, identity(layout, op.output), attrs=op.attrs | {"args": args})


# ---- layers ---------------------------------------------------------------------------------------------------------


def _linear(layout: Layout, op: Op) -> None:
    """Features last, everything else as it is."""
    stored = op.attrs.get("schemes", {}).get("weight")
    if (
        stored is not None
        and Scheme.from_json(stored).spec.integer
        and Scheme.from_json(stored).spec.bits <= 4
    ):
        op = dataclasses.replace(op, note=_UNPACKED)
    name = op.inputs[0]
    order = layout.order(name)
    if order[-1] != len(order) - 1:
        order = identity(layout, name)
    layout.emit(op, [layout.source(name, order)], order)


def _convolution(layout: Layout, op: Op) -> None:
    """On images; a row of numbers is an image one high. Padding that is not the runtime's own is a step before."""
    config = dict(op.attrs["config"])
    op = dataclasses.replace(op, attrs=op.attrs | {"config": config})
    dims = layout.rank(op.inputs[0]) - 2
    if dims == 1:
        op = _one_high(op)
        config = op.attrs["config"]
    kernel, stride, dilation = (per_dim(config[k], 2) for k in ("kernel_size", "stride", "dilation"))
    source = image(layout, op.inputs[0])
    pads = paddings(config["padding"], kernel, dilation)
    sizes = [s or 0 for s in layout.stored[source][1:3]]
    same = [same_padding(*numbers) for numbers in zip(sizes, kernel, stride, dilation, strict=True)]
    if any(n for pair in pads for n in pair):
        if pads != same:
            source = added(layout, op, source, pads)
            config["padding"] = 0
    else:
        config["padding"] = 0
    emit_image(layout, op, source, attrs=op.attrs)


def _dynamic(layout: Layout, op: Op) -> None:
    """LiteRT gives each row of a matrix, and each image, a range of its own."""
    op = dataclasses.replace(op, attrs=op.attrs | {"rows": True})
    if op.kind == "dynamic_linear":
        _linear(layout, op)
    else:
        RULES["conv"](layout, op)


def _one_high(op: Op) -> Op:
    """A one-dimensional layer as the two-dimensional one that it is."""
    config = dict(op.attrs["config"])
    for name, one in (
        ("kernel_size", 1),
        ("stride", 1),
        ("dilation", 1),
        ("padding", 0),
        ("output_padding", 0),
    ):
        if name in config and not isinstance(config[name], str):
            config[name] = [one, *per_dim(config[name], 1)]
    constants = {k: v.unsqueeze(2) if k == "weight" else v for k, v in op.constants.items()}
    shapes = {k: [*v[:2], 1, *v[2:]] for k, v in op.attrs.get("shapes", {}).items()}
    attrs = op.attrs | {"type": op.attrs["type"].replace("1d", "2d"), "config": config, "shapes": shapes}
    return dataclasses.replace(op, attrs=attrs, constants=constants)


def added(layout: Layout, op: Op, source: str, pads: list[tuple[int, int]], value: float = 0.0) -> str:
    """A stored image with one number around it."""
    n, h, w, c = layout.stored[source]
    assert h is not None and w is not None
    name = f"{op.output}_padded"
    flat = [0, 0, *pads[1], *pads[0]]
    layout.ops.append(Op("pad", "float", op.layer, f"{op.node}_pad", [source], name, pad_attrs(flat, value)))
    layout.stored[name] = (n, h + sum(pads[0]), w + sum(pads[1]), c)
    return name


def _transposed(layout: Layout, op: Op) -> None:
    """LiteRT's operator crops as its padding SAME does, or not at all: the rest is cut off by slices."""
    if layout.rank(op.inputs[0]) == 3:
        op = _one_high(op)
    config = dict(op.attrs["config"])
    source = image(layout, op.inputs[0])
    if layout.stored[source][0] is None:
        raise FixedBatch  # the operator is told its output's sizes, the batch among them
    kernel, stride, dilation, pads, extra = (
        per_dim(config[k], 2) for k in ("kernel_size", "stride", "dilation", "padding", "output_padding")
    )
    sizes = [int(s or 0) for s in layout.stored[source][1:3]]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    whole = [(n - 1) * s + r for n, s, r in zip(sizes, stride, reach, strict=True)]
    wanted = [w - 2 * p + e for w, p, e in zip(whole, pads, extra, strict=True)]
    crops = [same_padding(w, r, s, 1) for w, r, s in zip(wanted, reach, stride, strict=True)]
    like_same = all(
        crop == (p, p - e) and -(-w // s) == n
        for crop, p, e, w, s, n in zip(crops, pads, extra, wanted, stride, sizes, strict=True)
    )
    if like_same or (not any(pads) and not any(extra)):
        emit_image(layout, op, source)
        return
    room = [max(e - p, 0) for e, p in zip(extra, pads, strict=True)]
    config |= {"padding": [0, 0], "output_padding": room}
    _cropped(layout, op, source, config, [w + r for w, r in zip(whole, room, strict=True)], pads, wanted)


def _cropped(
    layout: Layout,
    op: Op,
    source: str,
    config: dict[str, Any],
    whole: list[int],
    pads: list[int],
    wanted: list[int],
) -> None:
    channels = config["out_channels"]
    batch = layout.stored[source][0]
    name = f"{op.output}_whole"
    layout.ops.append(
        dataclasses.replace(
            op, inputs=[source], output=name, attrs=op.attrs | {"config": config, "layout": "NHWC"}
        )
    )
    shape = [batch, *whole, channels]
    layout.stored[name] = tuple(shape)
    for i in range(2):
        if whole[i] != wanted[i]:
            shape[1 + i] = wanted[i]
            args = [1 + i, pads[i], pads[i] + wanted[i], 1]
            name = layout.emit_shares(
                "aten.slice.Tensor", name, args, f"{op.output}_cut{i}", tuple(shape), op
            )
    if layout.rank(op.output) == 4:
        layout.alias(op, name, NHWC)
    else:
        row = layout.reshape(name, (batch, wanted[1], channels), f"{op.output}_row", op)
        layout.alias(op, row, (0, 2, 1))


def _embedding(layout: Layout, op: Op) -> None:
    in_order(layout, op)


# ---- images ---------------------------------------------------------------------------------------------------------


def _avg_pool(layout: Layout, op: Op) -> None:
    rank, args = layout.rank(op.inputs[0]), op.attrs["args"]
    kernel, stride = (_high(v, rank) for v in (args[1], args[2] if len(args) > 2 and args[2] else args[1]))
    attrs = {"target": "aten.avg_pool2d.default", "args": [{"$": 0}, kernel, stride], "kwargs": {}}
    emit_image(layout, op, image(layout, op.inputs[0]), attrs=attrs, kind="aten.avg_pool2d.default")


def _high(value: Any, rank: int) -> list[int]:
    return [1, *per_dim(value, 1)] if rank == 3 else per_dim(value, 2)


def _pad(layout: Layout, op: Op) -> None:
    """The amounts, listed from the last axis on, in the order of storage."""
    name, args = op.inputs[0], op.attrs["args"]
    order = layout.order(name)
    rank = len(order)
    if args[2] == "reflect":
        _mirrored(layout, op)
        return
    flat = [*args[1], *[0] * (2 * rank - len(args[1]))]
    pairs = [flat[2 * (rank - 1 - a) : 2 * (rank - a)] for a in range(rank)]
    grown = {a for a in range(rank) if any(pairs[a])}
    if grown & layout.sizes.free[name]:
        raise FixedBatch
    turned = [n for a in reversed(order) for n in pairs[a]]
    layout.emit(op, [layout.where[name][0]], order, attrs=_changed(op, 1, turned))


def _mirrored(layout: Layout, op: Op) -> None:
    """In an order in which torch can do it too: the program's own, or an image with channels last."""
    if layout.order(op.inputs[0]) == NHWC:
        emit_image(layout, op, layout.source(op.inputs[0], NHWC))
    else:
        in_order(layout, op)


def _bilinear(layout: Layout, op: Op) -> None:
    size = list(layout.sizes.shape[op.output][2:])
    args = [{"$": 0}, size, bool(op.attrs["args"][2]), None]
    emit_image(layout, op, image(layout, op.inputs[0]), attrs=op.attrs | {"args": args, "kwargs": {}})


_ANY = (
    "relu relu6 hardtanh sigmoid tanh gelu hardswish leaky_relu exp log sqrt rsqrt abs neg sign square sin cos "
    "floor logical_not clamp_min clamp_max"
)
_TWO = "maximum minimum atan2 logical_and logical_or floor_divide"

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

FLOAT_RULES: dict[str, Rule] = {
    **{f"aten.{name}.default": elementwise for name in _ANY.split()},
    "aten.to.dtype": elementwise,
    **{f"aten.{name}.default": binary for name in _TWO.split()},
    **{f"aten.{name}.Tensor": binary for name in ("add", "sub", "mul", "div", "remainder", *_COMPARISONS)},
    **{f"aten.{name}.Scalar": elementwise for name in _COMPARISONS},
    "aten.pow.Tensor_Tensor": binary,
    "aten.div.Tensor_mode": binary,
    "aten.where.self": binary,
    "aten.mean.dim": _reduce,
    "aten.sum.dim_IntList": _reduce,
    "aten.amax.default": _reduce,
    "aten.amin.default": _reduce,
    "aten.prod.dim_int": _reduce,
    "aten.argmax.default": _reduce,
    "aten.argmin.default": _reduce,
    "aten.softmax.int": _last_axis,
    "aten.log_softmax.int": _last_axis,
    "aten.topk.default": _topk,
    "getitem": _getitem,
    "aten.cumsum.default": _along,
    "aten.flip.default": _along,
    "aten.cat.default": _cat,
    "aten.index_select.default": _index_select,
    "aten.gather.default": in_order,
    "aten.einsum.default": _product,
    "dynamic_linear": _dynamic,
    "dynamic_conv": _dynamic,
    "module.Linear": _linear,
    "module.Conv1d": _convolution,
    "module.Conv2d": _convolution,
    "module.ConvTranspose1d": _transposed,
    "module.ConvTranspose2d": _transposed,
    "module.Embedding": _embedding,
    "aten.avg_pool1d.default": _avg_pool,
    "aten.avg_pool2d.default": _avg_pool,
    "aten.pad.default": _pad,
    "aten.upsample_bilinear2d.vec": _bilinear,
}
