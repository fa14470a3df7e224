"""What is known about the operators of the standard form, as one table: names, roles and axes."""

from __future__ import annotations

import operator as python
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from fewbit.model.graph import module_of

Role = Literal["compute", "shares", "activation", "table", "float"]
aten = torch.ops.aten


@dataclass(frozen=True)
class Operator:
    """One row: what an operator is called and how numbers pass through it.

    ``role``: "compute" has an output scale of its own; "shares" moves or selects numbers of its first
    argument, so the output has its codes' scale; "activation" is a clamp around zero, which can join the
    operator in front of it; "table" is a function of one number (256 entries at 8 bits); "float" has no
    integer form. ``weight_axis``: axis of the weight that runs along its output channels (embedding: along
    its rows); None without weights. ``channel_axis``: axis of the output that runs along those channels;
    None where there is no such axis.
    """

    name: str
    role: Role
    weight_axis: int | None = None
    channel_axis: int | None = None


def operator(node: fx.Node, gm: fx.GraphModule) -> Operator | None:
    """The row of a node; None for placeholders, get_attr, the output and operators that the table does not
    know.
    """
    if node.op == "call_module":
        return MODULES.get(type(module_of(node, gm)))  # type: ignore[arg-type]
    if node.op != "call_function":
        return None
    if node.target in ADAPTIVE_AVERAGE:
        sizes: Any = node.args[1]
        return GLOBAL_AVERAGE if all(size == 1 for size in sizes) else FUNCTIONS[node.target]
    return FUNCTIONS.get(node.target)


GLOBAL_AVERAGE = Operator("global_avg_pool", "compute", None, 1)
ADAPTIVE_AVERAGE = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)

MODULES: dict[type[nn.Module], Operator] = {
    nn.Conv1d: Operator("conv", "compute", 0, 1),
    nn.Conv2d: Operator("conv", "compute", 0, 1),
    nn.Conv3d: Operator("conv", "compute", 0, 1),
    nn.ConvTranspose1d: Operator("conv_transpose", "compute", 1, 1),
    nn.ConvTranspose2d: Operator("conv_transpose", "compute", 1, 1),
    nn.ConvTranspose3d: Operator("conv_transpose", "compute", 1, 1),
    nn.Linear: Operator("linear", "compute", 0, -1),
    nn.Embedding: Operator("embedding", "float", 0, -1),
    nn.LSTM: Operator("lstm", "float", 0, -1),
    nn.GRU: Operator("gru", "float", 0, -1),
    nn.RNN: Operator("rnn", "float", 0, -1),
    nn.BatchNorm1d: Operator("batch_norm", "float", None, 1),
    nn.BatchNorm2d: Operator("batch_norm", "float", None, 1),
    nn.BatchNorm3d: Operator("batch_norm", "float", None, 1),
    nn.InstanceNorm1d: Operator("instance_norm", "float", None, 1),
    nn.InstanceNorm2d: Operator("instance_norm", "float", None, 1),
    nn.InstanceNorm3d: Operator("instance_norm", "float", None, 1),
    nn.GroupNorm: Operator("group_norm", "float", None, 1),
    nn.LayerNorm: Operator("layer_norm", "float", None, -1),
    nn.RMSNorm: Operator("rms_norm", "float", None, -1),
    nn.PReLU: Operator("prelu", "float", None, 1),
    nn.Dropout: Operator("dropout", "shares"),
    nn.Dropout1d: Operator("dropout", "shares"),
    nn.Dropout2d: Operator("dropout", "shares"),
    nn.Dropout3d: Operator("dropout", "shares"),
    nn.AlphaDropout: Operator("dropout", "shares"),
    nn.FeatureAlphaDropout: Operator("dropout", "shares"),
}


def _rows(
    name: str, role: Role, targets: Iterable[Any], channel_axis: int | None = None
) -> dict[Any, Operator]:
    return dict.fromkeys(targets, Operator(name, role, None, channel_axis))


def _unary(*names: str) -> dict[Any, Operator]:
    return {getattr(aten, name).default: Operator(name, "table") for name in names}


