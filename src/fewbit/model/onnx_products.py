"""Integer products of quantized ONNX files as float ones: QLinear operators, and those with dynamic scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fewbit.errors import ModelError
from fewbit.model.onnx_twin import Coding, Twin, weight_name

Rule = Callable[[Twin, Any], None]


def _dynamic(twin: Twin, node: Any) -> None:
    """Codes of a range that is found at run time: here the numbers themselves, with a scale of one."""
    twin.add("Identity", [node.input[0]], node)
    twin.codes[node.output[0]] = Coding(np.ones((), np.float32), np.zeros((), np.uint8), "uint8", None)
    twin.record[node.input[0]] = {"scale": None, "zero_point": None, "format": "uint8", "axis": None}
    twin.store(node.output[1], np.array(1, np.float32))
    if len(node.output) > 2:
        twin.store(node.output[2], np.array(0, np.uint8))


def _integer_product(op: str) -> Rule:
    """MatMulInteger, ConvInteger. The scale that the file multiplies on afterwards belongs to the weight."""

    def rule(twin: Twin, node: Any) -> None:
        x, weight, result = node.input[0], node.input[1], node.output[0]
        if x not in twin.codes or weight not in twin.constant:
            raise ModelError(
                f"{node.name!r:.80} ({node.op_type}): expected codes of DynamicQuantizeLinear and a weight"
            )
        zero = node.input[3] if len(node.input) > 3 else ""
        scale = _scale_of(twin, result)
        axis = 0 if op == "Conv" else len(twin.tensors[weight].dims) - 1
        values = np.ones((), np.float32) if scale is None else scale
        _weight(twin, node, weight, values, zero, axis)
        twin.add(op, [x, f"{result}__weight"], node, attributes=True)

    return rule


def _scale_of(twin: Twin, result: str) -> np.ndarray | None:
    """The weight's scale where the file says `Cast(product) * (scale of x * scale of weight)`."""
    cast = _only(twin, result, "Cast")
    product = None if cast is None else _only(twin, cast.output[0], "Mul")
    if cast is None or product is None:
        return None
    other = next((name for name in product.input if name != cast.output[0]), "")
    scales = twin.makers.get(other)
    if scales is None or scales.op_type != "Mul":
        return None
    makers = [twin.makers.get(name) for name in scales.input]
    dynamic = [m is not None and m.op_type == "DynamicQuantizeLinear" for m in makers]
    stored = [name for name in scales.input if name in twin.tensors and twin.makers.get(name) is None]
    if sum(dynamic) != 1 or len(stored) != 1:
        return None
    scale = twin.stored(stored[0]).astype(np.float32)
    if scale.size != max(scale.shape, default=1):
        return None
    twin.scaled[product.output[0]] = cast.output[0]
    return scale.reshape(()) if scale.size == 1 else scale.reshape(-1)


def _only(twin: Twin, name: str, op: str) -> Any:
    """The one node that reads a value, if it is such an operator."""
    found = twin.readers.get(name, [])
    outputs = {o.name for o in twin.model.graph.output}
    return found[0] if len(found) == 1 and found[0].op_type == op and name not in outputs else None


def _weight(twin: Twin, node: Any, weight: str, scale: np.ndarray, zero: str, axis: int) -> None:
    """A DequantizeLinear of a stored weight, which the reader folds."""
    from onnx import helper

    result = node.output[0]
    values = twin.stored(zero) if zero else np.zeros((), np.int64)
    stored = twin.store(f"{result}__scale", scale)
    zeros = []
    if zero:
        spread = np.broadcast_to(values.reshape(-1) if values.size > 1 else values.reshape(()), scale.shape)
        zeros = [twin.store(f"{result}__zero", np.ascontiguousarray(spread).reshape(scale.shape))]
    twin.nodes.append(
        helper.make_node("DequantizeLinear", [weight, stored, *zeros], [f"{result}__weight"], axis=axis)
    )
    coding = Coding(scale, values, twin.format(weight), None if scale.size == 1 else axis)
    twin.record[weight_name(weight)] = coding.json()


