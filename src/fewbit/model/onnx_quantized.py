"""Quantized ONNX files as float ones: the rounding of activations is left out and recorded, what clamps stays.

The result is an ONNX model again, so that what is read of it can be proven against ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.errors import ModelError
from fewbit.model.onnx_products import PRODUCTS
from fewbit.model.onnx_twin import Coding, Record, Twin, weight_name

DOMAINS = ("", "ai.onnx", "com.microsoft")
_MOVING = frozenset({"Reshape", "Transpose", "MaxPool", "Slice", "Split", "Gather", "Concat", "Squeeze", "Unsqueeze",
                     "Flatten", "Expand", "Tile", "Identity", "DepthToSpace", "SpaceToDepth", "Resize", "ReduceMax",
                     "ReduceMin", "GatherElements", "Dropout"})  # fmt: skip
_POSITIVE = frozenset({"Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs", "Exp", "Softplus"})
_BOUNDED = frozenset({"Clip", "Tanh", "Sigmoid", "Softmax", "HardSigmoid", "Erf", "Sin", "Cos"})
_KEEPS_SIGN = _MOVING - {"Concat"} | {"AveragePool", "GlobalAveragePool", "GlobalMaxPool"}


def is_quantized(model: Any) -> bool:
    """Whether a file computes with codes."""
    return any(n.op_type in _RULES and n.domain in DOMAINS for n in model.graph.node)


def float_twin(model: Any, path: Path) -> tuple[Any, Record]:
    """The model without rounding of activations, and the scales that it had.

    Weights stay codes with a DequantizeLinear, which the reader folds. A clamp that a quantizer did stays where it is
    an activation function: at zero from below, or where codes are clipped. The record has for every value or
    weight "scale", "zero_point", "format" and "axis".
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    twin = Twin(copy, path)
    for node in model.graph.node:
        _rewrite(twin, node)
    del copy.graph.node[:]
    copy.graph.node.extend(twin.nodes)
    del copy.graph.value_info[:]
    for output in copy.graph.output:
        if output.name in twin.codes:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return copy, twin.record


def _rewrite(twin: Twin, node: Any) -> None:
    inputs = [name for name in node.input if name]
    rule = _RULES.get(node.op_type) if node.domain in DOMAINS else None
    if node.op_type == "Constant" or (inputs and all(name in twin.constant for name in inputs)):
        twin.constant |= set(node.output)
        _record_weight(twin, node)
        twin.nodes.append(node)
    elif rule is not None:
        rule(twin, node)
    elif node.output[0] in twin.scaled:
        twin.add("Identity", [twin.scaled[node.output[0]]], node)
    elif node.op_type not in ("Shape", "Size") and any(name in twin.codes for name in inputs):
        _moved(twin, node)
    else:
        kept = node.op_type in _KEEPS_SIGN and inputs and inputs[0] in twin.positive
        if node.op_type in _POSITIVE or kept:
            twin.positive |= set(node.output)
        if node.op_type in _BOUNDED:
            twin.bounded |= set(node.output)
        twin.nodes.append(node)


def _record_weight(twin: Twin, node: Any) -> None:
    if node.op_type != "DequantizeLinear":
        return
    source = node.input[0]
    while (maker := twin.makers.get(source)) is not None and maker.op_type in (
        "Cast",
        "Reshape",
        "QuantizeLinear",
    ):
        source = maker.input[0]  # codes that are cast before they are used, or made of a float weight
    made = twin.makers.get(node.input[0])
    coded = "" if made is not None and made.op_type == "QuantizeLinear" else source
    try:
        twin.record[weight_name(source)] = twin.coding(node, weight=coded).json()
    except ModelError:
        return  # scales calculated from constants: folded all the same, only not recorded


# ---- rules ------------------------------------------------------------------------------------------------


def _quantize(twin: Twin, node: Any) -> None:
    x, coding = node.input[0], twin.coding(node)
    twin.record[x] = coding.json()
    ramp = None if x in twin.bounded else coding.ramp
    if ramp is not None:
        limits = [twin.store(f"{node.output[0]}__{at}", np.float32(v)) for at, v in enumerate(ramp)]
        twin.add("Clip", [x, *limits], node)
    else:
        twin.add("Relu" if coding.clamps_at_zero and x not in twin.positive else "Identity", [x], node)
    if coding.clamps_at_zero or x in twin.positive:
        twin.positive.add(node.output[0])
    twin.codes[node.output[0]] = coding


