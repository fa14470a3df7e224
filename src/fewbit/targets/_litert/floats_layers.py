"""Float layers as operators of the ``.tflite`` format, with their weights as they are stored."""

import numpy as np
import torch
from torch import Tensor

from fewbit.model.program import Op
from fewbit.model.reference import module_state
from fewbit.targets._litert.floats_weights import coded, fits_four_bits, parameter
from fewbit.targets._litert.floats_windows import paddings, per_dim
from fewbit.targets._litert.floats_writers import Write
from fewbit.targets._litert.writer import Writer, array


def bias(w: Writer, op: Op, count: int) -> str:
    """The bias; zeros where a convolution has none, since some kernels want one."""
    if "bias" in op.constants:
        return parameter(w, op, "bias")
    return w.b.constant(f"{op.output}/bias", np.zeros(count, np.float32))


def _linear(w: Writer, op: Op) -> None:
    names = [op.inputs[0], parameter(w, op, "weight"), *_float_bias(w, op)]
    output, activation = w.clamped(op)
    fields = {"keepNumDims": len(w.shapes[op.inputs[0]]) != 2, "fusedActivationFunction": activation}
    w.b.operator("FULLY_CONNECTED", names, [output], ("FullyConnectedOptions", fields), 5)


def _convolution(w: Writer, op: Op) -> None:
    config = op.attrs["config"]
    kernel, stride, dilation = (per_dim(config[k], 2) for k in ("kernel_size", "stride", "dilation"))
    pads = paddings(config["padding"], kernel, dilation)
    groups, inputs, outputs = config["groups"], config["in_channels"], config["out_channels"]
    output, activation = w.clamped(op)
    fields = {
        "padding": 0 if any(n for pair in pads for n in pair) else 1,
        "strideH": stride[0], "strideW": stride[1],
        "dilationHFactor": dilation[0], "dilationWFactor": dilation[1], "fusedActivationFunction": activation,
    }  # fmt: skip
    depthwise = groups == inputs and groups > 1
    weight = parameter(w, op, "weight", (1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
    name, table = ("CONV_2D", "Conv2DOptions")
    if depthwise:
        name, table = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        fields["depthMultiplier"] = outputs // groups
    names = [op.inputs[0], weight, bias(w, op, outputs)]
    w.b.operator(name, names, [output], (table, fields), 2)


def _dynamic_linear(w: Writer, op: Op) -> None:
    """LiteRT's own mixed kernel: codes of weights, and an input that it quantizes row by row."""
    codes = op.constants["weight"]
    names = [op.inputs[0], _codes(w, op, codes, 0, fits_four_bits(codes)), *_float_bias(w, op)]
    output, activation = w.clamped(op)
    fields = {"keepNumDims": len(w.shapes[op.inputs[0]]) != 2, "fusedActivationFunction": activation,
              "asymmetricQuantizeInputs": True}  # fmt: skip
    w.b.operator("FULLY_CONNECTED", names, [output], ("FullyConnectedOptions", fields), 12)


def _dynamic_conv(w: Writer, op: Op) -> None:
    """The same for images; 4-bit codes take a byte each, as no fast kernel reads them packed."""
    stride, dilation = op.attrs["stride"], op.attrs["dilation"]
    weight = op.constants["weight"].permute(0, 2, 3, 1)
    names = [op.inputs[0], _codes(w, op, weight, 0, False), bias(w, op, weight.shape[0])]
    output, activation = w.clamped(op)
    fields = {
        "padding": 0 if any(op.attrs["pad"]) else 1, "strideH": stride[0], "strideW": stride[1],
        "dilationHFactor": dilation[0], "dilationWFactor": dilation[1], "fusedActivationFunction": activation,
    }  # fmt: skip
    w.b.operator("CONV_2D", names, [output], ("Conv2DOptions", fields), 5)


def _codes(w: Writer, op: Op, codes: Tensor, axis: int, narrow: bool) -> str:
    scales = array(op.constants["weight_scale"]).astype(np.float32).reshape(-1)
    zeros = np.zeros(len(scales), np.int64)
    return coded(w, f"{op.output}/weight", array(codes), scales, zeros, axis, narrow)


def _float_bias(w: Writer, op: Op) -> list[str]:
    return [parameter(w, op, "bias")] if "bias" in op.constants else []


def _transposed(w: Writer, op: Op) -> None:
    config = op.attrs["config"]
    stride = per_dim(config["stride"], 2)
    if config["groups"] == 1 and per_dim(config["dilation"], 2) == [1, 1]:
        weight = parameter(w, op, "weight", (1, 2, 3, 0))
    else:
        value = _one_group(module_state(op)["weight"], config["groups"])
        value = _dilated(value, per_dim(config["dilation"], 2)).permute(1, 2, 3, 0)
        weight = w.b.constant(f"{op.output}/weight", array(value))
    output = w.tensor(op.output)
    shape = w.numbers(op, "shape", [int(s or 1) for s in w.shapes[op.output]])
    fields = {"padding": 0 if any(per_dim(config["padding"], 2)) else 1, "strideH": stride[0], "strideW": stride[1],
              "fusedActivationFunction": 0}  # fmt: skip
    names = [shape, weight, op.inputs[0], bias(w, op, config["out_channels"])]
    w.b.operator("TRANSPOSE_CONV", names, [output], ("TransposeConvOptions", fields), 3)


def _one_group(weight: Tensor, groups: int) -> Tensor:
    """Weights [in, out / groups, h, w] of several groups as one matrix, zero between groups."""
    if groups == 1:
        return weight
    inputs, outputs, *kernel = weight.shape
    whole = torch.zeros(inputs, outputs * groups, *kernel)
    each = inputs // groups
    for g in range(groups):
        whole[g * each : (g + 1) * each, g * outputs : (g + 1) * outputs] = weight[g * each : (g + 1) * each]
    return whole


def _dilated(weight: Tensor, dilation: list[int]) -> Tensor:
    """A kernel with zeros where dilation skips places, which LiteRT's operator cannot skip itself."""
    if dilation == [1, 1]:
        return weight
    sizes = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    wide = torch.zeros(*weight.shape[:2], *sizes)
    wide[:, :, :: dilation[0], :: dilation[1]] = weight
    return wide


def _embedding(w: Writer, op: Op) -> None:
    names = [parameter(w, op, "weight"), op.inputs[0]]
    w.b.operator("GATHER", names, [w.tensor(op.output)], ("GatherOptions", {"axis": 0}), 1)


LAYERS: dict[str, Write] = {
    "dynamic_linear": _dynamic_linear,
    "dynamic_conv": _dynamic_conv,
    "module.Linear": _linear,
    "module.Conv2d": _convolution,
    "module.ConvTranspose2d": _transposed,
    "module.Embedding": _embedding,
}
