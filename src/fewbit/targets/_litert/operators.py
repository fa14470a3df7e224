"""The integer operations, and those that move codes, as operators of the ``.tflite`` format."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fewbit.errors import TargetError
from fewbit.model.kernels_16x8 import wide
from fewbit.model.program import Op
from fewbit.targets._litert.codes import NATIVE, activation, bound_codes
from fewbit.targets._litert.floats_layers import LAYERS
from fewbit.targets._litert.floats_writers import FLOAT_OPERATORS
from fewbit.targets._litert.writer import Writer, array

Write = Callable[[Writer, Op], None]
_SAME, _VALID = 0, 1


def _fused(w: Writer, op: Op) -> int:
    """The number of the fused activation that the operation's clamp stands for."""
    name = (
        activation(op.attrs.get("clamp"), w.program.codings[op.output])
        if op.output in w.program.codings
        else "NONE"
    )
    if name is None:
        raise TargetError(f"{op.layer}: its clamp {op.attrs['clamp']} is no activation of LiteRT")
    return int(getattr(w.b.s.ActivationFunctionType, name))


def _conv(w: Writer, op: Op) -> None:
    weight = op.constants["weight"]
    inputs, groups = w.shapes[op.inputs[0]][3], op.attrs["groups"]
    stride, dilation = op.attrs["stride"], op.attrs["dilation"]
    options: dict[str, Any] = {
        "padding": _SAME if any(op.attrs["pad"]) else _VALID,
        "strideH": stride[0], "strideW": stride[1],
        "dilationHFactor": dilation[0], "dilationWFactor": dilation[1],
        "fusedActivationFunction": _fused(w, op),
    }  # fmt: skip
    depthwise = groups == inputs and groups > 1
    if depthwise:
        constant = w.weight(op, weight.permute(1, 2, 3, 0), 3)
        options["depthMultiplier"] = weight.shape[0] // groups
    else:
        constant = w.weight(op, weight.permute(0, 2, 3, 1), 0)
    names = [op.inputs[0], constant, *w.bias(op, w.program.codings[op.inputs[0]])]
    name, table = (
        ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions") if depthwise else ("CONV_2D", "Conv2DOptions")
    )
    w.b.operator(name, names, [w.tensor(op.output)], (table, options), 3)


def _linear(w: Writer, op: Op) -> None:
    constant = w.weight(op, op.constants["weight"], 0)
    bias = w.bias(op, w.program.codings[op.inputs[0]])
    options = {"keepNumDims": len(w.shapes[op.inputs[0]]) != 2, "fusedActivationFunction": _fused(w, op)}
    version = 12 if op.constants["weight_scale"].numel() > 1 else 5
    w.b.operator(
        "FULLY_CONNECTED", [op.inputs[0], constant, *bias], [w.tensor(op.output)],
        ("FullyConnectedOptions", options), version,
    )  # fmt: skip


def simple(name: str, table: str | None = None, version: int = 2, **options: Any) -> Write:
    """An operator that reads the operation's own inputs; ``table``: of its options."""

    def write(w: Writer, op: Op) -> None:
        fields = dict(options)
        if fields.pop("fuses", False):
            fields["fusedActivationFunction"] = _fused(w, op)
        w.b.operator(name, op.inputs, [w.tensor(op.output)], (table, fields) if table else None, version)

    return write


def _add(w: Writer, op: Op) -> None:
    """16-bit codes have a kernel for scales that are powers of two, which files get that do not refuse it."""
    general = {"potScaleInt16": False} if wide(w.program.codings[op.output]) else {}
    simple("ADD", "AddOptions", fuses=True, **general)(w, op)


def _avg_pool(w: Writer, op: Op) -> None:
    _pool(w, op, "AVERAGE_POOL_2D", op.attrs["kernel"], op.attrs["stride"])


def _max_pool(w: Writer, op: Op) -> None:
    _pool(w, op, "MAX_POOL_2D", op.attrs["args"][1], op.attrs["args"][2])


