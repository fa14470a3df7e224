"""Builds an ONNX graph: named nodes, initializers stored once however often they are used."""

import hashlib
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
IR_VERSION = 10

_STORAGE = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.bool_): TensorProto.BOOL,
}


class Builder:
    """Nodes and initializers of a graph under construction.

    ``tables``: whether codes of few values may be stored as indices, for a runtime that unpacks them when it loads.
    """

    def __init__(self, tables: bool = True) -> None:
        self.tables = tables
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._by_content: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """``name``, or ``name_2``, ``name_3`` ... where it is taken."""
        count = self._counts.get(name, 0) + 1
        self._counts[name] = count
        return name if count == 1 else self.unique(f"{name}_{count}")

    def constant(self, value: Any, name: str) -> str:
        """An initializer with this content; the same content is stored once. 4-bit dtypes come from ml_dtypes."""
        array = np.asarray(value)
        key = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._by_content:
            unique = self.unique(name)
            self.initializers[unique] = numpy_helper.from_array(array, unique)
            self._by_content[key] = unique
        return self._by_content[key]

    def ints(self, values: list[int] | tuple[int, ...]) -> str:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64), "shape")

    def scalar(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(np.array(value, np.float32), "scalar")

    def node(self, op: str, inputs: list[str], name: str, *, output: str | None = None, **attrs: Any) -> str:
        """A node with one output; returns the output's name."""
        return self.nodes_of(op, inputs, name, [output or self.unique(name)], **attrs)[0]

    def nodes_of(self, op: str, inputs: list[str], name: str, outputs: list[str], **attrs: Any) -> list[str]:
        """A node with the given outputs. ``name`` tells which layer it came from."""
        domain = attrs.pop("domain", "")
        self.nodes.append(
            helper.make_node(op, inputs, outputs, name=self.unique(f"{name}/{op}"), domain=domain, **attrs)
        )
        return outputs

    def model(
        self,
        name: str,
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        metadata: dict[str, str],
    ) -> onnx.ModelProto:
        """The finished model. ``metadata`` goes into the file's properties."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        if any(n.domain == "com.microsoft" for n in self.nodes):
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        model = helper.make_model(graph, opset_imports=opsets, producer_name="fewbit")
        model.ir_version = IR_VERSION
        helper.set_model_props(model, metadata)
        return model


def value_info(name: str, dtype: str, shape: tuple[int | None, ...] | None) -> onnx.ValueInfoProto:
    """A graph input or output; free sizes get a symbolic name (the first one "batch")."""
    dims = None if shape is None else [f"{name}_{i}" if s is None else s for i, s in enumerate(shape)]
    if dims and isinstance(dims[0], str):
        dims[0] = "batch"
    return helper.make_tensor_value_info(name, onnx_type(dtype), dims)


def onnx_type(dtype: str) -> int:
    """ONNX's number of a torch dtype name."""
    names = {
        "float32": "FLOAT",
        "int64": "INT64",
        "int32": "INT32",
        "bool": "BOOL",
        "uint8": "UINT8",
        "int8": "INT8",
    }
    return int(getattr(TensorProto, names[dtype]))


def int4(codes: np.ndarray, signed: bool) -> np.ndarray:
    """Codes as a 4-bit array, which an initializer stores two to a byte."""
    return codes.astype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