def _dequantize(twin: Twin, node: Any) -> None:
    known = twin.codes.get(node.input[0])
    if known is None:
        twin.nodes.append(node)  # of codes that are inputs of the model
        return
    coding = twin.coding(node)
    same = np.array_equal(known.scale, coding.scale) and np.array_equal(
        known.zero_point.astype(np.int64), coding.zero_point.astype(np.int64)
    )
    if same:
        twin.add("Identity", [node.input[0]], node)
    else:
        _rescaled(twin, node, known, coding)
    if node.input[0] in twin.positive and same:
        twin.positive.add(node.output[0])


def _rescaled(twin: Twin, node: Any, known: Coding, coding: Coding) -> None:
    """Codes that are read with another scale or zero point than they were made with: a product and a sum."""
    from onnx import helper

    if known.scale.size != 1 or coding.scale.size != 1:
        raise ModelError(
            f"{node.name!r:.80} reads codes with other scales than they were made with: expected the same"
        )
    name, result = node.input[0], node.output[0]
    factor = twin.store(f"{result}__factor", np.float32(coding.scale.item() / known.scale.item()))
    shift = (int(known.zero_point.item()) - int(coding.zero_point.item())) * coding.scale.item()
    if not shift:
        twin.add("Mul", [name, factor], node)
        return
    twin.nodes.append(helper.make_node("Mul", [name, factor], [f"{result}__product"]))
    twin.add("Add", [f"{result}__product", twin.store(f"{result}__shift", np.float32(shift))], node)


def _moved(twin: Twin, node: Any) -> None:
    """An operator on codes: numbers that move keep what they stand for; limits and fillings become floats."""
    import onnx

    coding = next(twin.codes[name] for name in node.input if name in twin.codes)
    if node.op_type not in _MOVING | {"Clip", "Pad"} or coding.scale.size != 1:
        raise ModelError(
            f"{node.name!r:.80} ({node.op_type}) computes with codes: expected DequantizeLinear before it"
        )
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if node.op_type in ("Clip", "Pad"):
        _limits(twin, node, copy, coding)
    twin.nodes.append(copy)
    for name in node.output[:1] if node.op_type == "Dropout" else node.output:
        twin.codes[name] = coding
        if node.input[0] in twin.positive and node.op_type != "Pad":
            twin.positive.add(name)


def _limits(twin: Twin, node: Any, copy: Any, coding: Coding) -> None:
    """Codes among a node's inputs as the floats that they stand for. A limit that every code keeps is none."""
    bounds = np.iinfo(coding.format) if coding.format in ("int8", "uint8", "int16", "uint16") else None
    inputs = list(node.input)
    for at in (2,) if node.op_type == "Pad" else (1, 2):
        if len(inputs) <= at or not inputs[at]:
            if node.op_type == "Pad" and coding.zero_point.item():
                inputs += [""] * (at + 1 - len(inputs))
                inputs[at] = twin.store(f"{node.output[0]}__fill", np.float32(coding.value(0)))
            continue
        code = int(twin.stored(inputs[at]).item())
        every = (
            bounds is not None and code == (bounds.min if at == 1 else bounds.max) and node.op_type == "Clip"
        )
        inputs[at] = (
            "" if every else twin.store(f"{node.output[0]}__{at}", np.array(coding.value(code), np.float32))
        )
    while inputs and not inputs[-1]:
        inputs.pop()
    lowest = node.input[1] if node.op_type == "Clip" and len(node.input) > 1 else ""
    if lowest and coding.value(int(twin.stored(lowest).item())) >= 0:
        twin.positive |= set(node.output)
    del copy.input[:]
    copy.input.extend(inputs)


_RULES: dict[str, Callable[[Twin, Any], None]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    **PRODUCTS,
}

QUANTIZED = frozenset(_RULES)