def _pool(w: Writer, op: Op, name: str, kernel: list[int], stride: list[int]) -> None:
    options = {"padding": _VALID, "strideH": stride[0], "strideW": stride[1], "filterHeight": kernel[0],
               "filterWidth": kernel[1]}  # fmt: skip
    w.b.operator(name, op.inputs, [w.tensor(op.output)], ("Pool2DOptions", options), 2)


def _mean(w: Writer, op: Op) -> None:
    axes = w.numbers(op, "axes", [1, 2])
    options = {"keepDims": not op.attrs.get("squeeze", False)}
    w.b.operator("MEAN", [op.inputs[0], axes], [w.tensor(op.output)], ("ReducerOptions", options), 2)


def _concat(w: Writer, op: Op) -> None:
    options = {"axis": op.attrs["axis"]}
    w.b.operator("CONCATENATION", op.inputs, [w.tensor(op.output)], ("ConcatenationOptions", options), 2)


def _table(w: Writer, op: Op) -> None:
    function = op.attrs["function"]
    name = NATIVE[function["target"]]
    options: tuple[str, dict[str, Any]] | None = None
    if name == "GELU":
        options = ("GeluOptions", {"approximate": function["kwargs"].get("approximate") == "tanh"})
    w.b.operator(name, op.inputs, [w.tensor(op.output)], options, 2)


def _leaky_relu(w: Writer, op: Op) -> None:
    options = {"alpha": op.attrs["alpha"]}
    w.b.operator("LEAKY_RELU", op.inputs, [w.tensor(op.output)], ("LeakyReluOptions", options), 2)


def _clip(w: Writer, op: Op) -> None:
    """A ReLU where the clamp is one, else a maximum and a minimum with constant codes."""
    coding = w.program.codings[op.output]
    name = activation(op.attrs["clamp"], coding)
    if name in ("RELU", "RELU6") or (name == "RELU_N1_TO_1" and not wide(coding)):
        w.b.operator(name, op.inputs, [w.tensor(op.output)], None, 2)
        return
    steps = [
        (kind, bound)
        for kind, bound in zip(("MAXIMUM", "MINIMUM"), bound_codes(coding, op.attrs["clamp"]), strict=True)
        if bound is not None
    ]
    source = op.inputs[0]
    for i, (kind, bound) in enumerate(steps):
        constant = w.b.constant(
            f"{op.output}/{kind.lower()}",
            array(bound),
            scales=[coding.scale],
            zero_points=[coding.zero_point],
        )
        last = i == len(steps) - 1
        shape = w.shapes[op.output]
        dtype = str(array(bound).dtype)
        output = w.tensor(op.output) if last else w.temporary(f"{op.output}/above", shape, dtype, coding)
        w.b.operator(kind, [source, constant], [output], ("MaximumMinimumOptions", {}), 2)
        source = output


def _pad(w: Writer, op: Op) -> None:
    rank = len(w.shapes[op.output])
    flat = list(op.attrs["pad"]) + [0] * (2 * rank - len(op.attrs["pad"]))
    pairs = [flat[2 * (rank - 1 - axis) : 2 * (rank - axis)] for axis in range(rank)]
    if op.attrs.get("layout") == "NHWC":
        pairs = [pairs[0], *pairs[2:], pairs[1]]
    amounts = w.b.constant(f"{op.output}/pad", np.asarray(pairs, np.int32))
    coding = w.program.codings.get(op.output)
    value = op.attrs.get("value", 0.0 if coding is None else coding.zero_point)
    if value == (0.0 if coding is None else coding.zero_point):
        w.b.operator("PAD", [op.inputs[0], amounts], [w.tensor(op.output)], ("PadOptions", {}), 2)
        return
    if coding is None:
        number = w.b.constant(f"{op.output}/value", np.asarray([value], np.float32))
    else:
        number = w.b.constant(
            f"{op.output}/value",
            np.asarray([value], np.int16 if wide(coding) else np.int8),
            scales=[coding.scale],
            zero_points=[coding.zero_point],
        )
    w.b.operator("PADV2", [op.inputs[0], amounts, number], [w.tensor(op.output)], ("PadV2Options", {}), 2)


