"""Dynamic quantization in ONNX: DynamicQuantizeLinear, an integer product, and the scales afterwards."""

from typing import Any

import numpy as np

from fewbit.errors import TargetError
from fewbit.model.program import Op
from fewbit.targets._onnx.builder import Builder
from fewbit.targets._onnx.tables import fewer_bytes, numbers


def emit_dynamic(builder: Builder, op: Op, x: str, constants: dict[str, Any]) -> str:
    """A linear layer or convolution whose input's range is taken at run time; float32 in and out.

    ``constants`` learns which initializers hold the operation's constants; ``restore_dynamic`` undoes their shapes.
    """

    def stored(role: str, array: np.ndarray) -> str:
        constants[f"{op.output}.{role}"] = name = builder.constant(array, f"{op.layer}.{role}")
        return name

    def stored_weight(array: np.ndarray) -> str:
        if not fewer_bytes(builder, array):
            return stored("weight", array)
        name, constants[f"{op.output}.weight"] = numbers(builder, array, f"{op.layer}.weight")
        return name

    codes, scale, zero_point = builder.nodes_of(
        "DynamicQuantizeLinear",
        [x],
        op.layer,
        [builder.unique(f"{op.layer}_{part}") for part in ("codes", "scale", "zero")],
    )
    weight = op.constants["weight"].numpy()
    channels = op.constants["weight_scale"].numpy()
    if op.kind == "dynamic_linear":
        acc = builder.node("MatMulInteger", [codes, stored_weight(weight.T.copy()), zero_point], op.layer)
    elif op.kind == "dynamic_conv":
        a = op.attrs
        pad = a["pad"] or [0] * (2 * len(a["stride"]))
        pads = list(reversed(pad[0::2])) + list(reversed(pad[1::2]))
        inputs = [codes, stored_weight(weight), zero_point]
        acc = builder.node("ConvInteger", inputs, op.layer, pads=pads, strides=a["stride"],
                           dilations=a["dilation"], group=a["groups"])  # fmt: skip
        channels = channels.reshape(-1, *[1] * len(a["stride"]))
    else:
        raise TargetError(f"{op.layer}: {op.kind} cannot be written as ONNX")
    values = builder.node("Cast", [acc], op.layer, to=1)
    factor = builder.node("Mul", [scale, stored("weight_scale", channels)], op.layer)
    result = builder.node("Mul", [values, factor], op.layer)
    if "bias" not in op.constants:
        return result
    bias = op.constants["bias"].numpy().reshape(channels.shape)
    return builder.node("Add", [result, stored("bias", bias)], op.layer)


def restore_dynamic(op: Op) -> None:
    """Give the constants that were read from a file the shapes that the program has them in."""
    if op.kind.startswith("dynamic_"):
        op.constants = {role: t if role == "weight" else t.flatten() for role, t in op.constants.items()}
    if op.kind == "dynamic_linear":
        op.constants["weight"] = op.constants["weight"].T.contiguous()
