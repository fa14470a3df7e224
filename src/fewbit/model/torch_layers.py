"""The operators with parameters, as one table: which `nn` layer each becomes and from which of its
arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fewbit.model.torch_build import Constant, sizes
from fewbit.model.torch_convert import Bound, Converter

aten = torch.ops.aten
Rule = Callable[[Converter, fx.Node, Bound], Any]


def _per_dim(value: Any, dims: int) -> tuple[int, ...]:
    sizes = tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _constants(c: Converter, a: Bound, *names: str) -> list[Constant | None] | None:
    """The constants behind these arguments; None if one of them depends on the inputs."""
    found = [c.constant(a[name]) for name in names]
    return None if any(f is None and a[n] is not None for f, n in zip(found, names, strict=True)) else found


def _rank(old: Any) -> int:
    return int(old.meta["val"].dim())


def _convolution(cls: type[nn.Module], dims: int) -> Rule:
    transposed = "Transpose" in cls.__name__

    def build(c: Converter, node: fx.Node, a: Bound) -> Any:
        constants = _constants(c, a, "weight", "bias")
        if constants is None or constants[0] is None:
            return None
        weight, bias = constants[0], constants[1]
        x, padding = c.arg(a["input"]), a["padding"]
        stride, dilation = _per_dim(a["stride"], dims), _per_dim(a["dilation"], dims)
        shape = weight.value.shape
        if isinstance(padding, str):
            x, padding = _named_padding(c, node, x, padding, tuple(shape[2:]), dilation)
        many, few = shape[1] * a["groups"], shape[0]
        extra: Bound = {"output_padding": _per_dim(a["output_padding"], dims)} if transposed else {}
        return c.layer(
            node, cls, {"weight": weight, "bias": bias}, (x,),
            in_channels=few if transposed else many, out_channels=many if transposed else few,
            kernel_size=tuple(shape[2:]), stride=stride, padding=_per_dim(padding, dims), dilation=dilation,
            groups=a["groups"], bias=bias is not None, **extra,
        )  # fmt: skip

    return build


def _named_padding(c: Converter, node: fx.Node, x: Any, padding: str, kernel: Any, dilation: Any) -> Any:
    """Padding in numbers; an uneven "same" padding becomes a pad in front of the convolution."""
    totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, tuple(total // 2 for total in totals)
    pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return c.emit(aten.pad.default, (x, pads, "constant"), node, {"value": 0.0}, final=False), (0,) * len(
        totals
    )


def _dense(c: Converter, node: fx.Node, x: Any, weight: Constant, bias: Constant | None) -> fx.Node:
    outputs, inputs = weight.value.shape
    return c.layer(
        node, nn.Linear, {"weight": weight, "bias": bias}, (c.arg(x),),
        in_features=inputs, out_features=outputs, bias=bias is not None,
    )  # fmt: skip


def _linear(c: Converter, node: fx.Node, a: Bound) -> Any:
    constants = _constants(c, a, "weight", "bias")
    if constants is None or constants[0] is None or constants[0].value.dim() != 2:
        return None
    return _dense(c, node, a["input"], constants[0], constants[1])


def _product(c: Converter, node: fx.Node, a: Bound) -> Any:
    """x @ parameter is a linear layer, named after the parameter."""
    x, other = node.args[:2]
    weight = c.constant(other)
    if weight is None or not weight.trained or weight.value.dim() != 2 or c.constant(x) is not None:
        return None
    return _dense(c, node, x, c.transposed(weight), None)


def _addmm(c: Converter, node: fx.Node, a: Bound) -> Any:
    weight, bias = c.constant(a["mat2"]), c.constant(a["self"])
    if weight is None or bias is None or bias.value.dim() != 1 or a["alpha"] != 1 or a["beta"] != 1:
        return None
    return _dense(c, node, a["mat1"], c.transposed(weight), bias)


def _batch_norm(c: Converter, node: fx.Node, a: Bound) -> Any:
    constants = _constants(c, a, "weight", "bias", "running_mean", "running_var")
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(_rank(a["input"]))
    if constants is None or cls is None:
        return None
    weight, bias, mean, var = constants
    owner = _owner(c, mean)
    return c.layer(
        node, cls, {"weight": weight, "bias": bias}, (c.arg(a["input"]),),
        _statistics(node, owner, mean, var),
        num_features=sizes(a["input"].meta["val"])[1], eps=a["eps"],
        momentum=a["momentum"] if owner is None else owner.momentum,
        affine=weight is not None, track_running_stats=mean is not None,
    )  # fmt: skip


def _owner(c: Converter, mean: Constant | None) -> _NormBase | None:
    """The user's layer that keeps the running mean: only it knows a momentum of None."""
    path = mean.name.rpartition(".")[0] if mean and mean.name else None
    owner = c.source.get_submodule(path) if path else None
    return owner if isinstance(owner, _NormBase) else None


