"""ONNX operators with weights, as `nn` layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.model.onnx_build import Constant, Operand, Value
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_windows import Window, padded, window_of

Rule = Callable[[Call], Any]
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def constant(operand: Operand | None) -> Constant | None:
    return operand if isinstance(operand, Constant) else None


def _weights(c: Call, *indices: int) -> list[Constant | None]:
    """Constant inputs, None for those left out; an error for computed ones."""
    for index in indices:
        if c.has(index):
            c.fixed(index, "weights")
    return [constant(c.raw(i)) if c.has(i) else None for i in indices]


# ---- convolutions -----------------------------------------------------------------------------------------


def _conv(c: Call) -> Any:
    rank = c.rank(0)
    if rank not in _CONVOLUTIONS or c.rank(1) != rank:
        raise c.error(f"a convolution over {rank - 2} dimensions: expected 1, 2 or 3")
    kernel, group = c.shape(1)[2:], int(c.attr("group", 1))
    window = window_of(c, kernel)
    x, padding = padded(c, c[0], window)
    weight, bias = constant(c.raw(1)), constant(c.raw(2)) if c.has(2) else None
    if weight is None or (c.has(2) and bias is None):
        return _computed_conv(c, x, window, padding, group)
    fused = bias or _fused_bias(c, weight.array.shape[0], rank)
    return c.layer(
        _CONVOLUTIONS[rank], [x], {"weight": weight, "bias": fused},
        in_channels=weight.array.shape[1] * group, out_channels=weight.array.shape[0], kernel_size=tuple(kernel),
        stride=window.strides, padding=padding, dilation=window.dilations, groups=group, bias=fused is not None,
    )  # fmt: skip


def _computed_conv(c: Call, x: Operand, window: Window, padding: tuple[int, ...], group: int) -> Any:
    function: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[c.rank(0)]
    bias = [c[2]] if c.has(2) else []
    return c.apply(
        function,
        x,
        c[1],
        *bias,
        stride=window.strides,
        padding=padding,
        dilation=window.dilations,
        groups=group,
    )


def _conv_transpose(c: Call) -> Any:
    rank, group = c.rank(0), int(c.attr("group", 1))
    weight, bias = _weights(c, 1, 2)
    if rank not in _TRANSPOSED or weight is None:
        raise c.error(f"a transposed convolution over {rank - 2} dimensions: expected 1, 2 or 3")
    kernel = weight.array.shape[2:]
    window = window_of(c, kernel, output=True)
    more = tuple(c.attr("output_padding") or [0] * len(kernel))
    if any(m >= max(s, d) for m, s, d in zip(more, window.strides, window.dilations, strict=True)):
        raise c.error(f"output_padding {list(more)} is no smaller than the stride: expected less")
    least = tuple(max(0, min(p)) for p in zip(window.begins, window.ends, strict=True))
    channels = weight.array.shape[1] * group
    crop = [(b - p, e - p) for b, e, p in zip(window.begins, window.ends, least, strict=True)]
    fused = bias or (None if any(map(any, crop)) else _fused_bias(c, channels, rank))
    result = c.layer(
        _TRANSPOSED[rank], [c[0]], {"weight": weight, "bias": fused},
        in_channels=weight.array.shape[0], out_channels=channels, kernel_size=tuple(kernel), stride=window.strides,
        padding=least, output_padding=more, groups=group, bias=fused is not None, dilation=window.dilations,
    )  # fmt: skip
    if any(map(any, crop)):
        flat = [-side for pair in reversed(crop) for side in pair]
        result = c.apply(F.pad, result, pad=flat, suffix="crop")
    return result


# ---- products ---------------------------------------------------------------------------------------------


def _fused_bias(c: Call, features: int, rank: int, last: bool = False) -> Constant | None:
    """The bias that the only consumer adds: it belongs to the layer. That node then has the layer's result."""
    output = c.node.outputs[0]
    add = c.only_consumer(output)
    if add is None or add.op != "Add":
        return None
    other = add.inputs[1] if add.inputs[0] == output else add.inputs[0]
    bias = c.builder.values.get(other)
    if not isinstance(bias, Constant) or bias.array.dtype.kind != "f" or bias.array.size != features:
        return None
    shape, axis = bias.array.shape, -1 if last else 1 - rank
    wanted = (1,) * max(0, len(shape) + axis) + (features,) + (1,) * (-1 - axis)
    if len(shape) > rank or len(shape) < -axis or shape != wanted:
        return None
    c.absorbed[add] = None
    return Constant(bias.array.reshape(features), bias.name)


