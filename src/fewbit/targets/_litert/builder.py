"""Puts a ``.tflite`` file together: tensors, constants and operators of one subgraph, in the order they are added."""

from typing import Any

import numpy as np

from fewbit.model.program import Coding
from fewbit.targets._litert.schema import schema

_TYPES = {
    "float32": "FLOAT32", "float16": "FLOAT16", "int8": "INT8", "uint8": "UINT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "bool": "BOOL",
}  # fmt: skip
# Versions in which operators take 16-bit codes, where those are above what 8 bits need.
_WIDE_VERSIONS = {
    "QUANTIZE": 3, "DEQUANTIZE": 3, "CONV_2D": 5, "DEPTHWISE_CONV_2D": 5, "ADD": 4, "MUL": 5, "BATCH_MATMUL": 3,
    "AVERAGE_POOL_2D": 3, "MAX_POOL_2D": 3, "CONCATENATION": 3, "PAD": 3, "PADV2": 3, "TRANSPOSE": 4,
    "STRIDED_SLICE": 4, "RESIZE_NEAREST_NEIGHBOR": 4, "MAXIMUM": 4, "MINIMUM": 4, "RELU": 3, "RELU6": 3,
    "MEAN": 2, "FULLY_CONNECTED": 12,
}  # fmt: skip
Shape = tuple[int | None, ...]


class Builder:
    """One subgraph. Tensors are added under names and referred to by name."""

    def __init__(self) -> None:
        self.s = schema()
        self.graph = self.s.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.buffers = [self.s.BufferT()]  # the first one is empty by convention: tensors that are computed
        self.codes: dict[str, int] = {}
        self.versions: dict[str, int] = {}
        self.index: dict[str, int] = {}
        self.stored: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self.plain: dict[
            tuple[int, tuple[int, ...], str], int
        ] = {}  # constants without scales, by their numbers

    def tensor(self, name: str, shape: Shape, dtype: str, coding: Coding | None = None) -> str:
        """A tensor that an operator computes, or an input; None marks the free batch axis."""
        quantization = None
        if coding is not None:
            quantization = self.quantization([coding.scale], [coding.zero_point])
        return self._add(name, shape, dtype, quantization, 0)

    def constant(
        self, name: str, value: np.ndarray, *, scales: Any = None, zero_points: Any = None, axis: int = 0,
        dtype: str | None = None, shape: tuple[int, ...] | None = None,
    ) -> str:  # fmt: skip
        """A constant with its data; equal data is stored once. ``dtype`` and ``shape`` where the data is packed."""
        value = np.ascontiguousarray(value)
        data = value.tobytes()
        key = (str(value.dtype), value.shape, data)
        if key not in self.stored:
            buffer = self.s.BufferT()
            buffer.data = np.frombuffer(data, np.uint8)
            self.buffers.append(buffer)
            self.stored[key] = len(self.buffers) - 1
        quantization = None
        if scales is not None:
            quantization = self.quantization(scales, [0] if zero_points is None else zero_points, axis)
        stated, kind = shape if shape is not None else value.shape, dtype or str(value.dtype)
        if quantization is None and (same := self.plain.get((self.stored[key], stated, kind))) is not None:
            self.index[name] = same  # one tensor is enough for all that read these numbers
            return name
        self._add(name, stated, kind, quantization, self.stored[key])
        if quantization is None:
            self.plain[self.stored[key], stated, kind] = self.index[name]
        return name

    def operator(
        self, name: str, inputs: list[str], outputs: list[str], options: tuple[str, dict[str, Any]] | None = None,
        version: int = 1,
    ) -> None:  # fmt: skip
        """An operator; ``options``: the name of its options table and its fields. ``""`` is an input left out."""
        op = self.s.OperatorT()
        kinds = {self.graph.tensors[self.index[name]].type for name in (*inputs, *outputs) if name}
        if self.s.TensorType.INT16 in kinds:
            version = max(version, _WIDE_VERSIONS.get(name, 1))
        op.opcodeIndex = self.code(name, version)
        op.inputs = [self.index[i] if i else -1 for i in inputs]
        op.outputs = [self.index[o] for o in outputs]
        if options is not None:
            table, fields = options
            op.builtinOptionsType = getattr(self.s.BuiltinOptions, table)
            op.builtinOptions = getattr(self.s, f"{table}T")()
            for key, value in fields.items():
                if not hasattr(op.builtinOptions, key):
                    raise AttributeError(f"{table} has no field {key}")
                setattr(op.builtinOptions, key, value)
        self.graph.operators.append(op)

    def code(self, name: str, version: int) -> int:
        """The index of an operator's code; the highest version asked for is the one the file states."""
        if name not in self.codes:
            self.codes[name] = len(self.codes)
        self.versions[name] = max(version, self.versions.get(name, 1))
        return self.codes[name]

    def quantization(self, scales: Any, zero_points: Any, axis: int = 0) -> Any:
        q = self.s.QuantizationParametersT()
        q.scale = np.asarray(scales, np.float32).reshape(-1)
        q.zeroPoint = np.asarray(zero_points, np.int64).reshape(-1)
        q.quantizedDimension = axis
        return q

    def _add(self, name: str, shape: Shape, dtype: str, quantization: Any, buffer: int) -> str:
        if name in self.index:
            raise ValueError(f"tensor {name!r} is added twice")
        tensor = self.s.TensorT()
        tensor.name = name.encode()
        tensor.shape = np.asarray([1 if s is None else s for s in shape], np.int32)
        if None in shape:
            tensor.shapeSignature = np.asarray([-1 if s is None else s for s in shape], np.int32)
        tensor.type = getattr(self.s.TensorType, _TYPES.get(dtype, dtype.upper()))
        tensor.buffer = buffer
        tensor.quantization = quantization
        self.index[name] = len(self.graph.tensors)
        self.graph.tensors.append(tensor)
        return name

    def finish(self, inputs: list[str], outputs: list[str], metadata: dict[str, bytes]) -> bytes:
        """The file's bytes."""
        import flatbuffers

        self.graph.inputs = [self.index[i] for i in inputs]
        self.graph.outputs = [self.index[o] for o in outputs]
        self.graph.name = b"main"
        model = self.s.ModelT()
        model.version, model.description = 3, b"fewbit"
        model.subgraphs, model.buffers = [self.graph], self.buffers
        model.operatorCodes = [self._operator_code(name, self.versions[name]) for name in self.codes]
        model.metadata = []
        for key, data in metadata.items():
            entry, buffer = self.s.MetadataT(), self.s.BufferT()
            buffer.data = np.frombuffer(data, np.uint8)
            model.buffers.append(buffer)
            entry.name, entry.buffer = key.encode(), len(model.buffers) - 1
            model.metadata.append(entry)
        packer = flatbuffers.Builder(1 << 16)
        packer.Finish(model.Pack(packer), b"TFL3")
        return bytes(packer.Output())

    def _operator_code(self, name: str, version: int) -> Any:
        code = self.s.OperatorCodeT()
        code.builtinCode = getattr(self.s.BuiltinOperator, name)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)  # what readers from before 2020 look at
        code.version = version
        return code