def _statistics(
    node: fx.Node, owner: _NormBase | None, mean: Constant | None, var: Constant | None
) -> dict[str, Constant | None]:
    counter = owner.num_batches_tracked if owner is not None else None
    counted = Constant(counter, "num_batches_tracked", None, node, False) if counter is not None else None
    return {"running_mean": mean, "running_var": var, "num_batches_tracked": counted}


def _instance_norm(c: Converter, node: fx.Node, a: Bound) -> Any:
    constants = _constants(c, a, "weight", "bias", "running_mean", "running_var")
    cls = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(_rank(a["input"]))
    channels = sizes(a["input"].meta["val"])[1]
    if constants is None or cls is None or not isinstance(channels, int):
        return None
    weight, bias, mean, var = constants
    return c.layer(
        node, cls, {"weight": weight, "bias": bias}, (c.arg(a["input"]),),
        _statistics(node, _owner(c, mean), mean, var), num_features=channels, eps=a["eps"],
        momentum=a["momentum"], affine=weight is not None, track_running_stats=mean is not None,
    )  # fmt: skip


def _layer_norm(c: Converter, node: fx.Node, a: Bound) -> Any:
    constants = _constants(c, a, "weight", "bias")
    shape = a["normalized_shape"]
    if constants is None or not all(isinstance(size, int) for size in shape):
        return None
    weight, bias = constants
    if weight is None and bias is not None:
        return None
    return c.layer(
        node, nn.LayerNorm, {"weight": weight, "bias": bias}, (c.arg(a["input"]),),
        normalized_shape=tuple(shape),
        eps=a["eps"], elementwise_affine=weight is not None, bias=bias is not None,
    )  # fmt: skip


def _rms_norm(c: Converter, node: fx.Node, a: Bound) -> Any:
    constants = _constants(c, a, "weight")
    if constants is None or not all(isinstance(size, int) for size in a["normalized_shape"]):
        return None
    return c.layer(
        node, nn.RMSNorm, {"weight": constants[0]}, (c.arg(a["input"]),),
        normalized_shape=tuple(a["normalized_shape"]), eps=a["eps"],
        elementwise_affine=constants[0] is not None,
    )  # fmt: skip


def _group_norm(c: Converter, node: fx.Node, a: Bound) -> Any:
    constants = _constants(c, a, "weight", "bias")
    channels = sizes(a["input"].meta["val"])[1]
    if constants is None or not isinstance(channels, int) or (constants[0] is None) != (constants[1] is None):
        return None
    weight, bias = constants
    return c.layer(
        node, nn.GroupNorm, {"weight": weight, "bias": bias}, (c.arg(a["input"]),),
        num_groups=a["num_groups"],
        num_channels=channels, eps=a["eps"], affine=weight is not None,
    )  # fmt: skip


def _embedding(c: Converter, node: fx.Node, a: Bound) -> Any:
    weight = c.constant(a["weight"])
    if weight is None or not weight.trained or c.constant(a["indices"]) is not None:
        return None
    rows, width = weight.value.shape
    padding = a["padding_idx"] if a["padding_idx"] >= 0 else None
    return c.layer(
        node, nn.Embedding, {"weight": weight}, (c.arg(a["indices"]),),
        num_embeddings=rows, embedding_dim=width,
        padding_idx=padding,
    )  # fmt: skip


def _prelu(c: Converter, node: fx.Node, a: Bound) -> Any:
    weight = c.constant(a["weight"])
    if weight is None:
        return None
    return c.layer(
        node, nn.PReLU, {"weight": weight}, (c.arg(a["self"]),), num_parameters=weight.value.numel()
    )


