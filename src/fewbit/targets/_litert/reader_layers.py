"""Float layers of a ``.tflite`` file: convolutions, linear layers, pooling and resizing of images."""

import math
from typing import Any

import torch
from torch import Tensor

from fewbit.model.program import Op
from fewbit.targets._litert.model import Operator
from fewbit.targets._litert.reader import Reading
from fewbit.targets._litert.reader_floats import READERS_FLOAT, Read, clamped, finish, numbers, step
from fewbit.targets._litert.reading import padding
from fewbit.targets._litert.rules import same_padding


def _weight(r: Reading, op: Operator, index: int) -> Tensor | None:
    """The float32 weights of a layer, which may be stored as halves or codes; None where they are computed."""
    tensor = r.tensor(index)
    if tensor.name in r.widened:
        return r.widened[tensor.name]
    if tensor.data is None:
        return None
    if tensor.kind != "FLOAT32":
        raise r.fail(op, f"weights of {tensor.kind} beside floats cannot be read")
    return torch.from_numpy(tensor.data.copy())


def _codes(r: Reading, op: Operator, index: int) -> tuple[Tensor, Tensor] | None:
    """Codes and scales of weights that a layer reads as they are, its input quantized row by row."""
    tensor = r.tensor(index)
    if tensor.kind not in ("INT8", "INT4") or tensor.data is None:
        return None
    if not len(tensor.scales) or tensor.zero_points.any():
        raise r.fail(op, "weights with zero points beside floats cannot be read")
    return torch.from_numpy(tensor.data.copy()), torch.from_numpy(tensor.scales.copy())


def _bias(r: Reading, op: Operator, index: int) -> dict[str, Tensor]:
    if len(op.inputs) <= index or op.inputs[index] < 0:
        return {}
    name = r.tensor(op.inputs[index]).name
    if name in r.widened:
        return {"bias": r.widened[name]}
    return {"bias": torch.from_numpy(r.data(op.inputs[index], "its bias").copy()).to(torch.float32)}


def _layer(
    r: Reading,
    name: str,
    kind: str,
    source: str,
    config: dict[str, Any],
    parts: dict[str, Tensor],
    image: bool,
) -> None:
    attrs = {"type": kind, "config": config, "args": [{"$": 0}], "schemes": {}, "shapes": {}, "shape": []}
    attrs |= {"layout": "NHWC"} if image else {}
    r.ops.append(Op("module", "float", name.split(";")[0], name, [source], name, attrs, parts))


def _linear(r: Reading, op: Operator) -> None:
    source, name = r.value(op.inputs[0]), clamped(r, op)
    features = r.tensor(op.inputs[1]).shape[-1]
    shape = r.tensor(op.inputs[0]).shape
    if shape[-1] != features or (len(shape) != 2 and not op.options.get("keepNumDims")):
        source = step(r, "reshape.default", [source], f"{name}/rows", [-1, features])
    dynamic, weight = _codes(r, op, op.inputs[1]), None
    if dynamic is not None:
        constants = _coded(dynamic[0], dynamic[1]) | _bias(r, op, 2)
        _mixed(r, op, "linear", name, source, {"shape": [None, features]}, constants)
    elif (weight := _weight(r, op, op.inputs[1])) is None:
        _by_computed(r, op, name, source)
    else:
        parts = {"weight": weight} | _bias(r, op, 2)
        config = {"in_features": features, "out_features": weight.shape[0], "bias": "bias" in parts}
        _layer(r, name, "Linear", source, config, parts, image=False)
    finish(r, op)


def _by_computed(r: Reading, op: Operator, name: str, source: str) -> None:
    """Weights that were computed: a matrix product, and the bias added."""
    biased = len(op.inputs) > 2 and op.inputs[2] >= 0
    inner = f"{name}/product" if biased else name
    attrs = {"target": "aten.linear.default", "args": [{"$": 0}, {"$": 1}], "kwargs": {}}
    sources = [source, r.value(op.inputs[1])]
    r.ops.append(Op("aten.linear.default", "float", name, name, sources, inner, attrs))
    if biased:
        step(r, "add.Tensor", [inner, r.value(op.inputs[2])], name)


