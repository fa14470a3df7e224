"""Standard layers that compute in float32, as ONNX nodes; their weights may be stored as codes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from fewbit.errors import TargetError
from fewbit.model.program import Op, decode_args
from fewbit.numerics.qtensor import QTensor
from fewbit.targets._onnx.builder import Builder
from fewbit.targets._onnx.floats_recurrent import gru, lstm, rnn
from fewbit.targets._onnx.floats_weights import Layer, stored_codes

Emit = Callable[[Layer], Any]


def emit_module(builder: Builder, op: Op, inputs: list[Any]) -> Any:
    """Nodes for a standard layer; returns the output's name, or nested lists of them as the layer answers."""
    kind = op.attrs["type"]
    if kind not in _LAYERS:
        raise TargetError(
            f"{op.layer}: a {kind} layer cannot be written as ONNX; replace it by a standard layer"
        )
    return _LAYERS[kind](Layer(builder, op, decode_args(op.attrs["args"], inputs)))


def _per_dim(value: Any, dims: int) -> list[int]:
    return list(value) if isinstance(value, list) else [value] * dims


def _with_batch(layer: Layer, dims: int, emit: Callable[[str], str]) -> str:
    """Torch lets the batch dimension be missing; ONNX does not."""
    if layer.rank == dims + 2:
        return emit(layer.x)
    alone = layer.node("Unsqueeze", [layer.x, layer.builder.ints([0])])
    return layer.node("Squeeze", [emit(alone), layer.builder.ints([0])])


def _convolution(dims: int) -> Emit:
    def emit(layer: Layer) -> str:
        a = layer.config
        stride, dilation, kernel = (_per_dim(a[k], dims) for k in ("stride", "dilation", "kernel_size"))
        pads = _pads(a["padding"], dims, kernel, dilation)
        mode = a.get("padding_mode", "zeros")

        def body(x: str) -> str:
            inner = pads
            if mode != "zeros":
                name = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
                axes = layer.builder.ints([*range(2, dims + 2)])
                x = layer.node("Pad", [x, layer.builder.ints(pads), "", axes], mode=name)
                inner = [0] * (2 * dims)
            return layer.node(
                "Conv",
                [x, layer.weight("weight"), *layer.optional("bias")],
                kernel_shape=kernel,
                pads=inner,
                strides=stride,
                dilations=dilation,
                group=a["groups"],
            )

        return _with_batch(layer, dims, body)

    return emit


