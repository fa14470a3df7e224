"""The operators with parameters, as one table: which `nn` layer each becomes and from which of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fewbit.model.torch_convert import Bound, Converter

aten = torch.ops.aten
Builder = Callable[[Converter, fx.Node, Bound], Any]


def _per_dim(value: Any, dims: int) -> tuple[int, ...]:
    sizes = tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _convolution(cls: type[nn.Module], dims: int) -> Builder:
    transposed = "Transpose" in cls.__name__

    def build(c: Converter, node: fx.Node, a: Bound) -> Any:
        weight, bias = c.constant(a["weight"]), c.constant(a["bias"])
        if weight is None or (a["bias"] is not None and bias is None):
            return None
        x, padding = c.arg(a["input"]), a["padding"]
        stride, dilation = _per_dim(a["stride"], dims), _per_dim(a["dilation"], dims)
        kernel = tuple(weight.value.shape[2:])
        if isinstance(padding, str):
            x, padding = _same_padding(c, node, x, padding, kernel, dilation)
        sizes = weight.value.shape
        inputs, outputs = (sizes[0], sizes[1] * a["groups"]) if transposed else (sizes[1] * a["groups"], sizes[0])
        extra = {"output_padding": _per_dim(a["output_padding"], dims)} if transposed else {}
        return c.layer(node, cls, {"weight": weight, "bias": bias}, (x,), in_channels=inputs, out_channels=outputs,
                       kernel_size=kernel, stride=stride, padding=_per_dim(padding, dims), dilation=dilation,
                       groups=a["groups"], bias=bias is not None, **extra)  # fmt: skip

    return build


def _same_padding(c: Converter, node: fx.Node, x: Any, padding: str, kernel: Any, dilation: Any) -> tuple[Any, Any]:
    """Padding in numbers; an uneven "same" padding becomes a pad in front of the convolution."""
    totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, tuple(total // 2 for total in totals)
    pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return c.emit(aten.pad.default, (x, pads), node, final=False), (0,) * len(totals)


def _linear(c: Converter, node: fx.Node, a: Bound) -> Any:
    weight, bias = c.constant(a["weight"]), c.constant(a["bias"])
    if weight is None or weight.value.dim() != 2 or (a["bias"] is not None and bias is None):
        return None
    outputs, inputs = weight.value.shape
    return c.layer(node, nn.Linear, {"weight": weight, "bias": bias}, (c.arg(a["input"]),),
                   in_features=inputs, out_features=outputs, bias=bias is not None)  # fmt: skip


def _batch_norm(c: Converter, node: fx.Node, a: Bound) -> Any:
    weight, bias, mean, var = (c.constant(a[k]) for k in ("weight", "bias", "running_mean", "running_var"))
    rank = a["input"].meta["val"].dim()
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]
    owner = c.source.get_submodule(mean.name.rpartition(".")[0]) if mean and mean.name else None
    momentum = owner.momentum if isinstance(owner, nn.modules.batchnorm._BatchNorm) else a["momentum"]
    return c.layer(node, cls, {"weight": weight, "bias": bias}, (c.arg(a["input"]),),
                   {"running_mean": mean, "running_var": var}, num_features=a["input"].meta["val"].shape[1],
                   eps=a["eps"], momentum=momentum, affine=weight is not None,
                   track_running_stats=mean is not None)  # fmt: skip


def _dropout(cls: type[nn.Module]) -> Builder:
    def build(c: Converter, node: fx.Node, a: Bound) -> Any:
        # a dropout that is active in eval mode is part of what the model computes: it stays an operator
        return None if a["train"] else c.layer(node, cls, {}, (c.arg(a["input"]),), p=a["p"])

    return build


LAYERS: dict[Any, Builder] = {
    aten.conv1d.default: _convolution(nn.Conv1d, 1),
    aten.conv1d.padding: _convolution(nn.Conv1d, 1),
    aten.conv2d.default: _convolution(nn.Conv2d, 2),
    aten.conv2d.padding: _convolution(nn.Conv2d, 2),
    aten.conv3d.default: _convolution(nn.Conv3d, 3),
    aten.conv3d.padding: _convolution(nn.Conv3d, 3),
    aten.conv_transpose1d.default: _convolution(nn.ConvTranspose1d, 1),
    aten.conv_transpose2d.input: _convolution(nn.ConvTranspose2d, 2),
    aten.conv_transpose3d.input: _convolution(nn.ConvTranspose3d, 3),
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
    aten.dropout.default: _dropout(nn.Dropout),
    aten.feature_dropout.default: _dropout(nn.Dropout2d),
    aten.alpha_dropout.default: _dropout(nn.AlphaDropout),
    aten.feature_alpha_dropout.default: _dropout(nn.FeatureAlphaDropout),
}