def _coded(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    wide = scale.expand(codes.shape[0]).clone() if scale.numel() == 1 else scale
    return {"weight": codes.contiguous(), "weight_scale": wide}


def _mixed(
    r: Reading,
    op: Operator,
    kind: str,
    name: str,
    source: str,
    attrs: dict[str, Any],
    constants: dict[str, Tensor],
) -> None:
    if kind == "linear" and not op.options.get("asymmetricQuantizeInputs"):
        raise r.fail(op, "an input quantized around zero cannot be read")
    rows = attrs | {"rows": True}
    r.ops.append(Op(f"dynamic_{kind}", "float", name.split(";")[0], name, [source], name, rows, constants))


def _convolution(depthwise: bool) -> Read:
    def read(r: Reading, op: Operator) -> None:
        axes = (3, 0, 1, 2) if depthwise else (0, 3, 1, 2)
        stored = r.tensor(op.inputs[1]).shape
        height, width = (int(stored[i] or 1) for i in (1, 2))
        dilation = [int(op.options["dilationHFactor"]), int(op.options["dilationWFactor"])]
        stride = [int(op.options["strideH"]), int(op.options["strideW"])]
        pad = padding(r, op, (height, width), (dilation[0], dilation[1]))
        channels = int(r.tensor(op.inputs[0]).shape[3] or 1)
        groups = channels if depthwise else channels // int(stored[3] or 1)
        source, name = r.value(op.inputs[0]), clamped(r, op)
        dynamic = _codes(r, op, op.inputs[1])
        if dynamic is not None:
            attrs = {"stride": stride, "dilation": dilation, "groups": groups, "pad": pad, "layout": "NHWC"}
            constants = _coded(dynamic[0].permute(axes), dynamic[1]) | _bias(r, op, 2)
            _mixed(r, op, "conv", name, source, attrs, constants)
            finish(r, op)
            return
        weight = _weight(r, op, op.inputs[1])
        if weight is None:
            raise r.fail(op, "its weight is computed: expected a constant")
        parts = {"weight": weight.permute(axes).contiguous()} | _bias(r, op, 2)
        source, sides = _sides(r, name, source, pad, 0.0)
        config = {
            "in_channels": channels, "out_channels": parts["weight"].shape[0], "kernel_size": [height, width],
            "stride": stride, "padding": sides, "dilation": dilation, "groups": groups, "bias": "bias" in parts,
            "padding_mode": "zeros",
        }  # fmt: skip
        _layer(r, name, "Conv2d", source, config, parts, image=True)
        finish(r, op)

    return read


def _sides(r: Reading, name: str, source: str, pad: list[int], value: float) -> tuple[str, list[int]]:
    """The same padding on both sides of each axis is the layer's own; other padding is a step before."""
    if not pad:
        return source, [0, 0]
    if pad[0] == pad[1] and pad[2] == pad[3]:
        return source, [pad[2], pad[0]]
    number: Any = {"float": str(value)} if math.isinf(value) else value
    return step(r, "pad.default", [source], f"{name}/padded", [0, 0, *pad], "constant", number), [0, 0]


def _transposed(r: Reading, op: Operator) -> None:
    """The whole transposed convolution, of which the operator's output is the part in the middle."""
    weight = _weight(r, op, op.inputs[1])
    if weight is None:
        raise r.fail(op, "its weight is computed: expected a constant")
    weight = weight.permute(3, 0, 1, 2).contiguous()
    wanted = numbers(r, op.inputs[0], "its shape")[1:3]
    sizes = [int(s or 1) for s in r.tensor(op.inputs[2]).shape[1:3]]
    stride, kernel = [int(op.options["strideH"]), int(op.options["strideW"])], list(weight.shape[2:])
    whole = [(n - 1) * s + k for n, s, k in zip(sizes, stride, kernel, strict=True)]
    room = [max(w - f, 0) for w, f in zip(wanted, whole, strict=True)]
    same = int(op.options["padding"]) == 0
    starts = [
        same_padding(w, k, s, 1)[0] if same else 0 for w, k, s in zip(wanted, kernel, stride, strict=True)
    ]
    parts = {"weight": weight} | _bias(r, op, 3)
    config = {
        "in_channels": weight.shape[0], "out_channels": weight.shape[1], "kernel_size": kernel, "stride": stride,
        "padding": [0, 0], "output_padding": room, "groups": 1, "bias": "bias" in parts, "dilation": [1, 1],
        "padding_mode": "zeros",
    }  # fmt: skip
    name, source = clamped(r, op), r.value(op.inputs[2])
    cuts = [i for i in range(2) if whole[i] + room[i] != wanted[i]]
    _layer(r, f"{name}/whole" if cuts else name, "ConvTranspose2d", source, config, parts, image=True)
    current = f"{name}/whole"
    for i in cuts:
        output = name if i == cuts[-1] else f"{name}/cut"
        current = step(r, "slice.Tensor", [current], output, 1 + i, starts[i], starts[i] + wanted[i], 1)
    finish(r, op)


def _pool(r: Reading, op: Operator) -> None:
    """The runtime's mean leaves out what is padded; its maximum pads with nothing that could be the largest."""
    kernel = [int(op.options["filterHeight"]), int(op.options["filterWidth"])]
    stride = [int(op.options["strideH"]), int(op.options["strideW"])]
    pad = padding(r, op, (kernel[0], kernel[1]), (1, 1))
    source, name = r.value(op.inputs[0]), clamped(r, op)
    if op.name == "MAX_POOL_2D":
        source, sides = _sides(r, name, source, pad, -math.inf)
        step(r, "max_pool2d.default", [source], name, kernel, stride, sides, layout="NHWC")
    elif not pad or (pad[0] == pad[1] and pad[2] == pad[3]):
        sides = [pad[2], pad[0]] if pad else [0, 0]
        step(r, "avg_pool2d.default", [source], name, kernel, stride, sides, False, False, layout="NHWC")
    else:
        _mean_of_what_is_there(r, op, name, source, (kernel, stride, pad))
    finish(r, op)


def _mean_of_what_is_there(
    r: Reading, op: Operator, name: str, source: str, window: tuple[list[int], list[int], list[int]]
) -> None:
    """A mean over zeros and numbers, times a constant for each place: how many of how many are numbers."""
    kernel, stride, pad = window
    _, height, width, _ = r.tensor(op.inputs[0]).shape
    ones = torch.nn.functional.pad(torch.ones(1, 1, int(height or 1), int(width or 1)), pad)
    factor = 1 / torch.nn.functional.avg_pool2d(ones, kernel, stride)
    padded = step(r, "pad.default", [source], f"{name}/padded", [0, 0, *pad], "constant", 0.0)
    mean = step(r, "avg_pool2d.default", [padded], f"{name}/mean", kernel, stride, layout="NHWC")
    constant = f"{name}/factor"
    value = factor.permute(0, 2, 3, 1).contiguous()
    r.ops.append(Op("constant", "float", name, constant, [], constant, {}, {"value": value}))
    step(r, "mul.Tensor", [mean, constant], name)


def _bilinear(r: Reading, op: Operator) -> None:
    size, align = numbers(r, op.inputs[1], "its size"), bool(op.options.get("alignCorners"))
    if not align and not op.options.get("halfPixelCenters"):
        raise r.fail(op, "corners of pixels in place of their centers cannot be read")
    name = r.tensor(op.outputs[0]).name
    step(r, "upsample_bilinear2d.vec", [r.value(op.inputs[0])], name, size, align, None, layout="NHWC")


READERS_LAYERS: dict[str, Read] = READERS_FLOAT | {
    "FULLY_CONNECTED": _linear,
    "CONV_2D": _convolution(depthwise=False),
    "DEPTHWISE_CONV_2D": _convolution(depthwise=True),
    "TRANSPOSE_CONV": _transposed,
    "AVERAGE_POOL_2D": _pool,
    "MAX_POOL_2D": _pool,
    "RESIZE_BILINEAR": _bilinear,
}
