"""Convolutions with unusual padding, pooling, padding and interpolation, in terms of LiteRT's operators."""

import math
from typing import Any

import torch
from torch import Tensor

from fewbit.model.program import aten
from fewbit.numerics.scheme import Scheme
from fewbit.targets._litert.expand import Call, Expand, Value
from fewbit.targets._litert.floats_products import linear, product


def per_dim(value: Any, dims: int) -> list[int]:
    """One number for each dimension."""
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * dims if len(values) == 1 else values


# ---- convolutions ---------------------------------------------------------------------------------------------------


def _convolution(dims: int) -> Expand:
    """Reflected, repeated or circular borders are added first; a missing batch for the time of the layer."""

    def expand(c: Call) -> Value | None:
        if c.x.rank == dims + 1:
            return _alone(c, dims)
        mode = c.get("padding_mode", "zeros")
        if mode == "zeros":
            return None
        kernel, dilation = (per_dim(c[k], dims) for k in ("kernel_size", "dilation"))
        flat = [n for lo, hi in reversed(paddings(c["padding"], kernel, dilation)) for n in (lo, hi)]
        padded = border(c, c.x, flat, mode)
        assert padded is not None
        config = c.op.attrs["config"] | {"padding": 0, "padding_mode": "zeros"}
        return c.again(inputs=[padded.name], attrs=c.op.attrs | {"config": config, "args": [{"$": 0}]})

    return expand


def _alone(c: Call, dims: int) -> Value:
    """A layer on one sample without a batch axis."""
    x = c("unsqueeze.default", c.x, 0)
    shape = (1, *c.shape)
    attrs = c.op.attrs | {"args": [{"$": 0}]}
    with_batch = c.again(inputs=[x.name], attrs=attrs, shape=shape)
    return c("squeeze.dims", with_batch, [0])


def _dynamic_depthwise(c: Call) -> Value | None:
    """LiteRT's mixed kernel for one channel at a time is slower than float: the codes are read as float weights."""
    codes, scale = c.constants["weight"], c.constants["weight_scale"]
    groups, channels, dims = c["groups"], c.x.shape[1], codes.dim() - 2
    if groups != channels or groups == 1:
        return None
    flat = list(c["pad"])
    x = c("pad.default", c.x, flat, "constant", 0.0) if any(flat) and flat[0::2] != flat[1::2] else c.x
    padding = flat[0::2][::-1] if x is c.x and flat else [0] * dims
    config = {
        "in_channels": channels, "out_channels": codes.shape[0], "kernel_size": list(codes.shape[2:]),
        "stride": c["stride"], "padding": padding, "dilation": c["dilation"], "groups": groups,
        "bias": "bias" in c.constants, "padding_mode": "zeros",
    }  # fmt: skip
    scheme = Scheme("int8", "channel").to_json()
    parts = {
        "weight": codes,
        "weight::scale": scale,
        "weight::zero_point": torch.zeros_like(scale, dtype=torch.int32),
    }
    parts |= {name: c.constants[name] for name in ("bias",) if name in c.constants}
    attrs = {"type": f"Conv{dims}d", "config": config, "args": [{"$": 0}], "schemes": {"weight": scheme},
             "shapes": {"weight": list(codes.shape)}, "shape": list(x.shape)}  # fmt: skip
    note = "LiteRT's depthwise kernel with a dynamic range is slower than float: computed in float"
    return c.again(kind="module", inputs=[x.name], attrs=attrs, constants=parts, note=note)


