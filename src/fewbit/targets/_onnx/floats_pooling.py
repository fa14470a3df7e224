"""Pooling, padding and interpolation as ONNX nodes; maxima and nearest neighbours work on codes as well."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fewbit.targets._onnx.floats_call import END, TYPES, Call, Rule, Value


def _per_dim(value: Any, dims: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * dims if len(values) == 1 else values


def _with_batch(c: Call, dims: int, emit: Callable[[str], str]) -> str:
    """Torch lets the batch dimension be missing; ONNX does not."""
    x = c["self"]
    if c.rank(x) == dims + 2:
        return emit(x.name)
    return c.node("Squeeze", [emit(c.node("Unsqueeze", [x, c.vector([0])])), c.vector([0])])


def _window(c: Call, dims: int) -> dict[str, list[int]]:
    kernel = _per_dim(c["kernel_size"], dims)
    dilation = _per_dim(c.get("dilation", 1), dims)
    return {
        "kernel": kernel,
        "stride": _per_dim(c["stride"] or kernel, dims),
        "padding": _per_dim(c["padding"], dims),
        "dilation": dilation,
        "reach": [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)],
    }


def _steps(c: Call, dims: int, w: dict[str, list[int]]) -> list[Any]:
    """Steps to each axis' last window in ceil mode: torch drops windows that begin behind the input."""
    found = []
    for i, (reach, stride, pad) in enumerate(zip(w["reach"], w["stride"], w["padding"], strict=True)):
        size = c.size(c["self"], i - dims)
        steps = c.quotient(c.sum(size, 2 * pad - reach + stride - 1), stride)
        found.append(c.smallest(steps, c.quotient(c.sum(size, pad - 1), stride)))
    return found


def _overhang(c: Call, dims: int, w: dict[str, list[int]]) -> list[Any]:
    """Padding at each axis' end that makes room for the last window."""
    extra = []
    for i, steps in enumerate(_steps(c, dims, w)):
        reached = c.sum(c.product(steps, w["stride"][i]), w["reach"][i] - w["padding"][i])
        extra.append(c.largest(c.difference(reached, c.size(c["self"], i - dims)), w["padding"][i]))
    return extra


def _max_pool(dims: int) -> Rule:
    def rule(c: Call) -> str:
        w = _window(c, dims)
        attrs = {"kernel_shape": w["kernel"], "strides": w["stride"], "dilations": w["dilation"]}
        free = bool(c["ceil_mode"]) and c.known(c["self"], range(-dims, 0)) is None
        if free:
            return _with_batch(c, dims, lambda x: _ceiled(c, dims, w, x, attrs))
        ends = _overhang(c, dims, w) if c["ceil_mode"] else w["padding"]
        return _with_batch(c, dims, lambda x: c.node("MaxPool", [x], pads=[*w["padding"], *ends], **attrs))

    return rule


def _ceiled(c: Call, dims: int, w: dict[str, list[int]], x: str, attrs: dict[str, Any]) -> str:
    """ONNX's own ceil mode. Its shape inference counts the windows that torch drops: the Slice settles that."""
    result = c.node("MaxPool", [x], pads=w["padding"] * 2, ceil_mode=1, **attrs)
    ends = c.vector([c.sum(steps, 1) for steps in _steps(c, dims, w)])
    return c.node("Slice", [result, c.vector([0] * dims), ends, c.vector(range(2, dims + 2))])


def _avg_pool(dims: int) -> Rule:
    def rule(c: Call) -> str:
        w = _window(c, dims)
        attrs = {"kernel_shape": w["kernel"], "strides": w["stride"]}
        divisor, include = c.get("divisor_override"), int(c["count_include_pad"])
        if c["ceil_mode"]:
            return _with_batch(c, dims, lambda x: _weighted(c, dims, w, x))
        attrs["pads"] = w["padding"] * 2
        if divisor is None:
            return _with_batch(
                c, dims, lambda x: c.node("AveragePool", [x], count_include_pad=include, **attrs)
            )
        factor = c.constant(math.prod(w["kernel"]) / divisor)
        return _with_batch(
            c,
            dims,
            lambda x: c.node("Mul", [c.node("AveragePool", [x], count_include_pad=1, **attrs), factor]),
        )

    return rule