def _pads(padding: Any, dims: int, kernel: list[int], dilation: list[int]) -> list[int]:
    if padding == "valid":
        return [0] * (2 * dims)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [t // 2 for t in totals] + [t - t // 2 for t in totals]
    return _per_dim(padding, dims) * 2


def _transposed(dims: int) -> Emit:
    def emit(layer: Layer) -> str:
        a = layer.config
        stride, dilation, kernel, pads, extra = (
            _per_dim(a[k], dims) for k in ("stride", "dilation", "kernel_size", "padding", "output_padding")
        )

        def body(x: str) -> str:
            return layer.node(
                "ConvTranspose",
                [x, layer.weight("weight"), *layer.optional("bias")],
                kernel_shape=kernel,
                pads=pads * 2,
                strides=stride,
                dilations=dilation,
                group=a["groups"],
                output_padding=extra,
            )

        return _with_batch(layer, dims, body)

    return emit


def _linear(layer: Layer) -> str:
    """Gemm for matrices and for weights of 5 and more bits; MatMul for 4 bits, groups, and float weights.

    ONNX Runtime makes MatMulNBits of a DequantizeLinear and a MatMul: many times faster at 4 bits, but by its
    own default that operator rounds the input to 8 bits, which weights of 8 bits would notice.
    """
    bias = layer.optional("bias")
    scheme = layer.stored_scheme("weight")
    narrow = (
        scheme is not None
        and scheme.spec.integer
        and (scheme.granularity == "group" or scheme.spec.bits <= 4)
    )
    if layer.rank == 2 and not narrow:
        return layer.node("Gemm", [layer.x, layer.weight("weight"), *bias], transB=1)
    if layer.rank > 2 and scheme is not None and not narrow:
        return _linear_rows(layer, bias)
    product = layer.node("MatMul", [layer.x, layer.weight("weight", transposed=True)])
    return layer.node("Add", [product, *bias]) if bias else product


def _linear_rows(layer: Layer, bias: list[str]) -> str:
    """More dimensions folded into rows for a Gemm, and back."""
    features = [layer.config[k] for k in ("in_features", "out_features")]
    rows = layer.node("Reshape", [layer.x, layer.builder.ints([-1, features[0]])])
    product = layer.node("Gemm", [rows, layer.weight("weight"), *bias], transB=1)
    leading = layer.node("Shape", [layer.x], start=0, end=layer.rank - 1)
    return layer.node(
        "Reshape", [product, layer.node("Concat", [leading, layer.builder.ints([features[1]])], axis=0)]
    )


def _batch_norm(layer: Layer) -> str:
    features = layer.config["num_features"]
    scale, shift = layer.filled("weight", features, 1.0), layer.filled("bias", features, 0.0)
    if "running_mean" not in layer.op.constants:
        raise TargetError(
            f"{layer.name}: a batch norm without running statistics cannot be written as ONNX; "
            "use track_running_stats=True"
        )
    statistics = [layer.weight("running_mean"), layer.weight("running_var")]
    return layer.node("BatchNormalization", [layer.x, scale, shift, *statistics], epsilon=layer.config["eps"])


def _layer_norm(layer: Layer) -> str:
    shape = layer.config["normalized_shape"]
    parts = [layer.filled("weight", shape, 1.0), *layer.optional("bias")]
    return layer.node("LayerNormalization", [layer.x, *parts], axis=-len(shape), epsilon=layer.config["eps"])


def _group_norm(layer: Layer) -> str:
    channels = layer.config["num_channels"]
    parts = [layer.filled("weight", channels, 1.0), layer.filled("bias", channels, 0.0)]
    return layer.node(
        "GroupNormalization",
        [layer.x, *parts],
        num_groups=layer.config["num_groups"],
        epsilon=layer.config["eps"],
    )


def _instance_norm(dims: int) -> Emit:
    def emit(layer: Layer) -> str:
        features = layer.config["num_features"]
        parts = [layer.filled("weight", features, 1.0), layer.filled("bias", features, 0.0)]
        if "running_mean" in layer.op.constants:
            statistics = [layer.weight("running_mean"), layer.weight("running_var")]
            return _with_batch(
                layer,
                dims,
                lambda x: layer.node(
                    "BatchNormalization", [x, *parts, *statistics], epsilon=layer.config["eps"]
                ),
            )
        return _with_batch(
            layer,
            dims,
            lambda x: layer.node("InstanceNormalization", [x, *parts], epsilon=layer.config["eps"]),
        )

    return emit


def _rms_norm(layer: Layer) -> str:
    """ONNX has the operator only from opset 23."""
    shape, eps = layer.config["normalized_shape"], layer.config["eps"]
    axes = layer.builder.ints([*range(-len(shape), 0)])
    mean = layer.node("ReduceMean", [layer.node("Mul", [layer.x, layer.x]), axes], keepdims=1)
    # torch's default epsilon is that of float32
    safe = layer.node("Add", [mean, layer.builder.scalar(2.0**-23 if eps is None else eps)])
    normal = layer.node("Div", [layer.x, layer.node("Sqrt", [safe])])
    return layer.node("Mul", [normal, layer.weight("weight")]) if "weight" in layer.op.constants else normal


def _embedding(layer: Layer) -> str:
    """The rows' codes are gathered first, so that a run dequantizes those rows and not the whole table."""
    scheme = layer.stored_scheme("weight")
    if scheme is None or not scheme.spec.integer or scheme.axis % 2 != 0:
        return layer.node("Gather", [layer.weight("weight"), layer.x], axis=0)
    q, name = layer.qtensor("weight"), f"{layer.name}.weight"
    codes = layer.node(
        "Gather", [stored_codes(layer.builder, q.codes.numpy(), scheme, name), layer.x], axis=0
    )
    values = layer.node("Cast", [codes], to=onnx.TensorProto.FLOAT)
    if scheme.granularity == "group":
        values = layer.node(
            "Reshape", [values, layer.builder.ints([0] * layer.rank + [-1, int(scheme.group_size or 1)])]
        )
    if q.zero_point.any():
        values = layer.node("Sub", [values, _per_row(layer, q.zero_point.float().numpy(), q, "zero_point")])
    values = layer.node("Mul", [values, _per_row(layer, q.scale.numpy(), q, "scale")])
    if scheme.granularity == "group":
        values = layer.node("Reshape", [values, layer.builder.ints([0] * layer.rank + [-1])])
    return values


def _per_row(layer: Layer, values: np.ndarray, q: QTensor, what: str) -> str:
    """Scales or zero points of the gathered rows: [..., 1], or [..., groups, 1]; a scalar per tensor."""
    name = f"{layer.name}.weight_{what}"
    if q.scheme.granularity == "tensor":
        return layer.builder.constant(values.reshape(()), name)
    table = values.reshape(q.shape[0], -1, 1) if q.scheme.granularity == "group" else values.reshape(-1, 1)
    return layer.node("Gather", [layer.builder.constant(table, name), layer.x], axis=0)


def _prelu(layer: Layer) -> str:
    weight = layer.array("weight")
    slope = weight.reshape(-1, *[1] * (layer.rank - 2)) if layer.rank > 2 else weight
    return layer.node("PRelu", [layer.x, layer.builder.constant(slope, f"{layer.name}.weight")])


_LAYERS: dict[str, Emit] = {
    **{f"Conv{n}d": _convolution(n) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": _transposed(n) for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": _batch_norm for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": _instance_norm(n) for n in (1, 2, 3)},
    "Linear": _linear,
    "LayerNorm": _layer_norm,
    "GroupNorm": _group_norm,
    "RMSNorm": _rms_norm,
    "Embedding": _embedding,
    "PReLU": _prelu,
    "LSTM": lstm,
    "GRU": gru,
    "RNN": rnn,
    "Dropout": lambda layer: layer.x,
}