FUNCTIONS: dict[Any, Operator] = {
    # products and sums
    **_rows("matmul", "compute", [aten.matmul.default]),
    **_rows("einsum", "float", [aten.einsum.default]),
    **_rows("sdpa", "float", [aten.scaled_dot_product_attention.default]),
    **_rows("conv", "float", [aten.conv1d.default, aten.conv2d.default, aten.conv3d.default], 1),
    **_rows("linear", "float", [aten.linear.default], -1),
    **_rows("add", "compute", [aten.add.Tensor]),
    **_rows("sub", "compute", [aten.sub.Tensor]),
    **_rows("mul", "compute", [aten.mul.Tensor]),
    **_rows("div", "compute", [aten.div.Tensor]),
    **_rows("cat", "compute", [aten.cat.default]),
    # pooling and reductions
    **_rows("max_pool", "shares", [aten.max_pool1d.default, aten.max_pool2d.default,
            aten.max_pool3d.default], 1),
    **_rows("max_pool", "shares", [aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default,
            aten.adaptive_max_pool3d.default], 1),
    **_rows("avg_pool", "compute", [aten.avg_pool1d.default, aten.avg_pool2d.default,
            aten.avg_pool3d.default], 1),
    **_rows("adaptive_avg_pool", "compute", ADAPTIVE_AVERAGE, 1),
    **_rows("mean", "compute", [aten.mean.dim, aten.mean.default]),
    **_rows("sum", "float", [aten.sum.dim_IntList, aten.sum.default]),
    **_rows("max", "shares", [aten.amax.default, aten.amin.default]),
    # clamps
    **_rows("relu", "activation", [aten.relu.default]),
    **_rows("relu6", "activation", [aten.relu6.default]),
    **_rows("hardtanh", "activation", [aten.hardtanh.default]),
    **_rows("clamp", "activation", [aten.clamp.default]),
    # functions of one number
    **_unary("hardswish", "hardsigmoid", "silu", "gelu", "elu", "celu", "selu", "mish", "softplus",
             "log_sigmoid", "sigmoid", "tanh", "leaky_relu", "threshold", "hardshrink", "softshrink", "exp",
             "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "sign", "square",
             "sin", "cos", "erf", "floor", "ceil", "round"),
    **_rows("pow", "table", [aten.pow.Tensor_Scalar]),
    # over an axis
    **_rows("softmax", "compute", [aten.softmax.int]),
    **_rows("log_softmax", "float", [aten.log_softmax.int]),
    **_rows("glu", "float", [aten.glu.default]),
    **_rows("cumsum", "float", [aten.cumsum.default]),
    **_rows("var", "float", [aten.var.dim, aten.var.correction]),
    **_rows("argmax", "float", [aten.argmax.default, aten.argmin.default]),
    # numbers moved, repeated or selected
    **_rows("reshape", "shares", [aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default,
            aten.squeeze.dims]),
    **_rows("transpose", "shares", [aten.transpose.int, aten.permute.default]),
    **_rows("slice", "shares", [aten.slice.Tensor, aten.select.int, aten.index_select.default]),
    **_rows("split", "shares", [aten.split_with_sizes.default, python.getitem]),
    **_rows("repeat", "shares", [aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int]),
    **_rows("flip", "shares", [aten.flip.default, aten.roll.default]),
    **_rows("pixel_shuffle", "shares", [aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
            aten.channel_shuffle.default]),
    **_rows("pad", "compute", [aten.pad.default]),
    **_rows("interpolate", "shares", [aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec,
            aten.upsample_nearest3d.vec], 1),
    **_rows("interpolate", "float", [aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec,
            aten.upsample_trilinear3d.vec, aten.upsample_bicubic2d.vec], 1),
    # numbers chosen by other numbers, types, shapes
    **_rows("where", "float", [aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor]),
    **_rows("index", "float", [aten.index.Tensor, aten.gather.default]),
    **_rows("cast", "float", [aten.to.dtype]),
    **_rows("size", "float", [aten.sym_size.int, python.add, python.sub, python.mul, python.floordiv]),
}  # fmt: skip
