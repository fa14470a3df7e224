"""Weights of float layers in a ``.tflite`` file: float32, or codes and a DEQUANTIZE, which LiteRT does once.

An integer layer with a dynamic range reads its codes as they are: LiteRT quantizes each row of its input itself.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.model.program import Op
from fewbit.model.reference import module_state, qtensor_of
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, blocks
from fewbit.targets._litert.writer import Writer, array, packed


def parameter(w: Writer, op: Op, name: str, arrange: tuple[int, ...] | None = None) -> str:
    """The tensor that holds a parameter's float32 numbers, its axes rearranged."""
    stored = op.attrs.get("schemes", {}).get(name)
    scheme = None if stored is None else Scheme.from_json(stored)
    label = f"{op.output}/{name}"
    if scheme is not None and scheme.format == "float16":
        half = op.constants[name].to(torch.float16)
        return _dequantized(w, label, _arranged(half, arrange), None, None, 0)
    if scheme is None or not scheme.spec.integer or scheme.spec.bits > 8:
        value = module_state(op)[name].to(torch.float32)
        return w.b.constant(label, array(_arranged(value, arrange)))
    shape = tuple(op.attrs["shapes"][name])
    q = qtensor_of(op, name)
    if scheme.granularity == "group":
        return _grouped(w, label, q, arrange)
    axis = scheme.axis % len(shape)
    axis = axis if arrange is None else arrange.index(axis)
    codes, zeros = _signed(q)
    return _dequantized(w, label, _arranged(codes, arrange), q.scale, zeros, axis, _narrow(op, codes))


def _arranged(value: Tensor, arrange: tuple[int, ...] | None) -> Tensor:
    return value if arrange is None else value.permute(arrange)


def _signed(q: QTensor) -> tuple[Tensor, Tensor]:
    """Codes and zero points moved down by half their levels where the format is unsigned."""
    shift = 0 if q.scheme.qmin < 0 else 2 ** (q.scheme.spec.bits - 1)
    return (q.codes.to(torch.int32) - shift).to(torch.int8), q.zero_point - shift


def _narrow(op: Op, codes: Tensor) -> bool:
    """Whether two codes fit a byte, and the operator that reads them is none of those that XNNPACK then leaves out."""
    return op.attrs["type"] in ("Linear", "Embedding") and fits_four_bits(codes)


def fits_four_bits(codes: Tensor) -> bool:
    """Whether all codes are integers from -8 to 7."""
    return bool(codes.numel()) and int(codes.min()) >= -8 and int(codes.max()) <= 7


def coded(
    w: Writer, label: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, axis: int, narrow: bool
) -> str:
    """Codes as a constant with scales along an axis (one scale: for all)."""
    kind: dict[str, Any] = {"scales": scales, "zero_points": zeros, "axis": axis}
    if narrow:
        return w.b.constant(label, packed(codes), dtype="INT4", shape=tuple(codes.shape), **kind)
    return w.b.constant(label, codes.astype(np.int8), **kind)


def _dequantized(
    w: Writer,
    label: str,
    value: Tensor,
    scale: Tensor | None,
    zeros: Tensor | None,
    axis: int,
    narrow: bool = False,
) -> str:
    """A stored tensor as float32; the same numbers are dequantized once, however many operators read them."""
    codes = array(value)
    scales = np.zeros(0, np.float32) if scale is None else array(scale).reshape(-1)
    points = np.zeros(0, np.int64) if zeros is None else array(zeros).reshape(-1).astype(np.int64)
    key = (codes.tobytes(), codes.shape, scales.tobytes(), points.tobytes(), axis)
    if key not in w.dequantized:
        if scale is None:
            stored = w.b.constant(f"{label}/half", codes)
        else:
            stored = coded(w, f"{label}/codes", codes, scales, points, axis, narrow)
        result = w.temporary(label, tuple(codes.shape))
        version = 3 if scale is None else 6 if narrow else 5
        w.b.operator("DEQUANTIZE", [stored], [result], ("DequantizeOptions", {}), version)
        w.dequantized[key] = result
    return w.dequantized[key]


def _grouped(w: Writer, label: str, q: QTensor, arrange: tuple[int, ...] | None) -> str:
    """Groups as rows of a matrix with a scale each, put back in place behind the DEQUANTIZE."""
    codes, zeros = _signed(q)
    narrow = fits_four_bits(codes) and codes.numel() // len(q.scale) % 2 == 0
    value = _dequantized(w, f"{label}/rows", blocks(codes, q.scheme), q.scale, zeros, 0, narrow)
    axis = q.scheme.axis % len(q.shape)
    moved = [q.shape[axis], *(s for i, s in enumerate(q.shape) if i != axis)]
    order = [axis, *(i for i in range(len(q.shape)) if i != axis)]
    wanted = list(range(len(q.shape))) if arrange is None else list(arrange)
    turn = [order.index(a) for a in wanted]
    if label in w.b.index:
        return label
    if turn == sorted(turn):
        _reshaped(w, value, label, moved)
        return label
    _reshaped(w, value, f"{label}/moved", moved)
    axes = w.b.constant(f"{label}/axes", np.asarray(turn, np.int32))
    w.temporary(label, tuple(moved[t] for t in turn))
    w.b.operator("TRANSPOSE", [f"{label}/moved", axes], [label], ("TransposeOptions", {}), 2)
    return label


def _reshaped(w: Writer, value: str, name: str, sizes: list[int]) -> None:
    shape = w.b.constant(f"{name}/shape", np.asarray(sizes, np.int32))
    w.temporary(name, tuple(sizes))
    options = {"newShape": np.asarray(sizes, np.int32)}
    w.b.operator("RESHAPE", [value, shape], [name], ("ReshapeOptions", options), 1)