def _linear(c: Call, x: Operand, weight: np.ndarray, name: str, bias: Constant | None) -> Any:
    """x @ weight.T + bias."""
    return c.layer(
        nn.Linear, [x], {"weight": c.builder.held(weight, name), "bias": bias},
        in_features=weight.shape[1], out_features=weight.shape[0], bias=bias is not None,
    )  # fmt: skip


def _matmul(c: Call) -> Any:
    weight = constant(c.raw(1))
    floats = weight is not None and weight.array.dtype.kind == "f"
    if (
        weight is None
        or not floats
        or weight.array.ndim != 2
        or not isinstance(c.raw(0), Value)
        or c.rank(0) < 2
    ):
        return c.apply(torch.matmul, c[0], c[1])
    bias = _fused_bias(c, weight.array.shape[1], c.rank(0), last=True)
    return _linear(c, c[0], weight.array.T, weight.name, bias)


def _gemm(c: Call) -> Any:
    alpha, beta = float(c.attr("alpha", 1.0)), float(c.attr("beta", 1.0))
    x = c.apply(torch.t, c[0], suffix="t") if c.attr("transA", 0) else c[0]
    weight = constant(c.raw(1))
    if weight is None:
        return _computed_gemm(c, x, alpha, beta)
    matrix = weight.array if c.attr("transB", 0) else weight.array.T
    matrix = matrix if alpha == 1 else (matrix * np.float32(alpha))
    features = matrix.shape[0]
    bias = constant(c.raw(2)) if c.has(2) else None
    if c.has(2) and (bias is None or bias.array.size not in (1, features) or bias.array.ndim > 2
                     or (bias.array.ndim == 2 and bias.array.shape[0] != 1)):  # fmt: skip
        product = _linear(c, x, matrix, weight.name, None)
        return c.apply(_sum, product, c[2], beta=beta, suffix="bias")
    if bias is None:
        return _linear(c, x, matrix, weight.name, _fused_bias(c, features, 2, last=True))
    values = bias.array if beta == 1 else bias.array * np.float32(beta)
    row = values.reshape(-1) if values.size == features else np.full(features, values.reshape(()), np.float32)
    return _linear(c, x, matrix, weight.name, Constant(row, bias.name))


def _computed_gemm(c: Call, x: Operand, alpha: float, beta: float) -> Any:
    rest = [c[2]] if c.has(2) else []
    return c.apply(_product, x, c[1], *rest, alpha=alpha, beta=beta, transposed=bool(c.attr("transB", 0)))


def _product(
    x: Tensor, y: Tensor, z: Tensor | None = None, *, alpha: float, beta: float, transposed: bool
) -> Tensor:
    product = torch.matmul(x, y.t() if transposed else y)
    product = product if alpha == 1 else product * alpha
    return product if z is None else _sum(product, z, beta=beta)


def _sum(x: Tensor, y: Tensor, *, beta: float) -> Tensor:
    return x + (y if beta == 1 else y * beta)


# ---- norms ------------------------------------------------------------------------------------------------


def _batch_norm(c: Call) -> Any:
    rank = c.rank(0)
    if c.attr("training_mode", 0) or not c.attr("spatial", 1) or any(c.node.outputs[1:]):
        raise c.error("it is in training mode: expected inference")
    if rank not in _BATCH_NORMS:
        raise c.error(f"batch normalization of {rank} dimensions: expected 2 to 5")
    weight, bias, mean, var = _weights(c, 1, 2, 3, 4)
    if weight is None or mean is None:
        raise c.error("its weights are missing")
    return c.layer(
        _BATCH_NORMS[rank], [c[0]],
        {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var},
        num_features=mean.array.shape[0], eps=float(c.attr("epsilon", 1e-5)),
    )  # fmt: skip


def _instance_norm(c: Call) -> Any:
    rank = c.rank(0)
    weight, bias = _weights(c, 1, 2)
    if rank not in _INSTANCE_NORMS or weight is None:
        raise c.error(f"instance normalization of {rank} dimensions: expected 3 to 5")
    return c.layer(
        _INSTANCE_NORMS[rank], [c[0]], {"weight": weight, "bias": bias},
        num_features=weight.array.shape[0], eps=float(c.attr("epsilon", 1e-5)), affine=True,
    )  # fmt: skip


