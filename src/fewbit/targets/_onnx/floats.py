"""Operators that run in float between the integer ones (or move codes about), written as ONNX nodes."""

from typing import Any

from fewbit.model.program import Op, decode_args
from fewbit.targets._onnx import floats_functions, floats_pooling, floats_products, floats_shapes
from fewbit.targets._onnx.builder import Builder
from fewbit.targets._onnx.floats_call import Call, Rule
from fewbit.targets._onnx.floats_layers import emit_module

RULES: dict[str, Rule] = {
    **floats_shapes.RULES,
    **floats_functions.RULES,
    **floats_products.RULES,
    **floats_pooling.RULES,
}


def emit_float(builder: Builder, op: Op, inputs: list[Any]) -> Any:
    """Nodes for a torch operator, a layer or arithmetic of sizes: the output's name, or a list of names."""
    if op.kind == "module":
        return emit_module(builder, op, inputs)
    if op.kind == "integers":
        return _integers(builder, op, inputs)
    call = Call(builder, op, inputs)
    rule = RULES.get(call.target)
    result = rule(call) if rule is not None else None
    if result is not None:
        return result
    from fewbit.targets._onnx.floats_fallback import (
        emit_alone,  # loads torch's exporter, which takes its time
    )

    return emit_alone(call)


def _integers(builder: Builder, op: Op, inputs: list[Any]) -> str:
    """Arithmetic of sizes, int64 vectors of one element. ONNX divides towards zero; torch takes the floor."""

    def node(op_type: str, *names: str) -> str:
        return builder.node(op_type, list(names), op.layer)

    values = decode_args(op.attrs["args"], inputs)
    names = [builder.ints([v]) if isinstance(v, int) else str(v) for v in values]
    if op.attrs["target"] == "floordiv":
        return node("Div", node("Sub", names[0], node("Mod", *names)), names[1])
    return node(
        {"add": "Add", "sub": "Sub", "mul": "Mul", "mod": "Mod", "neg": "Neg"}[op.attrs["target"]], *names
    )
