"""A ``.tflite`` file as checked data: every index, size and shape in it is compared with what is really there."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.errors import ArtifactError
from fewbit.targets._litert.schema import names, schema

_LARGEST = 2**31  # bytes: a flatbuffer cannot be larger
_MOST_NUMBERS = 2**28  # in one tensor
_BITS = {"FLOAT32": 32, "FLOAT16": 16, "INT32": 32, "UINT8": 8, "INT64": 64, "INT16": 16, "INT8": 8, "BOOL": 8,
         "FLOAT64": 64, "UINT32": 32, "UINT16": 16, "UINT64": 64, "INT4": 4, "INT2": 2}  # fmt: skip
_NUMPY = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT32": np.int32, "UINT8": np.uint8, "INT64": np.int64,
          "INT16": np.int16, "INT8": np.int8, "BOOL": np.bool_, "FLOAT64": np.float64}  # fmt: skip


@dataclass
class Tensor:
    """One tensor of the file. ``data`` is None where it is computed; ``shape`` has None for free sizes."""

    name: str
    kind: str
    shape: tuple[int | None, ...]
    data: np.ndarray | None
    scales: np.ndarray
    zero_points: np.ndarray
    axis: int


@dataclass
class Operator:
    """One operator: its name, its tensors' indices (-1: left out), its options by field."""

    name: str
    inputs: list[int]
    outputs: list[int]
    options: dict[str, Any]


@dataclass
class Model:
    """The one subgraph of a file."""

    tensors: list[Tensor]
    operators: list[Operator]
    inputs: list[int]
    outputs: list[int]
    metadata: dict[str, bytes]


def load(path: Path) -> Model:
    """The file's content. Raises ``ArtifactError`` for a file that is missing, damaged, or says what is not so."""
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise ArtifactError(f"{path}: {size:,} bytes, more than any .tflite file can have")
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse(content, path)


def parse(content: bytes, path: Path) -> Model:
    """A file's bytes as checked data; ``path`` is for messages."""
    if content[4:8] != b"TFL3":
        raise ArtifactError(f"{path}: not a .tflite file (its identifier is not TFL3)")
    try:
        raw = schema().ModelT.InitFromPackedBuf(content, 0)
        return _checked(raw, path)
    except ArtifactError:
        raise
    except Exception as error:  # the generated classes raise whatever a wrong offset leads to
        raise ArtifactError(f"{path}: damaged ({type(error).__name__}: {error!s:.100})") from error


def _checked(raw: Any, path: Path) -> Model:
    if raw.version != 3:
        raise ArtifactError(f"{path}: version {raw.version} found, 3 expected")
    if not raw.subgraphs or not raw.buffers or raw.operatorCodes is None:
        raise ArtifactError(f"{path}: damaged: it has no graph, no buffers or no operators")
    if len(raw.subgraphs) > 1:
        raise ArtifactError(f"{path}: {len(raw.subgraphs)} subgraphs: control flow cannot be read here")
    graph = raw.subgraphs[0]
    tensors = [_tensor(i, t, raw.buffers, path) for i, t in enumerate(graph.tensors or [])]
    _unique_names(tensors)
    count = len(tensors)
    kinds = names("BuiltinOperator")
    operators = []
    for op in graph.operators if graph.operators is not None else []:
        code = raw.operatorCodes[op.opcodeIndex]
        name = kinds.get(max(code.builtinCode, code.deprecatedBuiltinCode))
        if name is None or name == "CUSTOM":
            raise ArtifactError(
                f"{path}: an operator of its own ({_text(code.customCode)}), which nobody else knows"
            )
        inputs, outputs = _indices(op.inputs, count, path, -1), _indices(op.outputs, count, path, 0)
        operators.append(
            Operator(name, inputs, outputs, vars(op.builtinOptions) if op.builtinOptions else {})
        )
    inputs, outputs = _indices(graph.inputs, count, path, 0), _indices(graph.outputs, count, path, 0)
    _in_order(operators, inputs, outputs, tensors, path)
    return Model(tensors, operators, inputs, outputs, _metadata(raw))


def _metadata(raw: Any) -> dict[str, bytes]:
    return {
        _text(m.name): bytes(raw.buffers[m.buffer].data)
        for m in (raw.metadata or [])
        if raw.buffers[m.buffer].data is not None
    }


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _unique_names(tensors: list[Tensor]) -> None:
    seen: set[str] = set()
    for i, tensor in enumerate(tensors):
        if not tensor.name or tensor.name in seen:
            tensor.name = f"{tensor.name}#{i}"
        seen.add(tensor.name)


