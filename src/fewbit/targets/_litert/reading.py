"""Operators of a ``.tflite`` file as operations of the program, one reader an operator: integer ones and moves."""

from collections.abc import Callable
from typing import Any

import torch

from fewbit.model.codings import clamp_codes, function_values, quantize_table
from fewbit.targets._litert.codes import ACTIVATIONS, NATIVE
from fewbit.targets._litert.model import Operator
from fewbit.targets._litert.reader import Reading
from fewbit.targets._litert.rules import same_padding
from fewbit.targets._litert.schema import names

Read = Callable[[Reading, Operator], None]


def clamp(r: Reading, op: Operator) -> dict[str, Any]:
    """The fused activation as a clamp of codes."""
    number = int(op.options.get("fusedActivationFunction", 0))
    name = names("ActivationFunctionType").get(number, "NONE")
    coding = r.codings[r.tensor(op.outputs[0]).name]
    if name == "NONE":
        return {}
    if name not in ACTIVATIONS:
        raise r.fail(op, f"the fused activation {name} cannot be read")
    return {"clamp": clamp_codes(ACTIVATIONS[name], coding)}


def padding(r: Reading, op: Operator, kernel: tuple[int, int], dilation: tuple[int, int]) -> list[int]:
    """Zeros around the image, as torch wants them: left, right, top, bottom."""
    stride = (int(op.options["strideH"]), int(op.options["strideW"]))
    if int(op.options["padding"]) == 1:
        return []
    height, width = (r.tensor(op.inputs[0]).shape[i] for i in (1, 2))
    if height is None or width is None:
        raise r.fail(op, "images of free size with padding SAME cannot be read")
    flat = [
        *same_padding(width, kernel[1], stride[1], dilation[1]),
        *same_padding(height, kernel[0], stride[0], dilation[0]),
    ]
    return flat if any(flat) else []