def _constant(w: Writer, op: Op) -> None:
    coding = w.program.codings.get(op.output)
    value = array(op.constants["value"])
    if coding is None:
        w.b.constant(op.output, value)
    else:
        w.b.constant(op.output, value, scales=[coding.scale], zero_points=[coding.zero_point])


def _reshape(w: Writer, op: Op) -> None:
    shape = w.numbers(op, "shape", op.attrs["args"][1])
    options = {"newShape": np.asarray(op.attrs["args"][1], np.int32)}
    w.b.operator("RESHAPE", [op.inputs[0], shape], [w.tensor(op.output)], ("ReshapeOptions", options), 1)


def _rescale(w: Writer, op: Op) -> None:
    """The same codes read with another scale: a reshape, which copies them as they are."""
    _reshape(
        w, dataclasses.replace(op, attrs={"args": [0, [-1 if s is None else s for s in w.shapes[op.output]]]})
    )


def _permute(w: Writer, op: Op) -> None:
    axes = w.numbers(op, "axes", op.attrs["args"][1])
    w.b.operator("TRANSPOSE", [op.inputs[0], axes], [w.tensor(op.output)], ("TransposeOptions", {}), 2)


def _slice(w: Writer, op: Op) -> None:
    axis, start, end, step = op.attrs["args"][1:5]
    _strided(w, op, axis, start, end, step, shrink=False)


def _select(w: Writer, op: Op) -> None:
    axis, index = op.attrs["args"][1:3]
    _strided(w, op, axis, index, index + 1, 1, shrink=True)


def _strided(w: Writer, op: Op, axis: int, start: int, end: int, step: int, shrink: bool) -> None:
    rank = len(w.shapes[op.inputs[0]])
    others = sum(1 << i for i in range(rank) if i != axis)
    begins, ends, steps = [0] * rank, [0] * rank, [1] * rank
    begins[axis], ends[axis], steps[axis] = start, end, step
    options = {"beginMask": others, "endMask": others, "shrinkAxisMask": 1 << axis if shrink else 0}
    names = [w.numbers(op, role, v) for role, v in (("begin", begins), ("end", ends), ("steps", steps))]
    w.b.operator(
        "STRIDED_SLICE", [op.inputs[0], *names], [w.tensor(op.output)], ("StridedSliceOptions", options), 2
    )


def _tile(w: Writer, op: Op) -> None:
    repeats = w.numbers(op, "repeats", op.attrs["args"][1])
    w.b.operator("TILE", [op.inputs[0], repeats], [w.tensor(op.output)], ("TileOptions", {}), 2)


def _nearest(w: Writer, op: Op) -> None:
    size = w.numbers(op, "size", op.attrs["args"][1])
    options = {"alignCorners": False, "halfPixelCenters": False}
    w.b.operator(
        "RESIZE_NEAREST_NEIGHBOR", [op.inputs[0], size], [w.tensor(op.output)],
        ("ResizeNearestNeighborOptions", options), 2,
    )  # fmt: skip


OPERATORS: dict[str, Write] = {
    **FLOAT_OPERATORS,
    **LAYERS,
    "quantize": simple("QUANTIZE", "QuantizeOptions", 1),
    "dequantize": simple("DEQUANTIZE", "DequantizeOptions", 2),
    "rescale": _rescale,
    "requantize": simple("QUANTIZE", "QuantizeOptions", 2),
    "constant": _constant,
    "conv": _conv,
    "linear": _linear,
    "matmul": simple("BATCH_MATMUL", "BatchMatMulOptions", 2, adjX=False, adjY=False),
    "add": _add,
    "mul": simple("MUL", "MulOptions", fuses=True),
    "avg_pool": _avg_pool,
    "global_avg_pool": _mean,
    "concat": _concat,
    "softmax": simple("SOFTMAX", "SoftmaxOptions", 2, beta=1.0),
    "table": _table,
    "leaky_relu": _leaky_relu,
    "hard_swish": simple("HARD_SWISH", "HardSwishOptions", 1),
    "clip": _clip,
    "pad": _pad,
    "aten.max_pool2d.default": _max_pool,
    "aten.reshape.default": _reshape,
    "aten.permute.default": _permute,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.repeat.default": _tile,
    "aten.upsample_nearest2d.vec": _nearest,
}
