"""Sliding windows, as convolutions and pooling have them in ONNX: strides, dilations and padding of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.model.onnx_build import Operand
from fewbit.model.onnx_call import Call

Rule = Callable[[Call], Any]
_MAX = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_AVERAGE = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_ADAPTIVE = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class Window:
    """One number for each dimension it slides over. `same` is auto_pad where the padding depends on free sizes."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    same: str = ""

    @property
    def flat(self) -> list[int]:
        """The padding as torch's pad wants it: last dimension first."""
        pairs = list(zip(self.begins, self.ends, strict=True))
        return [side for pair in reversed(pairs) for side in pair]


def window_of(c: Call, kernel: tuple[int, ...], output: bool = False) -> Window:
    """The window of a node, auto_pad resolved; `output` for a transposed convolution."""
    n = len(kernel)
    strides = _numbers(c, "strides", n, 1)
    dilations = _numbers(c, "dilations", n, 1)
    pads = _numbers(c, "pads", 2 * n, 0, least=0)
    declared = _numbers(c, "kernel_shape", n, 1) if c.attr("kernel_shape") else tuple(kernel)
    if declared != tuple(kernel) or c.rank(0) != n + 2:
        raise c.error(
            f"kernel_shape {list(declared)} over an input of {c.rank(0)} dimensions: expected {list(kernel)}"
        )
    window = Window(tuple(kernel), strides, dilations, pads[:n], pads[n:])
    auto = str(c.attr("auto_pad", "NOTSET"))
    sizes = c.shape(0)[2:]
    if output:
        return _output_window(c, window, auto, sizes)
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return replace(window, begins=(0,) * n, ends=(0,) * n) if auto == "VALID" else window
    if c.builder.free_sizes and any(s > 1 for s in strides):
        return replace(window, begins=(0,) * n, ends=(0,) * n, same=auto)
    totals = [_total(*values) for values in zip(sizes, kernel, strides, dilations, strict=True)]
    return _shared_out(window, totals, auto)


def _numbers(c: Call, name: str, count: int, default: int, least: int = 1) -> tuple[int, ...]:
    found = c.attr(name) or [default] * count
    if len(found) != count or any(not isinstance(v, int) or v < least or v >= 2**31 for v in found):
        raise c.error(f"{name} {found}: expected {count} numbers of at least {least}")
    return tuple(found)


