"""Weights of non-uniform formats in an ONNX file: packed indices and a table, unpacked by standard operators.

ONNX Runtime computes all of this once, when it loads the file: the file is small, and the run as fast as with float32
weights. A runtime that does not fold constants does it in every run, with the same result. Measured with ONNX Runtime
1.31 on the CPU: of the 8-bit floats, it folds a Cast, but computes a DequantizeLinear in every run, which then takes 40
times as long; it has neither for FLOAT4E2M1.
"""

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch

from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import blocks
from fewbit.targets._onnx.builder import Builder, int4

_PLANES = {
    8: 100,
    4: 200,
    2: 700,
    1: 700,
}  # widths in bits, and about what the nodes to unpack one take in bytes
_TABLE = 250  # bytes of a table and its look-up
_FEW = 256  # scales that an index of 8 bits can tell apart
_NATIVE = {
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
}


def looked_up(builder: Builder, q: QTensor, name: str, transposed: bool = False) -> str:
    """The float32 values of codes that stand for a format's or a codebook's values, bit for bit `dequantize`.

    ``transposed`` exchanges the two axes of a matrix.
    """
    rows = blocks(q.codes, q.scheme).numpy()
    values = _values(builder, q, rows, name)
    if bool((q.scale != 1).any()):
        values = builder.node("Mul", [values, _scales(builder, q, name)], name)
    if q.scheme.granularity == "tensor":
        axis, shape = 0, q.shape
    else:
        axis = q.scheme.axis % len(q.shape)
        shape = (q.shape[axis], *q.shape[:axis], *q.shape[axis + 1 :])
    if rows.shape != shape:
        values = builder.node("Reshape", [values, builder.ints(list(shape))], name)
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
    order = order[::-1] if transposed else order
    return values if order == sorted(order) else builder.node("Transpose", [values], name, perm=order)


def fewer_bytes(builder: Builder, codes: np.ndarray) -> bool:
    """Whether 8-bit numbers take fewer bytes as indices and a table of their values than as they are, or in 4 bits."""
    if not builder.tables or not codes.size:
        return False
    lo, hi = int(codes.min()), int(codes.max())
    narrow = (lo >= -8 and hi <= 7) or (lo >= 0 and hi <= 15)
    alone = min(_bytes([8], codes.size), _bytes([4], codes.size) if narrow else 2**62)
    widths = _widths(_bits(len(np.unique(codes))), codes.size)
    return _bytes(widths, codes.size) + _TABLE < alone


def numbers(builder: Builder, codes: np.ndarray, name: str) -> tuple[str, dict[str, Any]]:
    """8-bit numbers of few values as indices and a table, and what ``numbers_again`` needs to read them again."""
    values, index = np.unique(codes, return_inverse=True)
    table = builder.constant(values, f"{name}_values")
    planes: list[list[Any]] = []
    narrow = index.reshape(codes.shape).astype(np.uint8)
    found = indices(builder, narrow, _bits(len(values)), name, planes)
    parts = {"values": table, "planes": planes, "shape": list(codes.shape)}
    return builder.node("Gather", [table, found], name), parts


