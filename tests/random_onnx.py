"""ONNX models for tests: put together from nodes by hand, or drawn at random by a seed, in any opset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]
TYPES = {
    "float": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}


def made(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Shape],
    outputs: Sequence[str],
    constants: dict[str, Any] | None = None,
    opset: int = 21,
    types: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """A model of these nodes; inputs are floats unless `types` says otherwise."""
    infos = [
        helper.make_tensor_value_info(name, TYPES[(types or {}).get(name, "float")], list(shape))
        for name, shape in inputs.items()
    ]
    stored = [numpy_helper.from_array(np.asarray(v), name) for name, v in (constants or {}).items()]
    results = []
    for name in outputs:
        info = onnx.ValueInfoProto(name=name)
        results.append(info)
    graph = helper.make_graph(list(nodes), "made", infos, results, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10 if opset >= 9 else 4
    typed = onnx.shape_inference.infer_shapes(model)
    known = {v.name: v for v in [*typed.graph.value_info, *typed.graph.output, *infos]}
    for info in results:
        kind = known[info.name].type.tensor_type.elem_type if info.name in known else TensorProto.FLOAT
        graph.output[list(outputs).index(info.name)].CopyFrom(
            helper.make_tensor_value_info(info.name, kind or TensorProto.FLOAT, None)
        )
    model.graph.CopyFrom(graph)
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def answers(path: Path, inputs: Sequence[Any]) -> list[np.ndarray]:
    """What ONNX Runtime computes, with all its optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(
        session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})
    )