def paddings(padding: Any, kernel: list[int], dilation: list[int]) -> list[tuple[int, int]]:
    """What a convolution adds before and after each axis."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in per_dim(padding, len(kernel))]


# ---- padding --------------------------------------------------------------------------------------------------------


def _pad(c: Call) -> Value | None:
    mode = c.get("mode", "constant")
    flat = [int(p) for p in c["pad"]]
    if mode != "constant":
        return border(c, c.x, flat, mode)
    x = c.x
    for i in range(0, len(flat), 2):  # a negative amount cuts off
        axis, low, high = x.rank - 1 - i // 2, min(flat[i], 0), min(flat[i + 1], 0)
        if low or high:
            x = c("slice.Tensor", x, axis, -low, x.shape[axis] + high, 1)
    flat = [max(p, 0) for p in flat]
    value = c.get("value", 0)
    if x is c.x and len(c.op.attrs["args"]) == 4 and c.op.attrs["target"] == "aten.pad.default":
        return None
    return c("pad.default", x, flat, "constant", float(value)) if any(flat) else x


def border(c: Call, x: Value, flat: list[int], mode: str) -> Value | None:
    """An image with borders taken from itself: amounts from the last axis on, as torch has them. None: as it is."""
    if mode == "reflect":
        if len(c.op.attrs["args"]) == 3 and x is c.x and c.op.attrs["target"] == "aten.pad.default":
            return None
        return c("pad.default", x, flat, "reflect")
    for i in range(0, len(flat), 2):
        axis, before, after = x.rank - 1 - i // 2, flat[i], flat[i + 1]
        size = x.shape[axis]

        def part(start: int, end: int, axis: int = axis, x: Value = x) -> Value:
            return c("slice.Tensor", x, axis, start, end, 1)

        if mode == "circular":
            parts = [part(size - before, size)] * bool(before) + [x] + [part(0, after)] * bool(after)
        else:
            parts = [part(0, 1)] * before + [x] + [part(size - 1, size)] * after
        x = c("cat.default", parts, axis) if len(parts) > 1 else x
    return x


# ---- pooling --------------------------------------------------------------------------------------------------------


def _window(c: Call, dims: int) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Kernel, stride, and the padding of each axis with the room that ceil mode's last windows need."""
    kernel = per_dim(c["kernel_size"], dims)
    stride = per_dim(c["stride"] or kernel, dims)
    dilation, pads = per_dim(c.get("dilation", 1), dims), []
    for i, p in enumerate(per_dim(c["padding"], dims)):
        reach = dilation[i] * (kernel[i] - 1) + 1
        size, out = c.x.shape[i - dims], c.shape[i - dims]
        pads.append((p, max((out - 1) * stride[i] + reach - size - p, p if not c["ceil_mode"] else 0)))
    return kernel, stride, pads


def _flat(pads: list[tuple[int, int]]) -> list[int]:
    return [n for lo, hi in reversed(pads) for n in (lo, hi)]


def _max_pool(dims: int) -> Expand:
    def expand(c: Call) -> Value | None:
        if c.x.rank == dims + 1:
            return _pooled_alone(c)
        kernel, stride, pads = _window(c, dims)
        if any(d != 1 for d in per_dim(c["dilation"], dims)):
            return _dilated(c, dims, kernel, stride, pads)
        if not c["ceil_mode"] or c.op.domain == "shares":
            return None
        padded = c("pad.default", c.x, _flat(pads), "constant", -math.inf)
        return c(f"max_pool{dims}d.default", padded, kernel, stride)

    return expand


def _dilated(c: Call, dims: int, kernel: list[int], stride: list[int], pads: list[tuple[int, int]]) -> Value:
    """The largest of shifted copies, one for each place in the kernel, axis by axis."""
    dilation = per_dim(c["dilation"], dims)
    x = c("pad.default", c.x, _flat(pads), "constant", -math.inf)
    for i in range(dims):
        axis, out = x.rank - dims + i, c.shape[i - dims]
        span = (out - 1) * stride[i] + 1
        starts = [k * dilation[i] for k in range(kernel[i])]
        parts = [c("slice.Tensor", x, axis, s, s + span, stride[i]) for s in starts]
        x = parts[0]
        for part in parts[1:]:
            x = c("maximum.default", x, part)
    return x


