"""Pooling, padding and interpolation as ONNX nodes; maximum pooling and nearest neighbours work on codes as well."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fewbit.targets.onnx.floats_call import END, Call, Rule, Value


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
    return {"kernel": kernel, "stride": _per_dim(c["stride"] or kernel, dims), "padding": _per_dim(c["padding"], dims),
            "dilation": dilation, "reach": [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]}  # fmt: skip


def _ceiling(c: Call, dims: int, w: dict[str, list[int]]) -> tuple[list[int], list[int]] | None:
    """Output sizes in torch's ceil mode, and what must be padded at the end to get them; None where a size is free."""
    sizes = c.known(c["self"], range(-dims, 0))
    if sizes is None:
        return None
    outputs, extra = [], []
    for size, reach, stride, pad in zip(sizes, w["reach"], w["stride"], w["padding"], strict=True):
        count = -(-(size + 2 * pad - reach) // stride) + 1
        if (count - 1) * stride >= size + pad:  # torch drops a window that begins behind the input
            count -= 1
        outputs.append(count)
        extra.append(max((count - 1) * stride + reach - size - pad, pad))
    return outputs, extra


def _max_pool(dims: int) -> Rule:
    def rule(c: Call) -> str:
        w = _window(c, dims)
        begins, ends, mode = w["padding"], w["padding"], int(c["ceil_mode"])
        if mode and (found := _ceiling(c, dims, w)) is not None:
            ends, mode = found[1], 0
        attrs = {"kernel_shape": w["kernel"], "strides": w["stride"], "dilations": w["dilation"]}
        return _with_batch(
            c, dims, lambda x: c.node("MaxPool", [x], pads=[*begins, *ends], ceil_mode=mode, **attrs)
        )  # fmt: skip

    return rule


def _avg_pool(dims: int) -> Rule:
    def rule(c: Call) -> str:
        w = _window(c, dims)
        ceil, divisor = int(c["ceil_mode"]), c.get("divisor_override")
        attrs = {"kernel_shape": w["kernel"], "strides": w["stride"]}
        found = _ceiling(c, dims, w) if ceil else None
        if found is not None:
            return _with_batch(c, dims, lambda x: _weighted(c, dims, w, x, found[1]))
        include = int(c["count_include_pad"])
        if divisor is None:
            return _with_batch(
                c, dims, lambda x: c.node("AveragePool", [x], pads=w["padding"] * 2, count_include_pad=include,
                                          ceil_mode=ceil, **attrs)
            )  # fmt: skip
        factor = c.constant(math.prod(w["kernel"]) / divisor)
        return _with_batch(
            c, dims, lambda x: c.node("Mul", [
                c.node("AveragePool", [x], pads=w["padding"] * 2, count_include_pad=1, ceil_mode=ceil, **attrs), factor])
        )  # fmt: skip

    return rule


def _weighted(c: Call, dims: int, w: dict[str, list[int]], x: str, extra: list[int]) -> str:
    """Means over zero-padded windows, times what each window's own divisor makes of them (known when writing)."""
    axes = list(range(2, dims + 2))
    if any(w["padding"] + extra):
        x = c.node("Pad", [x, c.vector(w["padding"] + extra), c.constant(0.0), c.vector(axes)])
    mean = c.node("AveragePool", [x], kernel_shape=w["kernel"], strides=w["stride"])
    sizes = c.known(c["self"], range(-dims, 0)) or []
    ones = torch.ones(1, 1, *sizes)
    pool = {1: torch.nn.functional.avg_pool1d, 2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}[dims]
    options = {"divisor_override": c["divisor_override"]} if c.get("divisor_override") is not None else {}
    torchs = pool(ones, w["kernel"], w["stride"], w["padding"], True, c["count_include_pad"], **options)
    padded = torch.nn.functional.pad(ones, [p for pair in zip(w["padding"][::-1], extra[::-1], strict=True) for p in pair])
    ours = pool(padded, w["kernel"], w["stride"])
    return c.node("Mul", [mean, c.constant((torchs / ours).numpy())])


def _adaptive(dims: int, name: str, several: bool = False) -> Rule:
    def rule(c: Call) -> Any:
        wanted = _per_dim(c["output_size"], dims)
        result = _with_batch(c, dims, lambda x: _adaptive_body(c, dims, name, wanted, x))
        return [result] if several else result

    return rule


def _adaptive_body(c: Call, dims: int, name: str, wanted: list[int | None], x: str) -> str:
    axes = list(range(2, dims + 2))
    if all(w == 1 for w in wanted):
        return c.node(f"Reduce{name}", [x, c.vector(axes)], keepdims=1)
    sizes = c.known(c["self"], range(-dims, 0))
    if sizes is None:
        raise c.error(f"output size {wanted} of an input whose own size is free")
    goals = [s if w is None else w for s, w in zip(sizes, wanted, strict=True)]
    if all(s % g == 0 for s, g in zip(sizes, goals, strict=True)):
        kernel = [s // g for s, g in zip(sizes, goals, strict=True)]
        return c.node("MaxPool" if name == "Max" else "AveragePool", [x], kernel_shape=kernel, strides=kernel)
    # windows of unequal sizes, but each axis by itself: a mean of means over a rectangle is its mean
    for axis, size, goal in zip(axes, sizes, goals, strict=True):
        if size != goal:
            x = _uneven(c, x, axis, size, goal, name)
    return x


def _uneven(c: Call, x: str, axis: int, size: int, goal: int, name: str) -> str:
    along, parts = c.vector([axis]), []
    for i in range(goal):
        begin, end = i * size // goal, -(-(i + 1) * size // goal)
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


# ---- interpolation -------------------------------------------------------------------------------------------------


def _nearest(dims: int) -> Rule:
    """Whole factors are a Resize; others are gathered by the very indices that torch takes, where sizes are known."""

    def rule(c: Call) -> str:
        x = c["input"]
        factors = c.get("scale_factors")
        if factors and all(float(f).is_integer() for f in factors):
            scales = c.constant([1.0, 1.0, *factors])
            return c.node("Resize", [x, "", scales], mode="nearest", **_FLOOR)
        sizes = c.known(x, range(-dims, 0))
        if sizes is None:
            inputs = [x, *_goal(c, x, dims)]
            return c.node("Resize", inputs, mode="nearest", **_FLOOR)
        name = x.name
        for i in range(dims):
            goal = c["output_size"][i] if c["output_size"] is not None else math.floor(sizes[i] * factors[i])
            step = np.float32(1 / factors[i]) if factors else np.float32(sizes[i]) / np.float32(goal)
            chosen = np.minimum(np.floor(np.arange(goal, dtype=np.float32) * step), sizes[i] - 1)
            name = c.node("Gather", [name, c.constant(chosen, "int64")], axis=i + 2)
        return name

    return rule


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
        attrs |= {"antialias": 1} if antialias else {}
        return c.node("Resize", [x, *_goal(c, x, dims)], mode=mode, coordinate_transformation_mode=where, **attrs)

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