def _layer_norm(c: Call) -> Any:
    if any(c.node.outputs[1:]):
        raise c.error("its mean is an output: expected the normalized tensor only")
    shape = c.shape(0)
    over = shape[c.axis(int(c.attr("axis", -1)), len(shape)) :]
    weights = [None if w is None else _broadcast(w, over) for w in _weights(c, 1, 2)]
    return c.layer(
        nn.LayerNorm, [c[0]], {"weight": weights[0], "bias": weights[1]},
        normalized_shape=tuple(over), eps=float(c.attr("epsilon", 1e-5)), bias=weights[1] is not None,
        elementwise_affine=weights[0] is not None,
    )  # fmt: skip


def _rms_norm(c: Call) -> Any:
    shape = c.shape(0)
    over = shape[c.axis(int(c.attr("axis", -1)), len(shape)) :]
    (weight,) = _weights(c, 1)
    return c.layer(
        nn.RMSNorm, [c[0]], {"weight": None if weight is None else _broadcast(weight, over)},
        normalized_shape=tuple(over), eps=float(c.attr("epsilon", 1e-5)), elementwise_affine=weight is not None,
    )  # fmt: skip


def _broadcast(weight: Constant, shape: tuple[int, ...]) -> Constant:
    if weight.array.shape == shape:
        return weight
    return Constant(np.ascontiguousarray(np.broadcast_to(weight.array, shape)), weight.name)


def _group_norm(c: Call) -> Any:
    groups, channels = int(c.attr("num_groups", 1)), c.shape(0)[1]
    weights = _weights(c, 1, 2)
    if c.version < 21:  # one number a group, before opset 21
        weights = [w and Constant(np.repeat(w.array, channels // groups), w.name) for w in weights]
    return c.layer(
        nn.GroupNorm, [c[0]], {"weight": weights[0], "bias": weights[1]},
        num_groups=groups, num_channels=channels, eps=float(c.attr("epsilon", 1e-5)),
    )  # fmt: skip


# ---- others -----------------------------------------------------------------------------------------------


def _prelu(c: Call) -> Any:
    slope = constant(c.raw(1))
    shape, rank = c.shape(1), c.rank(0)
    wanted = (shape[0], *(1,) * (rank - 2)) if shape else ()
    if slope is not None and (slope.array.size == 1 or (rank > 1 and shape in (wanted, (1, *wanted)))):
        flat = Constant(slope.array.reshape(-1), slope.name)
        if slope.array.size in (1, c.shape(0)[1]):
            return c.layer(nn.PReLU, [c[0]], {"weight": flat}, num_parameters=slope.array.size)
    return c.apply(_leaky, c[0], c[1])


def _leaky(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _dropout(c: Call) -> Any:
    training = c.known(2) if c.has(2) else None
    if (c.has(2) and training is None) or (training is not None and bool(training.any())):
        raise c.error("it is in training mode: expected inference")
    if any(c.uses(o) for o in c.node.outputs[1:]):
        raise c.error("its mask is used: expected inference")
    ratio = c.known(1) if c.has(1) else None
    probability = float(ratio.item()) if ratio is not None else float(c.attr("ratio", 0.5))
    if not isinstance(c.raw(0), Value) or not 0 <= probability <= 1:
        return c.raw(0)
    return c.layer(nn.Dropout, [c[0]], {}, p=probability)


def _response_norm(c: Call) -> Any:
    size = int(c.attr("size", 0))
    if size % 2 != 1:
        raise c.error(f"size {size}: expected an odd number of channels")
    settings: dict[str, Any] = {"alpha": float(c.attr("alpha", 1e-4)), "beta": float(c.attr("beta", 0.75))}
    return c.apply(F.local_response_norm, c[0], size=size, k=float(c.attr("bias", 1.0)), **settings)


def _norm(c: Call) -> Any:
    return c.apply(_normalized, c[0], dim=int(c.attr("axis", -1)), p=int(c.attr("p", 2)))


def _normalized(x: Tensor, *, dim: int, p: int) -> Tensor:
    size = torch.sqrt(torch.sum(x * x, dim, True)) if p == 2 else torch.sum(torch.abs(x), dim, True)
    return x / size


RULES: dict[str, Rule] = {
    "LRN": _response_norm,
    "LpNormalization": _norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm,
    "PRelu": _prelu,
    "Dropout": _dropout,
}