def _pooled_alone(c: Call) -> Value:
    alone = c("unsqueeze.default", c.x, 0)
    rest = c.args[1:]
    name = c.op.attrs["target"].removeprefix("aten.")
    return c("squeeze.dims", c(name, alone, *rest), [0])


def _avg_pool(dims: int) -> Expand:
    """Zeros around, a mean over whole windows, and a factor for each place where torch divides by less."""

    def expand(c: Call) -> Value | None:
        if c.x.rank == dims + 1:
            return _pooled_alone(c)
        kernel, stride, pads = _window(c, dims)
        divisor = c.get("divisor_override")
        if dims < 3 and not any(_flat(pads)) and divisor is None:
            plain = len(c.op.attrs["args"]) == 3 and not c.op.attrs["kwargs"]
            return None if plain else c(f"avg_pool{dims}d.default", c.x, kernel, stride)
        if dims == 3:
            raise c.error("average pooling of 3-d images has no operation in LiteRT")
        x = c("pad.default", c.x, _flat(pads), "constant", 0.0) if any(_flat(pads)) else c.x
        mean = c(f"avg_pool{dims}d.default", x, kernel, stride)
        factor = _factor(c, dims, kernel, stride, pads)
        return mean if bool((factor == 1).all()) else c("mul.Tensor", mean, c.constant(factor))

    return expand


def _factor(c: Call, dims: int, kernel: list[int], stride: list[int], pads: list[tuple[int, int]]) -> Tensor:
    """Torch's mean of ones, which counts as torch does, over the mean of ones with zeros around."""
    pool = aten(c.op.attrs["target"])
    ones = torch.ones(1, 1, *c.x.shape[-dims:])
    wanted = pool(ones, *c.args[1:])
    found = pool(torch.nn.functional.pad(ones, _flat(pads)), kernel, stride)
    factor = wanted / found
    return factor.round() if bool(((factor - factor.round()).abs() < 1e-6).all()) else factor


def _adaptive(dims: int, name: str) -> Expand:
    def expand(c: Call) -> Any:
        result = _adapted(c, dims, name)
        return [result] if name == "max" else result

    return expand


