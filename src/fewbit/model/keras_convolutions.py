"""Dense, convolutional and pooling layers of Keras, with TensorFlow's padding, as PyTorch layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.errors import ModelError
from fewbit.model.keras_functions import activate
from fewbit.model.keras_layout import Assembly, Order, Value
from fewbit.model.keras_weights import parameters, tensor

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Pads = list[tuple[int, int]]


def channel_axis(layer: Any) -> int:
    """Where Keras has the channels of a layer with a data format."""
    return 1 if layer.data_format == "channels_first" else -1


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pads:
    """TensorFlow's "same": as many outputs as strides begin in the input, the odd zero at the far end."""
    pads = []
    for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        pads.append((total // 2, total - total // 2))
    return pads


def dense(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """A product along the last axis."""
    x = b.as_keras(x, path)
    weight = tensor(layer.kernel).t()
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.use_bias)
    node = b.module(path, lambda: parameters(made, layer, weight=weight, bias=layer.bias), x.node)
    return activate(b, layer.activation, path, x.same(node))


def conv(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Conv1D, 2D, 3D; "causal" pads in front of the sequence only."""
    y = _convolved(b, layer, path, x, _kernel(tensor(layer.kernel)), layer.groups, layer.bias)
    return activate(b, layer.activation, path, y)


def depthwise_conv(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    weight = _depthwise(tensor(layer.kernel))
    y = _convolved(b, layer, path, x, weight, layer.kernel.shape[-2], layer.bias)
    return activate(b, layer.activation, path, y)


def separable_conv(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """A depthwise convolution and one over single points."""
    weight, groups = _depthwise(tensor(layer.depthwise_kernel)), layer.depthwise_kernel.shape[-2]
    middle = _convolved(b, layer, f"{path}.depthwise", x, weight, groups, None)
    points = _kernel(tensor(layer.pointwise_kernel))
    node = b.module(f"{path}.pointwise", lambda: _convolution(layer, points, 1, layer.bias), middle.node)
    return activate(b, layer.activation, path, middle.same(node))


def conv_transpose(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Keras crops what "same" does not keep, the odd row at the far end; PyTorch crops both ends alike."""
    x = b.channels_second(x, path, channel_axis(layer))
    weight = _kernel(tensor(layer.kernel))
    kernel, stride, dilation = tuple(weight.shape[2:]), tuple(layer.strides), tuple(layer.dilation_rate)
    crops = _crops(layer, kernel)
    padding = tuple(start for start, _ in crops)
    more = tuple(max(0, start - end) for start, end in crops)
    if any(m >= max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)):
        raise ModelError(
            f"{path}: output_padding={layer.output_padding} is as long as the stride {stride}: expected less, "
            "as PyTorch's transposed convolutions take it; use ZeroPadding behind the layer instead"
        )
    node = b.module(path, lambda: parameters(
        TRANSPOSED[len(stride) - 1](weight.shape[0], weight.shape[1], kernel, stride=stride, dilation=dilation,
                                    padding=padding, output_padding=more, bias=layer.use_bias),
        layer, weight=weight, bias=layer.bias), x.node)  # fmt: skip
    for dim, (start, end) in enumerate(crops, 2):
        if end > start:
            node = b.function(f"{path}.crop", crop, node, dim, 0, end - start)
    return activate(b, layer.activation, path, x.same(node))


def _crops(layer: Any, kernel: tuple[int, ...]) -> Pads:
    """What Keras keeps of the full transposed convolution: cut off at the start, and at the end where positive."""
    given, crops = layer.output_padding, []
    for i, (k, s, d) in enumerate(zip(kernel, layer.strides, layer.dilation_rate, strict=True)):
        k = (k - 1) * d + 1
        extra = given if given is None or isinstance(given, int) else given[i]
        if layer.padding == "valid":
            crops.append((0, -(max(k, s) - k if extra is None else extra)))
        else:
            total = k - s if extra is None else k - k % 2 - extra
            start = max(0, total // 2)
            crops.append((start, total - start))
    return crops


def crop(x: Tensor, dim: int, start: int, end: int) -> Tensor:
    """Less at both ends of one dimension."""
    kept = slice(start, -end if end else None)
    return x[(*[slice(None)] * dim, kept)]


def max_pool(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    x = b.channels_second(x, path, channel_axis(layer))
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.rank - 3]
    return x.same(_pooled(b, layer, path, function, x))


def average_pool(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """Padding does not count, except that Keras on PyTorch repeats the edge where "same" is uneven."""
    x = b.channels_second(x, path, channel_axis(layer))
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.rank - 3]
    kernel, stride = _window(layer)
    pads = same_pads(x.stored[2:], kernel, stride, [1] * len(kernel)) if layer.padding == "same" else []
    if b.backend == "torch" and any(start != end for start, end in pads):
        b.notes.append(
            f"{path}: average pooling with uneven 'same' padding repeats the edge, as Keras does on PyTorch; "
            "on TensorFlow and JAX the edge is left out of the average"
        )
        padded = b.function(f"{path}.pad", F.pad, x.node, _flat(pads), mode="replicate")
        return x.same(b.function(path, function, padded, kernel, stride))
    return x.same(_pooled(b, layer, path, function, x, count_include_pad=False))


def _pooled(b: Assembly, layer: Any, path: str, function: Any, x: Value, **counted: bool) -> Any:
    """Pooling with "same" padding that no number fills: windows are cut off at the edge."""
    kernel, stride = _window(layer)
    if layer.padding != "same":
        return b.function(path, function, x.node, kernel, stride)
    pads = same_pads(x.stored[2:], kernel, stride, [1] * len(kernel))
    if not any(end for _, end in pads):
        return b.function(path, function, x.node, kernel, stride)
    # A stride of one has no room for rounding up: both ends get the longer pad, and the first window is dropped.
    late = [start != end and s == 1 for (start, end), s in zip(pads, stride, strict=True)]
    padding = tuple(end if drop else start for (start, end), drop in zip(pads, late, strict=True))
    rounded = any(start != end and not drop for (start, end), drop in zip(pads, late, strict=True))
    counted = counted if any(padding) or rounded else {}
    node = b.function(path, function, x.node, kernel, stride, padding, ceil_mode=rounded, **counted)
    for dim, drop in enumerate(late, 2):
        if drop:
            node = b.function(f"{path}.crop", crop, node, dim, 1, 0)
    return node


def global_pool(b: Assembly, layer: Any, path: str, x: Value) -> Value:
    """One number a channel; with ``keepdims`` the picture stays, one point large."""
    channel = channel_axis(layer) % x.rank
    axes = [axis for axis in range(1, x.rank) if axis != channel]
    dims = sorted(x.dim(axis) for axis in axes)
    reduce = torch.amax if "Max" in type(layer).__name__ else torch.mean
    node = b.function(path, reduce, x.node, dims, keepdim=layer.keepdims)
    order: Order = x.order if layer.keepdims else (0, 1)
    return Value(node, order)


def _convolved(b: Assembly, layer: Any, path: str, x: Value, weight: Tensor, groups: int, bias: Any) -> Value:
    x = b.channels_second(x, path, channel_axis(layer))
    kernel, stride, dilation = tuple(weight.shape[2:]), tuple(layer.strides), tuple(layer.dilation_rate)
    pads: Pads = [(0, 0)] * len(kernel)
    if layer.padding == "same":
        pads = same_pads(x.stored[2:], kernel, stride, dilation)
    elif layer.padding == "causal":
        pads = [((kernel[0] - 1) * dilation[0], 0)]
    even = tuple(min(pair) for pair in pads)
    uneven = [(start - e, end - e) for (start, end), e in zip(pads, even, strict=True)]
    node = x.node
    if any(start or end for start, end in uneven):
        node = b.function(f"{path}.pad", F.pad, node, _flat(uneven))
    return x.same(b.module(path, lambda: _convolution(layer, weight, groups, bias, even), node))


def _convolution(layer: Any, weight: Tensor, groups: int, bias: Any, padding: Any = None) -> nn.Module:
    """A convolution of one step over single points, or, with ``padding``, of the layer's own steps."""
    steps = (
        {} if padding is None else {"stride": tuple(layer.strides), "dilation": tuple(layer.dilation_rate)}
    )
    cls = CONVOLUTIONS[weight.dim() - 3]
    made = cls(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups,
               bias=bias is not None, padding=padding or 0, **steps)  # fmt: skip
    return parameters(made, layer, weight=weight, bias=bias)


def _kernel(kernel: Tensor) -> Tensor:
    """[places, in, out] as [out, in, places]; for a transposed convolution [places, out, in] as [in, out, places]."""
    rank = kernel.dim()
    return kernel.permute(rank - 1, rank - 2, *range(rank - 2))


def _depthwise(kernel: Tensor) -> Tensor:
    """[places, in, multiplier] as [in * multiplier, 1, places]."""
    rank = kernel.dim()
    return kernel.permute(rank - 2, rank - 1, *range(rank - 2)).flatten(0, 1).unsqueeze(1)


def _window(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    def each(value: Any) -> tuple[int, ...]:
        dims = int(type(layer).__name__[-2])
        return (value,) * dims if isinstance(value, int) else tuple(value)

    return each(layer.pool_size), each(layer.strides or layer.pool_size)


def _flat(pads: Pads) -> list[int]:
    """Pads as ``F.pad`` wants them: the last dimension first."""
    return [side for pair in reversed(pads) for side in pair]
