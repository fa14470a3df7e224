"""ONNX models of half or double precision as float32 ones, which is what fewbit computes in."""

from __future__ import annotations

from typing import Any

_HALF = "__stored"


def _others() -> set[int]:
    from onnx import TensorProto

    return {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def other_floats(model: Any) -> bool:
    """Whether a model has floats that are not float32."""
    others = _others()
    graph = model.graph
    if any(t.data_type in others for t in graph.initializer):
        return True
    if any(i.type.tensor_type.elem_type in others for i in graph.input):
        return True
    return any(
        (a.name in ("to", "dtype", "output_dtype") and a.i in others) or a.t.data_type in others
        for node in graph.node
        for a in node.attribute
    )


def float32_twin(model: Any) -> Any:
    """The model in float32: stored tensors are cast when they are used, everything else computes in float32."""
    import onnx
    from onnx import TensorProto, helper

    others = _others()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type in others:
            name, tensor.name = tensor.name, tensor.name + _HALF
            casts.append(
                helper.make_node("Cast", [tensor.name], [name], name=f"{name}/Cast", to=TensorProto.FLOAT)
            )
    for node in graph.node:
        for a in node.attribute:
            if a.name in ("to", "dtype", "output_dtype") and a.i in others:
                a.i = TensorProto.FLOAT
            if a.t.data_type in others:
                values = onnx.numpy_helper.to_array(a.t).astype("float32")
                a.t.CopyFrom(onnx.numpy_helper.from_array(values, a.t.name))
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type in others:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return copy