def _dropout(cls: type[nn.Module]) -> Rule:
    def build(c: Converter, node: fx.Node, a: Bound) -> Any:
        # a dropout that is active in eval mode is part of what the model computes: it stays an operator
        return None if a["train"] else c.layer(node, cls, {}, (c.arg(a["input"]),), p=a["p"])

    return build


def _recurrent(cls: type[nn.RNNBase], gates: int, **settings: Any) -> Rule:
    def build(c: Converter, node: fx.Node, a: Bound) -> Any:
        constants = [c.constant(p) for p in a["params"]]
        if any(constant is None for constant in constants):
            return None
        weights, shape = _recurrent_weights(constants, a, gates)
        x, states = c.arg(a["input"]), a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
        given = [] if all(_is_zero(c, s) for s in states) else [tuple(c.arg(s) for s in states)]
        if cls is not nn.LSTM:
            given = [g[0] for g in given]
        call = c.layer(
            node, cls, weights, (x, *given), num_layers=a["num_layers"], bias=a["has_biases"],
            batch_first=a["batch_first"], dropout=a["dropout"], bidirectional=a["bidirectional"],
            **shape, **settings,
        )  # fmt: skip
        values = node.meta["val"]
        call.meta["val"] = (values[0], tuple(values[1:]) if cls is nn.LSTM else values[1])
        sequence = _item(c, call, 0)
        state = _item(c, call, 1)
        return [sequence, *((_item(c, state, i) for i in range(2)) if cls is nn.LSTM else (state,))]

    return build


def _recurrent_weights(
    constants: list[Any], a: Bound, gates: int
) -> tuple[dict[str, Constant | None], Bound]:
    """The flat list of a recurrent layer's tensors under the names that `nn` gives them, and the layer's
    sizes.
    """
    kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * a["has_biases"]
    directions = ["", "_reverse"] if a["bidirectional"] else [""]
    cells = a["num_layers"] * len(directions)
    if len(constants) == cells * (len(kinds) + 1):
        kinds.append("weight_hr")
    names = [f"{k}_l{layer}{d}" for layer in range(a["num_layers"]) for d in directions for k in kinds]
    first, second = constants[0].value, constants[1].value
    shape = {"input_size": first.shape[1], "hidden_size": first.shape[0] // gates}
    if "weight_hr" in kinds:
        shape["proj_size"] = second.shape[1]
    return dict(zip(names, constants, strict=True)), shape


def _is_zero(c: Converter, state: Any) -> bool:
    """Whether an initial state is the one that the layer assumes when it is given none."""
    constant = c.constant(state)
    if constant is not None:
        return not constant.trained and isinstance(constant.value, Tensor) and not bool(constant.value.any())
    value = c.get(state)
    return isinstance(value, fx.Node) and value.target in (aten.zeros.default, aten.new_zeros.default)


def _item(c: Converter, source: fx.Node, index: int) -> fx.Node:
    node = c.graph.call_function(operator.getitem, (source, index))
    node.meta.update(val=source.meta["val"][index], layer=source.meta["layer"])
    if isinstance(node.meta["val"], Tensor):
        node.meta["dtype"] = node.meta["val"].dtype
    return node


LAYERS: dict[Any, Rule] = {
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
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.addmm.default: _addmm,
    aten.batch_norm.default: _batch_norm,
    aten.instance_norm.default: _instance_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.embedding.default: _embedding,
    aten.prelu.default: _prelu,
    aten.lstm.input: _recurrent(nn.LSTM, 4),
    aten.gru.input: _recurrent(nn.GRU, 3),
    aten.rnn_tanh.input: _recurrent(nn.RNN, 1, nonlinearity="tanh"),
    aten.rnn_relu.input: _recurrent(nn.RNN, 1, nonlinearity="relu"),
    aten.dropout.default: _dropout(nn.Dropout),
    aten.feature_dropout.default: _dropout(nn.Dropout2d),
    aten.alpha_dropout.default: _dropout(nn.AlphaDropout),
    aten.feature_alpha_dropout.default: _dropout(nn.FeatureAlphaDropout),
}