def _linear(op: str) -> Rule:
    """QLinearConv, QLinearMatMul: the float operator with dequantized weights."""

    def rule(twin: Twin, node: Any) -> None:
        x, weight, result = node.input[0], node.input[3], node.output[0]
        if x not in twin.codes or weight not in twin.constant:
            raise ModelError(
                f"{node.name!r:.80} ({node.op_type}): expected codes of QuantizeLinear and a weight"
            )
        scale = twin.stored(node.input[4]).astype(np.float32)
        axis = 0 if op == "Conv" else len(twin.tensors[weight].dims) - 1
        scale = scale.reshape(()) if scale.size == 1 else scale
        _weight(twin, node, weight, scale, node.input[5], axis)
        inputs = [x, f"{result}__weight"]
        if op == "Conv" and len(node.input) > 8 and node.input[8]:
            bias = twin.stored(node.input[8]).astype(np.float32) * (twin.codes[x].scale.reshape(()) * scale)
            inputs.append(twin.store(f"{weight_name(node.input[8])}__float", bias.astype(np.float32)))
        _computed(twin, node, op, inputs, twin.coding(node, 6))

    return rule


def _computed(
    twin: Twin, node: Any, op: str, inputs: list[str], coding: Coding, attributes: bool = True
) -> None:
    """The float operator in the place of one on codes, with the clamp that its rounding was."""
    result = node.output[0]
    twin.add(op, inputs, node, attributes=attributes)
    twin.codes[result] = coding
    twin.record[result] = coding.json()
    if coding.clamps_at_zero:
        twin.nodes[-1].output[0] = f"{result}__linear"
        twin.add("Relu", [f"{result}__linear"], node)
        twin.nodes[-1].name = f"{node.name}/Relu"
        twin.positive.add(result)


def _value(twin: Twin, node: Any, at: int) -> str:
    """An input of codes as a float value; a stored one is dequantized."""
    from onnx import helper

    name = node.input[at]
    if name in twin.codes:
        return str(name)
    if name not in twin.constant:
        raise ModelError(f"{node.name!r:.80} ({node.op_type}): {name!r:.80} is no code of QuantizeLinear")
    result = f"{node.output[0]}__{at}"
    twin.nodes.append(helper.make_node("DequantizeLinear", list(node.input[at : at + 3]), [result]))
    return result


def _elementwise(op: str, operands: int, result: int) -> Rule:
    """QLinearAdd, QLinearSigmoid, ...: each operand and the result are codes, a scale and a zero point."""

    def rule(twin: Twin, node: Any) -> None:
        if any(a.name == "channels_last" and a.i for a in node.attribute):
            raise ModelError(f"{node.name!r:.80} ({node.op_type}): channels come last: expected them second")
        inputs = [_value(twin, node, 3 * at) for at in range(operands)]
        kept = [a for a in node.attribute if a.name in ("alpha", "axis")]
        _computed(twin, node, op, inputs, twin.coding(node, result), attributes=False)
        made = next(n for n in reversed(twin.nodes) if n.op_type == op)
        made.attribute.extend(kept)

    return rule


def _concat(twin: Twin, node: Any) -> None:
    inputs = [_value(twin, node, at) for at in range(2, len(node.input), 3)]
    _computed(twin, node, "Concat", inputs, twin.coding(node, 0))


def _gemm(twin: Twin, node: Any) -> None:
    x, weight = node.input[0], node.input[3]
    if x not in twin.codes or weight not in twin.constant or len(node.input) < 9:
        raise ModelError(
            f"{node.name!r:.80} (QGemm): expected codes of QuantizeLinear and a weight, codes as result"
        )
    scale = twin.stored(node.input[4]).astype(np.float32)
    scale = scale.reshape(()) if scale.size == 1 else scale
    axis = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    _weight(twin, node, weight, scale, node.input[5], axis)
    inputs = [x, f"{node.output[0]}__weight"]
    if node.input[6]:
        alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
        bias = twin.stored(node.input[6]).astype(np.float32) * (
            alpha * twin.codes[x].scale.reshape(()) * scale
        )
        inputs.append(twin.store(f"{weight_name(node.input[6])}__float", bias.astype(np.float32)))
    _computed(twin, node, "Gemm", inputs, twin.coding(node, 7))


PRODUCTS: dict[str, Rule] = {
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _integer_product("MatMul"),
    "ConvInteger": _integer_product("Conv"),
    "QLinearConv": _linear("Conv"),
    "QLinearMatMul": _linear("MatMul"),
    "QLinearAdd": _elementwise("Add", 2, 6),
    "QLinearMul": _elementwise("Mul", 2, 6),
    "QLinearSigmoid": _elementwise("Sigmoid", 1, 3),
    "QLinearLeakyRelu": _elementwise("LeakyRelu", 1, 3),
    "QLinearGlobalAveragePool": _elementwise("GlobalAveragePool", 1, 3),
    "QLinearConcat": _concat,
    "QGemm": _gemm,
}
