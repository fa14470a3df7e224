"""Dynamic quantization in ONNX: DynamicQuantizeLinear, an integer product, and the scales afterwards."""

from fewbit.errors import TargetError
from fewbit.model.program import Op
from fewbit.targets._onnx.builder import Builder


def emit_dynamic(builder: Builder, op: Op, x: str) -> str:
    """A linear layer or convolution whose input's range is taken at run time; float32 in and out."""
    codes, scale, zero_point = builder.nodes_of(
        "DynamicQuantizeLinear",
        [x],
        op.layer,
        [builder.unique(f"{op.layer}_{part}") for part in ("codes", "scale", "zero")],
    )
    weight = op.constants["weight"].numpy()
    channels = op.constants["weight_scale"].numpy()
    if op.kind == "dynamic_linear":
        stored = builder.constant(weight.T.copy(), f"{op.layer}.weight")
        acc = builder.node("MatMulInteger", [codes, stored, zero_point], op.layer)
    elif op.kind == "dynamic_conv":
        a = op.attrs
        pad = a["pad"] or [0] * (2 * len(a["stride"]))
        pads = list(reversed(pad[0::2])) + list(reversed(pad[1::2]))
        stored = builder.constant(weight, f"{op.layer}.weight")
        acc = builder.node("ConvInteger", [codes, stored, zero_point], op.layer, pads=pads, strides=a["stride"],
                           dilations=a["dilation"], group=a["groups"])  # fmt: skip
        channels = channels.reshape(-1, *[1] * len(a["stride"]))
    else:
        raise TargetError(f"{op.layer}: {op.kind} cannot be written as ONNX")
    values = builder.node("Cast", [acc], op.layer, to=1)
    factor = builder.node("Mul", [scale, builder.constant(channels, f"{op.layer}.weight_scale")], op.layer)
    result = builder.node("Mul", [values, factor], op.layer)
    if "bias" not in op.constants:
        return result
    bias = op.constants["bias"].numpy().reshape(channels.shape)
    return builder.node("Add", [result, builder.constant(bias, f"{op.layer}.bias")], op.layer)