def _total(size: Any, kernel: int, stride: int, dilation: int) -> Any:
    """Padding of both sides together such that the output has ceil(size / stride) places."""
    span = (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size
    return max(0, span) if isinstance(span, int) else torch.sym_max(0, span)


def _shared_out(window: Window, totals: list[int], auto: str) -> Window:
    less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    begins, ends = (less, more) if auto == "SAME_UPPER" else (more, less)
    return replace(window, begins=begins, ends=ends)


def _output_window(c: Call, window: Window, auto: str, sizes: tuple[int, ...]) -> Window:
    """The padding of a transposed convolution that gives `output_shape`, or stride times the size."""
    n = len(window.kernel)
    wanted = c.attr("output_shape")
    if wanted is None and auto in ("NOTSET", ""):
        return window
    if wanted is None and auto == "VALID":
        return replace(window, begins=(0,) * n, ends=(0,) * n)
    if wanted is not None and c.builder.free_sizes:
        raise c.error("output_shape together with free sizes of inputs: expected pads")
    more = c.attr("output_padding") or [0] * n
    goal = list(wanted)[-n:] if wanted else [s * w for s, w in zip(sizes, window.strides, strict=True)]
    totals = [
        s * (size - 1) + o + d * (k - 1) + 1 - g
        for s, size, o, d, k, g in zip(
            window.strides, sizes, more, window.dilations, window.kernel, goal, strict=True
        )
    ]
    if any(t < 0 for t in totals):
        raise c.error(f"output_shape {list(goal)} is larger than the layer's result: expected less")
    return _shared_out(window, totals, "SAME_UPPER" if auto == "SAME_UPPER" else "SAME_LOWER")


def padded(
    c: Call, x: Operand, window: Window, value: float = 0.0, least: bool = False
) -> tuple[Operand, tuple[int, ...]]:
    """The input, and the padding that is left to the layer: a pad of its own only where it is uneven.

    `least`: torch's pooling pads at most half a window.
    """
    if window.same:
        same: dict[str, Any] = {
            "kernel": window.kernel,
            "strides": window.strides,
            "dilations": window.dilations,
        }
        padding = c.apply(
            _same_padded, x, value=value, upper=window.same == "SAME_UPPER", suffix="pad", **same
        )
        return padding, (0,) * len(window.kernel)
    fits = not least or all(2 * b <= k for b, k in zip(window.begins, window.kernel, strict=True))
    if window.begins == window.ends and fits:
        return x, window.begins
    return c.apply(F.pad, x, pad=window.flat, value=value, suffix="pad"), (0,) * len(window.kernel)


def _same_padded(
    x: Tensor, *, kernel: Any, strides: Any, dilations: Any, value: float, upper: bool
) -> Tensor:
    totals = [_total(*v) for v in zip(x.shape[2:], kernel, strides, dilations, strict=True)]
    pads: list[Any] = []
    for total in reversed(totals):
        half, rest = total // 2, total - total // 2
        pads += [half, rest] if upper else [rest, half]
    return F.pad(x, pads, value=value)


# ---- pooling ----------------------------------------------------------------------------------------------


def _kernel(c: Call) -> tuple[int, ...]:
    kernel = c.attr("kernel_shape")
    if not kernel or c.rank(0) not in _MAX or len(kernel) != c.rank(0) - 2:
        raise c.error(f"kernel_shape {kernel} over an input of {c.rank(0)} dimensions: expected 3 to 5")
    return tuple(kernel)


def _max_pool(c: Call) -> Any:
    if any(c.uses(o) for o in c.node.outputs[1:]):
        raise c.error("its indices are used: expected the maxima only")
    window = window_of(c, _kernel(c))
    x, padding = padded(c, c[0], window, -math.inf, least=True)
    return c.apply(
        _MAX[c.rank(0)], x, kernel_size=window.kernel, stride=window.strides, padding=padding,
        dilation=window.dilations, ceil_mode=bool(c.attr("ceil_mode", 0)),
    )  # fmt: skip


def _average_pool(c: Call) -> Any:
    window = window_of(c, _kernel(c))
    if any(d != 1 for d in window.dilations):
        raise c.error(f"dilations {list(window.dilations)}: expected none")
    ceil, counted = bool(c.attr("ceil_mode", 0)), bool(c.attr("count_include_pad", 0))
    settings: dict[str, Any] = {"kernel_size": window.kernel, "stride": window.strides, "ceil_mode": ceil}
    even = window.begins == window.ends and not window.same
    if even and all(2 * b <= k for b, k in zip(window.begins, window.kernel, strict=True)):
        return c.apply(
            _AVERAGE[c.rank(0)], c[0], padding=window.begins, count_include_pad=counted, **settings
        )
    if counted:
        return c.apply(_AVERAGE[c.rank(0)], padded(c, c[0], window, 0.0, least=True)[0], **settings)
    sums = c.apply(_AVERAGE[c.rank(0)], padded(c, c[0], window, least=True)[0], **settings, suffix="mean")
    ones = c.apply(_ones, c[0], suffix="ones")
    share = c.apply(_AVERAGE[c.rank(0)], padded(c, ones, window, least=True)[0], **settings, suffix="share")
    return c.apply(torch.div, sums, share)


def _ones(x: Tensor) -> Tensor:
    return torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)


def _global_average(c: Call) -> Any:
    rank = c.rank(0)
    if rank in _ADAPTIVE:
        return c.apply(_ADAPTIVE[rank], c[0], output_size=1)
    return c.apply(torch.mean, c[0], dim=tuple(range(2, rank)), keepdim=True)


def _global_max(c: Call) -> Any:
    return c.apply(torch.amax, c[0], dim=tuple(range(2, c.rank(0))), keepdim=True)


RULES: dict[str, Rule] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
}