def _weighted(c: Call, dims: int, w: dict[str, list[int]], x: str) -> str:
    """Means over zero-padded windows, divided by the share of each window that counts."""
    axes, begins, extra = c.vector(range(2, dims + 2)), w["padding"], _overhang(c, dims, w)
    attrs = {"kernel_shape": w["kernel"], "strides": w["stride"]}

    def padded(value: str, first: list[Any], last: list[Any]) -> str:
        return c.node("Pad", [value, c.vector([*first, *last]), c.constant(0.0), axes])

    mean = c.node("AveragePool", [padded(x, begins, extra)], **attrs)
    if c.get("divisor_override") is not None:
        return c.node("Mul", [mean, c.constant(math.prod(w["kernel"]) / c["divisor_override"])])
    sizes = [c.size(c["self"], i - dims) for i in range(dims)]
    if c["count_include_pad"]:
        sizes = [c.sum(s, 2 * p) for s, p in zip(sizes, begins, strict=True)]
        begins, extra = [0] * dims, [c.difference(e, p) for e, p in zip(extra, w["padding"], strict=True)]
    ones = c.node("Expand", [c.constant(1.0), c.vector([1, 1, *sizes])])
    return c.node("Div", [mean, c.node("AveragePool", [padded(ones, begins, extra)], **attrs)])


def _adaptive(dims: int, name: str, several: bool = False) -> Rule:
    def rule(c: Call) -> Any:
        wanted: list[int | None] = [*_per_dim(c["output_size"], dims)]
        result = _with_batch(c, dims, lambda x: _adaptive_body(c, dims, name, wanted, x))
        return [result] if several else result

    return rule