def _indices(values: Any, count: int, path: Path, lowest: int) -> list[int]:
    found = [int(v) for v in (values if values is not None else [])]
    if any(not lowest <= v < count for v in found):
        raise ArtifactError(
            f"{path}: damaged: it names a tensor that it does not have ({found[:8]} of {count})"
        )
    return found


def _in_order(
    operators: list[Operator], inputs: list[int], outputs: list[int], tensors: list[Tensor], path: Path
) -> None:
    known = {*inputs, -1, *(i for i, t in enumerate(tensors) if t.data is not None)}
    for op in operators:
        missing = [tensors[i].name for i in op.inputs if i not in known]
        if missing:
            raise ArtifactError(f"{path}: damaged: {op.name} reads {missing[0]!r} before it is computed")
        known.update(op.outputs)
    if not set(outputs) <= known:
        raise ArtifactError(f"{path}: damaged: an output is not computed by any operator")


def _tensor(index: int, raw: Any, buffers: list[Any], path: Path) -> Tensor:
    kind = names("TensorType").get(raw.type, str(raw.type))
    name = _text(raw.name)
    where = f"{path}: tensor {name or index!r}"
    if raw.sparsity is not None:
        raise ArtifactError(f"{where} is sparse, which cannot be read here")
    sizes = [int(s) for s in (raw.shape if raw.shape is not None else [])]
    if any(s < 0 for s in sizes):
        raise ArtifactError(f"{where} has the shape {sizes}: damaged")
    if prod(sizes) > _MOST_NUMBERS:
        raise ArtifactError(f"{where} has the shape {sizes}, more numbers than any tensor of such a file")
    if not 0 <= raw.buffer < len(buffers):
        raise ArtifactError(f"{where} has its numbers in buffer {raw.buffer}, which is not there: damaged")
    buffer = buffers[raw.buffer]
    if getattr(buffer, "offset", 0) or getattr(buffer, "size", 0):
        raise ArtifactError(f"{where} has its numbers outside of the flatbuffer, which cannot be read here")
    data = None if buffer.data is None or not len(buffer.data) else _data(buffer.data, kind, sizes, where)
    signature = [int(s) for s in (raw.shapeSignature if raw.shapeSignature is not None else [])]
    shape = tuple(None if s == -1 else n for s, n in zip(signature or sizes, sizes, strict=True))
    q = raw.quantization
    scales = np.asarray([] if q is None or q.scale is None else q.scale, np.float32)
    zeros = np.asarray([] if q is None or q.zeroPoint is None else q.zeroPoint, np.int64)
    axis = 0 if q is None else int(q.quantizedDimension)
    if len(scales) and not (np.isfinite(scales).all() and (scales > 0).all()):
        raise ArtifactError(f"{where} has scales that are not positive numbers: damaged")
    if len(zeros) not in (0, len(scales)):
        raise ArtifactError(f"{where} has {len(scales)} scales and {len(zeros)} zero points: damaged")
    if len(scales) > 1 and not (0 <= axis < len(sizes) and sizes[axis] == len(scales)):
        raise ArtifactError(f"{where} has {len(scales)} scales along axis {axis} of {sizes}: damaged")
    return Tensor(
        name, kind, shape, data, scales, zeros if len(zeros) else np.zeros(len(scales), np.int64), axis
    )


def _data(raw: Any, kind: str, sizes: list[int], where: str) -> np.ndarray:
    content = np.asarray(raw, np.uint8)
    if kind not in _BITS:
        raise ArtifactError(f"{where} holds {kind}, which cannot be read here")
    expected = (prod(sizes) * _BITS[kind] + 7) // 8
    if len(content) != expected:
        raise ArtifactError(
            f"{where}: {len(content)} bytes found, {expected} expected for {kind} {sizes}: damaged"
        )
    if kind == "INT4":
        pairs = np.stack([content & 15, content >> 4], 1).reshape(-1)[: prod(sizes)].astype(np.int8)
        return np.where(pairs > 7, pairs - 16, pairs).astype(np.int8).reshape(sizes)
    if kind not in _NUMPY:
        raise ArtifactError(f"{where} holds {kind}, which cannot be read here")
    return content.view(_NUMPY[kind]).reshape(sizes)
