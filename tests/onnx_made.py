"""ONNX models for tests, put together from nodes by hand, and what ONNX Runtime makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]
TYPES = {
    "float": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL,
}  # fmt: skip


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
    graph = helper.make_graph(
        list(nodes), "made", infos, [onnx.ValueInfoProto(name=n) for n in outputs], stored
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10 if opset >= 9 else 4
    typed = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*typed.value_info, *typed.output, *infos]}
    for at, name in enumerate(outputs):
        kind = kinds.get(name) or TensorProto.FLOAT
        model.graph.output[at].CopyFrom(helper.make_tensor_value_info(name, kind, None))
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    """The path of the model, written into the folder."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def answers(path: Path, inputs: Sequence[Any]) -> list[np.ndarray]:
    """What ONNX Runtime computes, with all its optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return list(session.run(None, feeds))


class Nodes:
    """Nodes and constants of a model under construction, as the opset wants them."""

    def __init__(self, opset: int, seed: int, named: bool) -> None:
        self.opset, self.named, self.numbers = opset, named, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.parts: list[str] = []

    def op(self, op: str, inputs: Sequence[str], count: int = 1, **attrs: Any) -> Any:
        at = len(self.nodes)
        outputs = [f"v{at}_{k}" for k in range(count)]
        name = f"/part{len(self.parts)}/{op}_{at}" if self.named else ""
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=name, **attrs))
        return outputs[0] if count == 1 else outputs

    def constant(self, values: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape: int, name: str = "") -> str:
        fan = max(1, int(np.prod(shape[1:])))
        return self.constant((self.numbers.standard_normal(shape) * fan**-0.5).astype(np.float32), name)

    def with_axes(self, op: str, x: str, axes: list[int], since: int, **attrs: Any) -> str:
        """Axes are an attribute before this opset and an input from it on."""
        if self.opset < since:
            return str(self.op(op, [x], axes=axes, **attrs))
        return str(self.op(op, [x, self.ints(*axes)], **attrs))

    def batch_and(self, x: str, *rest: int) -> str:
        """The shape [batch of x, *rest], calculated as exporters do."""
        size = self.op("Gather", [self.op("Shape", [x]), self.constant(np.array(0, np.int64))], axis=0)
        parts = [self.with_axes("Unsqueeze", size, [0], 13), self.ints(*rest)]
        return str(self.op("Concat", parts, axis=0))
