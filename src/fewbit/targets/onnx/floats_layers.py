"""Standard layers that compute in float32, as ONNX nodes; their weights may be stored as codes."""

from collections.abc import Callable
from typing import Any

from fewbit.errors import TargetError
from fewbit.model.program import Op, decode_args
from fewbit.targets.onnx.builder import Builder
from fewbit.targets.onnx.floats_recurrent import gru, lstm
from fewbit.targets.onnx.floats_weights import Layer

Emit = Callable[[Layer], Any]


def emit_module(builder: Builder, op: Op, inputs: list[Any]) -> Any:
    """Nodes for a standard layer; returns the output's name, or the nested list of them that the layer answers with."""
    kind = op.attrs["type"]
    if kind not in _LAYERS:
        raise TargetError(f"{op.layer}: a {kind} layer cannot be written as ONNX; replace it by a standard layer")
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
                axes = layer.builder.ints(range(2, dims + 2))  # type: ignore[arg-type]
                x = layer.node("Pad", [x, layer.builder.ints(pads), "", axes], mode=name)
                inner = [0] * (2 * dims)
            return layer.node(
                "Conv", [x, layer.weight("weight"), *layer.optional("bias")], kernel_shape=kernel, pads=inner,
                strides=stride, dilations=dilation, group=a["groups"],
            )  # fmt: skip

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
                "ConvTranspose", [x, layer.weight("weight"), *layer.optional("bias")], kernel_shape=kernel,
                pads=pads * 2, strides=stride, dilations=dilation, group=a["groups"], output_padding=extra,
            )  # fmt: skip

        return _with_batch(layer, dims, body)

    return emit


def _linear(layer: Layer) -> str:
    bias = layer.optional("bias")
    if layer.rank == 2 and not layer.grouped("weight"):
        return layer.node("Gemm", [layer.x, layer.weight("weight"), *bias], transB=1)
    product = layer.node("MatMul", [layer.x, layer.weight("weight", transposed=True)])
    return layer.node("Add", [product, *bias]) if bias else product


def _batch_norm(layer: Layer) -> str:
    features = layer.config["num_features"]
    scale, shift = layer.filled("weight", features, 1.0), layer.filled("bias", features, 0.0)
    if "running_mean" not in layer.op.constants:
        raise TargetError(
            f"{layer.name}: a batch norm without running statistics cannot be written as ONNX; use track_running_stats=True"
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
        "GroupNormalization", [layer.x, *parts], num_groups=layer.config["num_groups"], epsilon=layer.config["eps"]
    )


def _instance_norm(dims: int) -> Emit:
    def emit(layer: Layer) -> str:
        features = layer.config["num_features"]
        parts = [layer.filled("weight", features, 1.0), layer.filled("bias", features, 0.0)]
        if "running_mean" in layer.op.constants:
            statistics = [layer.weight("running_mean"), layer.weight("running_var")]
            return _with_batch(
                layer, dims,
                lambda x: layer.node("BatchNormalization", [x, *parts, *statistics], epsilon=layer.config["eps"]),
            )  # fmt: skip
        return _with_batch(
            layer, dims, lambda x: layer.node("InstanceNormalization", [x, *parts], epsilon=layer.config["eps"])
        )

    return emit


def _rms_norm(layer: Layer) -> str:
    """ONNX has the operator only from opset 23."""
    shape, eps = layer.config["normalized_shape"], layer.config["eps"]
    axes = layer.builder.ints(range(-len(shape), 0))  # type: ignore[arg-type]
    mean = layer.node("ReduceMean", [layer.node("Mul", [layer.x, layer.x]), axes], keepdims=1)
    # torch's default epsilon is that of float32
    safe = layer.node("Add", [mean, layer.builder.scalar(2.0**-23 if eps is None else eps)])
    normal = layer.node("Div", [layer.x, layer.node("Sqrt", [safe])])
    return layer.node("Mul", [normal, layer.weight("weight")]) if "weight" in layer.op.constants else normal


def _embedding(layer: Layer) -> str:
    return layer.node("Gather", [layer.weight("weight"), layer.x], axis=0)


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
    "Dropout": lambda layer: layer.x,
}