def _adaptive_body(c: Call, dims: int, name: str, wanted: list[int | None], x: str) -> str:
    axes = list(range(2, dims + 2))
    if all(w == 1 for w in wanted):
        return c.node(f"Reduce{name}", [x, c.vector(axes)], keepdims=1)
    sizes = [c.size(c["self"], i - dims) for i in range(dims)]
    goals = [s if w is None else w for s, w in zip(sizes, wanted, strict=True)]
    if all(isinstance(s, int) and s % g == 0 for s, g in zip(sizes, goals, strict=True)):
        kernel = [s // g for s, g in zip(sizes, goals, strict=True)]
        return c.node("MaxPool" if name == "Max" else "AveragePool", [x], kernel_shape=kernel, strides=kernel)
    # windows of unequal sizes, but each axis by itself: a mean of means over a rectangle is its mean
    for axis, size, goal in zip(axes, sizes, wanted, strict=True):
        if goal is not None and size != goal:
            x = _uneven(c, x, axis, size, goal, name)
    return x


def _uneven(c: Call, x: str, axis: int, size: Any, goal: int, name: str) -> str:
    along, parts = c.vector([axis]), []
    for i in range(goal):
        begin = c.quotient(c.product(size, i), goal)
        end = c.quotient(c.sum(c.product(size, i + 1), goal - 1), goal)
        part = c.node("Slice", [x, c.vector([begin]), c.vector([end]), along])
        parts.append(c.node(f"Reduce{name}", [part, along], keepdims=1))
    return c.node("Concat", parts, axis=axis)


def _pad(c: Call) -> str:
    x, flat, mode = c["self"], c["pad"], c["mode"]
    axes = [-(i + 1) for i in range(len(flat) // 2)]
    begins, ends = list(flat[0::2]), list(flat[1::2])
    if mode == "circular":
        return _wrapped(c, x.name, axes, begins, ends)
    fill = c.cast(0 if c["value"] is None else c["value"], c.dtype) if mode == "constant" else ""
    name = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}[mode]
    return c.node("Pad", [x, c.vector(begins + ends), fill, c.vector(axes)], mode=name)


def _wrapped(c: Call, x: str, axes: list[int], begins: list[int], ends: list[int]) -> str:
    """Circular padding by slices: what the far end holds goes in front, and the other way round."""
    for axis, begin, end in zip(axes, begins, ends, strict=True):
        along, parts = c.vector([axis]), [x]
        if begin:
            parts.insert(0, c.node("Slice", [x, c.vector([-begin]), c.vector([END]), along]))
        if end:
            parts.append(c.node("Slice", [x, c.vector([0]), c.vector([end]), along]))
        x = c.node("Concat", parts, axis=axis) if len(parts) > 1 else x
    return x


# ---- interpolation ----


def _nearest(dims: int) -> Rule:
    """Whole factors are a Resize; others gather by the very indices that torch takes."""

    def rule(c: Call) -> str:
        x = c["input"]
        factors = c.get("scale_factors")
        if factors and all(float(f).is_integer() for f in factors):
            return c.node("Resize", [x, "", c.constant([1.0, 1.0, *factors])], mode="nearest", **_FLOOR)
        name = x.name
        for i in range(dims):
            goal = None if factors else c["output_size"][i]
            indices = _chosen(c, c.size(x, i + 2), goal, factors[i] if factors else None)
            name = c.node("Gather", [name, indices], axis=i + 2)
        return name

    return rule


def _chosen(c: Call, size: Any, goal: Any, factor: float | None) -> str:
    """Indices of the nearest neighbours along an axis: the floor of a float32 product."""
    if isinstance(size, int) and not isinstance(goal, Value):
        count = goal if factor is None else math.floor(size * factor)
        apart = np.float32(size) / np.float32(count) if factor is None else np.float32(1 / factor)
        chosen = np.minimum(np.floor(np.arange(count, dtype=np.float32) * apart), size - 1)
        return c.constant(chosen, "int64")
    length = c.node("Cast", [c.vector([size])], to=TYPES["float64"])
    if factor is not None:
        floor = c.node("Floor", [c.node("Mul", [length, c.constant([factor], "float64")])])
        goal = Value(c.node("Cast", [floor], to=TYPES["int64"]), "int64", (1,), size=True)
        step = c.constant(1 / factor)
    else:
        sides = [c.node("Cast", [c.vector([v])], to=TYPES["float32"]) for v in (size, goal)]
        step = c.node("Div", sides)
    end = c.node("Squeeze", [c.vector([goal])])
    places = c.node("Range", [c.constant(0, "int64"), end, c.constant(1, "int64")])
    floor = c.node("Floor", [c.node("Mul", [c.node("Cast", [places], to=TYPES["float32"]), step])])
    found = c.node("Cast", [floor], to=TYPES["int64"])
    return c.node("Min", [found, c.vector([c.difference(size, 1)])])


_FLOOR = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def _goal(c: Call, x: Value, dims: int) -> list[str]:
    """The last inputs of a Resize: (roi, scales, sizes), with one of the two left out."""
    if c.get("scale_factors"):
        return ["", c.constant([1.0, 1.0, *c["scale_factors"]])]
    return ["", "", c.vector([*(c.size(x, i) for i in range(2)), *c["output_size"]])]


def _linear(dims: int, mode: str, antialias: bool = False) -> Rule:
    def rule(c: Call) -> str:
        x = c["input"]
        where = "align_corners" if c["align_corners"] else "half_pixel"
        attrs: dict[str, Any] = {"cubic_coeff_a": -0.75} if mode == "cubic" else {}
        attrs |= {"antialias": 1, "exclude_outside": 1} if antialias else {}
        return c.node(
            "Resize", [x, *_goal(c, x, dims)], mode=mode, coordinate_transformation_mode=where, **attrs
        )

    return rule


RULES: dict[str, Rule] = {
    **{f"aten.max_pool{n}d.default": _max_pool(n) for n in (1, 2, 3)},
    **{f"aten.avg_pool{n}d.default": _avg_pool(n) for n in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{n}d.default": _adaptive(n, "Mean") for n in (1, 2, 3)},
    **{f"aten.adaptive_max_pool{n}d.default": _adaptive(n, "Max", several=True) for n in (1, 2, 3)},
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    **{f"aten.upsample_nearest{n}d.vec": _nearest(n) for n in (1, 2, 3)},
    "aten.upsample_linear1d.vec": _linear(1, "linear"),
    "aten.upsample_bilinear2d.vec": _linear(2, "linear"),
    "aten.upsample_trilinear3d.vec": _linear(3, "linear"),
    "aten.upsample_bicubic2d.vec": _linear(2, "cubic"),
    "aten._upsample_bilinear2d_aa.vec": _linear(2, "linear", antialias=True),
    "aten._upsample_bicubic2d_aa.vec": _linear(2, "cubic", antialias=True),
}