def _adapted(c: Call, dims: int, name: str) -> Value:
    sizes = c.x.shape[-dims:]
    goals = [s if w is None else int(w) for s, w in zip(sizes, _wanted(c["output_size"], dims), strict=True)]
    axes = list(range(c.x.rank - dims, c.x.rank))
    reduce = "mean.dim" if name == "avg" else "amax.default"
    if all(g == 1 for g in goals):
        return c(reduce, c.x, axes, True)
    if dims < 3 and c.x.rank == dims + 2 and all(s % g == 0 for s, g in zip(sizes, goals, strict=True)):
        kernel = [s // g for s, g in zip(sizes, goals, strict=True)]
        return c(f"{name}_pool{dims}d.default", c.x, kernel, kernel)
    x = c.x  # windows of unequal sizes, but each axis by itself: a mean of means over a rectangle is its mean
    for axis, size, goal in zip(axes, sizes, goals, strict=True):
        if size == goal:
            continue
        bounds = [(size * i // goal, -(-size * (i + 1) // goal)) for i in range(goal)]
        parts = [c(reduce, c("slice.Tensor", x, axis, lo, hi, 1), [axis], True) for lo, hi in bounds]
        x = c("cat.default", parts, axis)
    return x


def _wanted(value: Any, dims: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * dims if len(values) == 1 else values


# ---- interpolation --------------------------------------------------------------------------------------------------


def _nearest(dims: int, exact: bool = False) -> Expand:
    """By whole factors pixels are repeated; else they are chosen by the very indices that torch takes."""

    def expand(c: Call) -> Value | None:
        before, after = c.x.shape[2:], c.shape[2:]
        if not exact and dims < 3 and not any(a % b for a, b in zip(after, before, strict=True)):
            return None
        factors = c.get("scale_factors") or [None] * dims
        x = c.x
        for i in range(dims):
            if before[i] == after[i]:
                continue
            line = torch.arange(before[i], dtype=torch.float32).reshape(1, 1, -1)
            size, factor = ([after[i]], None) if factors[i] is None else (None, [factors[i]])
            pick = torch.ops.aten._upsample_nearest_exact1d if exact else torch.ops.aten.upsample_nearest1d
            chosen = pick.vec(line, size, factor).long().flatten()
            x = c("index_select.default", x, i + 2, c.constant(chosen.to(torch.int32)))
        return x

    return expand


def _interpolated(dims: int) -> Expand:
    """LiteRT's bilinear operator where it computes the same; else a matrix for each axis."""

    def expand(c: Call) -> Value | None:
        before, after = c.x.shape[2:], c.shape[2:]
        name = c.op.attrs["target"]
        factors = c.get("scale_factors")
        whole = factors is None or all(b * f == a for b, a, f in zip(before, after, factors, strict=True))
        if name == "aten.upsample_bilinear2d.vec" and whole and not (c["align_corners"] and 1 in after):
            return None
        x = c.x
        for i in range(dims):
            if before[i] != after[i] or "aa" in name:
                matrix = _matrix(c, dims, i)
                x = product(c, c.constant(matrix), x) if i == dims - 2 else _last(c, x, 2 + i, matrix)
        return x

    return expand


def _last(c: Call, x: Value, axis: int, matrix: Tensor) -> Value:
    """A matrix applied along an axis."""
    if axis == x.rank - 1:
        return linear(c, x, matrix)
    turned = c("transpose.int", x, axis, x.rank - 1)
    return c("transpose.int", linear(c, turned, matrix), axis, x.rank - 1)


def _matrix(c: Call, dims: int, axis: int) -> Tensor:
    """Interpolation along one axis as a matrix [out, in]: what torch makes of each unit vector.

    The other axes have two numbers: torch takes an image of width 1 for one with channels last.
    """
    size, goal = c.x.shape[2 + axis], c.shape[2 + axis]
    shape, wanted = [2] * dims, [2] * dims
    shape[axis], wanted[axis] = size, goal
    units = torch.eye(size).reshape(1, size, *(size if i == axis else 1 for i in range(dims)))
    factors = c.get("scale_factors")
    scales = None if factors is None else [factors[i] if i == axis else 1.0 for i in range(dims)]
    result: Tensor = aten(c.op.attrs["target"])(
        units.expand(1, size, *shape).contiguous(),
        wanted if scales is None else None,
        c["align_corners"],
        scales,
    )
    return result.movedim(2 + axis, 2).reshape(size, goal, -1)[:, :, 0].t().contiguous()


WINDOWS: dict[str, Expand] = {
    "dynamic_conv": _dynamic_depthwise,
    **{f"module.Conv{n}d": _convolution(n) for n in (1, 2)},
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    **{f"aten.max_pool{n}d.default": _max_pool(n) for n in (1, 2)},
    **{f"aten.avg_pool{n}d.default": _avg_pool(n) for n in (1, 2)},
    **{f"aten.adaptive_avg_pool{n}d.default": _adaptive(n, "avg") for n in (1, 2, 3)},
    **{f"aten.adaptive_max_pool{n}d.default": _adaptive(n, "max") for n in (1, 2, 3)},
    **{f"aten.upsample_nearest{n}d.vec": _nearest(n) for n in (1, 2, 3)},
    **{f"aten._upsample_nearest_exact{n}d.vec": _nearest(n, exact=True) for n in (1, 2, 3)},
    "aten.upsample_linear1d.vec": _interpolated(1),
    "aten.upsample_bilinear2d.vec": _interpolated(2),
    "aten.upsample_trilinear3d.vec": _interpolated(3),
    "aten.upsample_bicubic2d.vec": _interpolated(2),
    "aten._upsample_bilinear2d_aa.vec": _interpolated(2),
    "aten._upsample_bicubic2d_aa.vec": _interpolated(2),
}