def numbers_again(stored: dict[str, Any], initializers: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of ``numbers``; raises ValueError, LookupError or TypeError for what it cannot have written."""
    shape = [int(n) for n in stored["shape"]]
    count, index, offset = math.prod(shape), np.zeros((), np.int64), 0
    for name, width in stored["planes"]:
        if width not in _PLANES:
            raise ValueError(f"planes have {', '.join(map(str, _PLANES))} bits, not {width!r:.40}")
        plane = initializers[name].astype(np.int64).reshape(-1)
        if width < 4:
            plane = (plane.reshape(-1, 1) >> (np.arange(8 // width) * width)).reshape(-1)
        index = index + ((plane[:count] & (2**width - 1)) << offset)
        offset += width
    return initializers[stored["values"]][index.reshape(shape)]


def indices(
    builder: Builder, codes: np.ndarray, bits: int, name: str, planes: list[list[Any]] | None = None
) -> str:
    """uint8 codes of that many bits, stored densely, as an int32 value of the same shape.

    Each plane of 8, 4, 2 or 1 bits is an initializer of its own, the codes' lowest bits first; in a byte, the first
    code has the lowest bits. Planes of 4 bits have ONNX's own type. Few codes are stored wider, where the nodes that
    unpack them would take more than they save. ``planes`` learns initializers and their widths.
    """
    planes = [] if planes is None else planes
    joined, offset = "", 0
    for width in _widths(bits, codes.size):
        part = (codes >> offset) & (2**width - 1)
        plane = _plane(builder, part, width, f"{name}_codes", planes)
        if offset:
            plane = builder.node("BitShift", [plane, _byte(builder, offset)], name, direction="LEFT")
            plane = builder.node("BitwiseOr", [joined, plane], name)
        joined, offset = plane, offset + width
    return builder.node("Cast", [joined], name, to=onnx.TensorProto.INT32)


def _widths(bits: int, count: int) -> list[int]:
    """The planes that so many codes take the fewest bytes in: as wide as the codes together, or one that is wider."""
    exact = [w for w in _PLANES if bits & w]
    choices = [exact, *([w] for w in _PLANES if w > bits)]
    return min(choices, key=lambda widths: _bytes(widths, count))


def _bits(values: int) -> int:
    """How wide an index of so many values is."""
    return max(values - 1, 1).bit_length()


def _bytes(widths: list[int], count: int) -> int:
    """About what planes of these widths take in a file, their nodes included."""
    return sum(_PLANES[width] + count * width // 8 for width in widths)


def _plane(builder: Builder, part: np.ndarray, width: int, name: str, planes: list[list[Any]]) -> str:
    """Codes of 8, 4, 2 or 1 bits as a uint8 value."""
    if width >= 4:
        stored = builder.constant(int4(part, signed=False) if width == 4 else part, name)
        planes.append([stored, width])
        if width == 8:
            return stored
        return builder.node("Cast", [stored], name, to=onnx.TensorProto.UINT8)
    each = 8 // width
    flat = np.pad(part.reshape(-1), (0, -part.size % each)).reshape(-1, each)
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(width)
    packed = np.bitwise_or.reduce(flat << shifts, axis=1, dtype=np.uint8).reshape(-1, 1)
    stored = builder.constant(packed, name)
    planes.append([stored, width])
    parts = [stored, builder.constant(shifts.reshape(1, -1), "shifts")]
    unpacked = builder.node("BitShift", parts, name, direction="RIGHT")
    value = builder.node("BitwiseAnd", [unpacked, _byte(builder, 2**width - 1)], name)
    value = builder.node("Reshape", [value, builder.ints([-1])], name)
    if flat.size != part.size:
        value = builder.node("Slice", [value, builder.ints([0]), builder.ints([part.size])], name)
    return builder.node("Reshape", [value, builder.ints(list(part.shape))], name)


def _byte(builder: Builder, value: int) -> str:
    return builder.constant(np.array(value, np.uint8), "bits")


def _values(builder: Builder, q: QTensor, rows: np.ndarray, name: str) -> str:
    """The normalised values of codes, one row per block."""
    spec = q.scheme.spec
    if spec.name in _NATIVE:
        stored = builder.constant(rows.view(_NATIVE[spec.name]), name)
        return builder.node("Cast", [stored], name, to=onnx.TensorProto.FLOAT)
    index = indices(builder, rows, spec.bits, name)
    if q.codebook is None:
        every = torch.arange(2**spec.bits).to(spec.code_dtype)
        known = spec.decode(every).nan_to_num(0.0)  # NaN: codes that the format does not use
        return builder.node("Gather", [builder.constant(known.numpy(), f"{spec.name}_values"), index], name)
    tables = _float(builder, q.codebook.numpy(), f"{name}_codebook")
    if len(q.codebook) == len(rows):
        return builder.node("GatherElements", [tables, index], name, axis=1)
    table = builder.node("Reshape", [tables, builder.ints([-1])], name)
    return builder.node("Gather", [table, index], name)


def _float(builder: Builder, values: np.ndarray, name: str) -> str:
    """A float32 constant, stored as float16 where that is exact."""
    half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        return builder.constant(values, name)
    return builder.node("Cast", [builder.constant(half, name)], name, to=onnx.TensorProto.FLOAT)


def _scales(builder: Builder, q: QTensor, name: str) -> str:
    """Scales, one per row; as bytes and a table of scales where there are few, as in the microscaling formats."""
    scale = q.scale.numpy().reshape(-1, 1)
    values, index = np.unique(scale, return_inverse=True)
    if len(values) == 1:
        return builder.scalar(values[0])
    if len(values) > _FEW or 4 * len(values) + len(scale) >= 4 * len(scale):
        return builder.constant(scale, f"{name}_scale")
    stored = builder.constant(index.astype(np.uint8).reshape(-1, 1), f"{name}_scale")
    wide = builder.node("Cast", [stored], name, to=onnx.TensorProto.INT32)
    return builder.node("Gather", [builder.constant(values, f"{name}_scales"), wide], name)