def _weights(r: Reading, op: Operator, axes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    weight = r.tensor(op.inputs[1])
    if weight.kind not in ("INT8", "INT4") or not len(weight.scales) or weight.zero_points.any():
        raise r.fail(
            op, f"weights of {weight.kind} with {len(weight.scales)} scales; expected symmetric int8"
        )
    data = torch.from_numpy(r.data(op.inputs[1], "its weight").copy()).permute(axes).contiguous()
    scale = torch.from_numpy(weight.scales.copy())
    constants = {
        "weight": data,
        "weight_scale": scale.expand(data.shape[0]).clone() if len(scale) == 1 else scale,
    }
    if len(op.inputs) > 2 and op.inputs[2] >= 0:
        constants["bias"] = torch.from_numpy(r.data(op.inputs[2], "its bias").copy())
        expected = torch.int64 if r.tensor(op.inputs[0]).kind == "INT16" else torch.int32
        if constants["bias"].dtype != expected:
            raise r.fail(op, f"a bias of {r.tensor(op.inputs[2]).kind} beside such codes cannot be read")
    return constants


def _convolution(r: Reading, op: Operator, depthwise: bool) -> None:
    constants = _weights(r, op, (3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
    weight = constants["weight"]
    kernel = (weight.shape[2], weight.shape[3])
    dilation = (int(op.options["dilationHFactor"]), int(op.options["dilationWFactor"]))
    channels = r.tensor(op.inputs[0]).shape[3]
    groups = (channels or 1) if depthwise else (channels or 1) // weight.shape[1]
    attrs = {
        "stride": [int(op.options["strideH"]), int(op.options["strideW"])],
        "dilation": list(dilation),
        "groups": groups,
        "pad": padding(r, op, kernel, dilation),
        "layout": "NHWC",
    }
    r.add(op, "conv", "integer", [r.value(op.inputs[0])], attrs | clamp(r, op), constants)


def _conv(r: Reading, op: Operator) -> None:
    _convolution(r, op, depthwise=False)


def _depthwise(r: Reading, op: Operator) -> None:
    _convolution(r, op, depthwise=True)


def _linear(r: Reading, op: Operator) -> None:
    constants = _weights(r, op, (0, 1))
    source, name = r.tensor(op.inputs[0]), r.value(op.inputs[0])
    features = constants["weight"].shape[1]
    if source.shape[-1] != features or (len(source.shape) != 2 and not op.options.get("keepNumDims")):
        name = _flattened(r, op, name, features)
    r.add(op, "linear", "integer", [name], clamp(r, op) | {"shape": [None, features]}, constants)


def _flattened(r: Reading, op: Operator, name: str, features: int) -> str:
    """The operator's input as rows of features, which it makes of any shape by itself."""
    flat = f"{r.tensor(op.outputs[0]).name}/rows"
    r.codings[flat] = r.codings[name]
    r.ops.append(moved("aten.reshape.default", name, flat, [[-1, features]], coded=True))
    return flat


def moved(target: str, source: str, output: str, args: list[Any], coded: bool) -> Any:
    """An operation that only moves numbers."""
    from fewbit.model.program import Op

    attrs = {"target": target, "args": [{"$": 0}, *args], "kwargs": {}}
    return Op(target, "shares" if coded else "float", output, output, [source], output, attrs)


def agrees(r: Reading, op: Operator, sizes: list[int | None]) -> None:
    """The output has these sizes (None: not asked), so that a damaged number cannot ask for all memory."""
    stated = r.tensor(op.outputs[0]).shape
    if any(s is not None and t is not None and s != t for s, t in zip(sizes, stated, strict=True)):
        raise r.fail(op, f"its output has the shape {stated}, but {sizes} would be computed: damaged")


def move(r: Reading, op: Operator, target: str, args: list[Any]) -> None:
    """An operator that only moves numbers."""
    name = r.tensor(op.outputs[0]).name
    r.ops.append(moved(target, r.value(op.inputs[0]), name, args, r.coded(op)))


def _binary(kind: str) -> Read:
    def read(r: Reading, op: Operator) -> None:
        if r.tensor(op.outputs[0]).kind == "INT16" and op.options.get("potScaleInt16"):
            raise r.fail(op, "a sum of 16-bit codes whose scales are powers of two cannot be read")
        r.add(op, kind, "integer", [r.value(i) for i in op.inputs], clamp(r, op))

    return read


def _mean(r: Reading, op: Operator) -> None:
    axes = sorted(
        int(a) % len(r.tensor(op.inputs[0]).shape) for a in r.data(op.inputs[1], "its axes").reshape(-1)
    )
    if axes != [1, 2] or len(r.tensor(op.inputs[0]).shape) != 4:
        raise r.fail(op, f"a mean of codes over axes {axes} cannot be read")
    attrs: dict[str, Any] = {"layout": "NHWC"} | ({} if op.options.get("keepDims") else {"squeeze": True})
    r.add(op, "global_avg_pool", "integer", [r.value(op.inputs[0])], attrs)


def _window(op: Operator) -> tuple[list[int], list[int]]:
    kernel = [int(op.options["filterHeight"]), int(op.options["filterWidth"])]
    return kernel, [int(op.options["strideH"]), int(op.options["strideW"])]


def _avg_pool(r: Reading, op: Operator) -> None:
    kernel, stride = _window(op)
    if padding(r, op, (kernel[0], kernel[1]), (1, 1)):
        raise r.fail(op, "an average of codes over padded images cannot be read")
    r.add(op, "avg_pool", "integer", [r.value(op.inputs[0])],
          {"kernel": kernel, "stride": stride, "layout": "NHWC"} | clamp(r, op))  # fmt: skip


def _max_pool(r: Reading, op: Operator) -> None:
    kernel, stride = _window(op)
    pad = padding(r, op, (kernel[0], kernel[1]), (1, 1))
    if pad and (pad[0] != pad[1] or pad[2] != pad[3]):
        raise r.fail(op, "a maximum over images padded on one side cannot be read")
    sides = [pad[2], pad[0]] if pad else [0, 0]
    move(r, op, "aten.max_pool2d.default", [kernel, stride, sides])
    r.ops[-1].attrs["layout"] = "NHWC"


def _concat(r: Reading, op: Operator) -> None:
    rank = len(r.tensor(op.outputs[0]).shape)
    axis = int(op.options["axis"]) % rank
    r.add(op, "concat", "integer", [r.value(i) for i in op.inputs], {"axis": axis})


def _softmax(r: Reading, op: Operator) -> None:
    if float(op.options.get("beta", 1.0)) != 1.0:
        raise r.fail(op, "a softmax of codes with beta cannot be read")
    r.add(op, "softmax", "integer", [r.value(op.inputs[0])])


def _table(target: str) -> Read:
    def read(r: Reading, op: Operator) -> None:
        kwargs = {"approximate": "tanh"} if op.options.get("approximate") else {}
        function = {"target": target, "args": [{"$": 0}], "kwargs": kwargs}
        source, coding = r.value(op.inputs[0]), r.codings[r.tensor(op.outputs[0]).name]
        table = quantize_table(function_values(function, r.codings[source]), coding)
        r.add(op, "table", "integer", [source], {"function": function}, {"table": table})

    return read


def _leaky_relu(r: Reading, op: Operator) -> None:
    r.add(op, "leaky_relu", "integer", [r.value(op.inputs[0])], {"alpha": float(op.options["alpha"])})


def _hard_swish(r: Reading, op: Operator) -> None:
    r.add(op, "hard_swish", "integer", [r.value(op.inputs[0])])


def _relu(name: str) -> Read:
    def read(r: Reading, op: Operator) -> None:
        source = r.value(op.inputs[0])
        coding = r.codings[r.tensor(op.outputs[0]).name]
        kind = "clip" if r.codings[source] == coding else "requantize"
        r.add(op, kind, "integer", [source], {"clamp": clamp_codes(ACTIVATIONS[name], coding)})

    return read


def _bound(lower: bool) -> Read:
    """A maximum or minimum with one constant code."""

    def read(r: Reading, op: Operator) -> None:
        coding = r.codings[r.tensor(op.outputs[0]).name]
        code = int(r.data(op.inputs[1], "its bound").reshape(-1)[0])
        if r.data(op.inputs[1], "its bound").size != 1 or r.coding(r.tensor(op.inputs[1])) != coding:
            raise r.fail(op, "expected one number with the scale of the codes as its bound")
        limits = [code, int(coding.scheme.qmax)] if lower else [int(coding.scheme.qmin), code]
        r.add(op, "clip", "integer", [r.value(op.inputs[0])], {"clamp": limits})

    return read


def _quantize(r: Reading, op: Operator) -> None:
    source = r.value(op.inputs[0])
    if source in r.codings:
        r.add(op, "requantize", "integer", [source])
    else:
        r.add(op, "quantize", "boundary", [source])


def _dequantize(r: Reading, op: Operator) -> None:
    r.add(op, "dequantize", "boundary", [r.value(op.inputs[0])])


def _pad(r: Reading, op: Operator) -> None:
    pairs = r.data(op.inputs[1], "its amounts").reshape(-1, 2).tolist()
    before = r.tensor(op.inputs[0]).shape
    agrees(r, op, [None if n is None else n + a + b for n, (a, b) in zip(before, pairs, strict=True)])
    attrs: dict[str, Any] = {"pad": [int(p) for pair in reversed(pairs) for p in pair]}
    if len(op.inputs) > 2:
        attrs["value"] = int(r.data(op.inputs[2], "its value").reshape(-1)[0])
    r.add(op, "pad", "integer", [r.value(op.inputs[0])], attrs)


def _reshape(r: Reading, op: Operator) -> None:
    shape = r.tensor(op.outputs[0]).shape
    if len(op.inputs) > 1 and r.tensor(op.inputs[1]).data is not None:
        sizes = [int(s) for s in r.data(op.inputs[1], "its shape")]
    else:
        sizes = [-1 if s is None else s for s in shape]
    source, output = r.value(op.inputs[0]), r.tensor(op.outputs[0]).name
    if r.codings.get(source) != r.codings.get(output):  # the same codes, read with another scale
        r.add(op, "rescale", "shares", [source])
        return
    move(r, op, "aten.reshape.default", [sizes])


def _transpose(r: Reading, op: Operator) -> None:
    move(r, op, "aten.permute.default", [[int(a) for a in r.data(op.inputs[1], "its axes")]])


def _strided_slice(r: Reading, op: Operator) -> None:
    rank = len(r.tensor(op.inputs[0]).shape)
    begins, ends, steps = ([int(v) for v in r.data(i, "its range")] for i in op.inputs[1:4])
    open_ = int(op.options["beginMask"]) & int(op.options["endMask"])
    cut = [i for i in range(rank) if not open_ >> i & 1]
    shrink = int(op.options["shrinkAxisMask"])
    if len(cut) != 1 or int(op.options["ellipsisMask"]) or int(op.options["newAxisMask"]):
        raise r.fail(op, "a slice along several axes cannot be read")
    axis = cut[0]
    if shrink:
        move(r, op, "aten.select.int", [axis, begins[axis]])
    else:
        move(r, op, "aten.slice.Tensor", [axis, begins[axis], ends[axis], steps[axis]])


def _tile(r: Reading, op: Operator) -> None:
    repeats = [int(n) for n in r.data(op.inputs[1], "its repeats")]
    before = r.tensor(op.inputs[0]).shape
    agrees(r, op, [None if n is None else n * m for n, m in zip(before, repeats, strict=True)])
    move(r, op, "aten.repeat.default", [repeats])


def _nearest(r: Reading, op: Operator) -> None:
    if op.options.get("alignCorners") or op.options.get("halfPixelCenters"):
        raise r.fail(op, "a nearest neighbour by other rules than the plain one cannot be read")
    size = [int(n) for n in r.data(op.inputs[1], "its size")]
    agrees(r, op, [None, *size, None])
    move(r, op, "aten.upsample_nearest2d.vec", [size, None])
    r.ops[-1].attrs["layout"] = "NHWC"


def _matmul(r: Reading, op: Operator) -> None:
    if op.options.get("adjX") or op.options.get("adjY"):
        raise r.fail(op, "a product with a transposed operand cannot be read")
    r.add(op, "matmul", "integer", [r.value(i) for i in op.inputs])


INTEGER_READERS: dict[str, Read] = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": _linear,
    "BATCH_MATMUL": _matmul,
    "ADD": _binary("add"),
    "MUL": _binary("mul"),
    "AVERAGE_POOL_2D": _avg_pool,
    "MEAN": _mean,
    "CONCATENATION": _concat,
    "SOFTMAX": _softmax,
    "LEAKY_RELU": _leaky_relu,
    "HARD_SWISH": _hard_swish,
    "MAXIMUM": _bound(lower=True),
    "MINIMUM": _bound(lower=False),
    "PAD": _pad,
    "PADV2": _pad,
    **{name: _relu(name) for name in ACTIVATIONS},
    **{name: _table(target) for target, name in NATIVE.items()},
}
BOTH: dict[str, Read] = {
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "MAX_POOL_2D": _max_pool,
    "RESHAPE": _reshape,
    "TRANSPOSE": _transpose,
    "STRIDED_SLICE": _strided_slice,
    "TILE": _tile,
    "RESIZE_NEAREST_NEIGHBOR": _nearest,
}


# Kernels that answer 16-bit codes from tables of their own, which fewbit does not reproduce.
INEXACT_WIDE = frozenset({*NATIVE.values(), "SOFTMAX"})
READERS: dict[str, Read] = INTEGER_READERS | BOTH
