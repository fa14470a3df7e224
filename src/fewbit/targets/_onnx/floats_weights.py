"""Weights of float layers in an ONNX file: float32 initializers, or codes and a DequantizeLinear."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from torch import Tensor

from fewbit.errors import TargetError
from fewbit.model.program import Op
from fewbit.model.reference import qtensor_of
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.targets import has_table
from fewbit.targets._onnx.builder import Builder, int4
from fewbit.targets._onnx.tables import fewer_bytes, looked_up, numbers

HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}  # stored as they are


class Layer:
    """A standard layer on its way into the file: arguments as ONNX names, parameters as initializers."""

    def __init__(self, builder: Builder, op: Op, args: list[Any]) -> None:
        self.builder, self.op, self.args, self.name = builder, op, args, op.layer
        self.config: dict[str, Any] = op.attrs["config"]
        self.x = str(args[0])
        self.rank = len(op.attrs["shape"])

    def node(self, op_type: str, inputs: list[str], **attrs: Any) -> str:
        return self.builder.node(op_type, inputs, self.name, **attrs)

    def array(self, name: str) -> np.ndarray:
        """The float32 values of a parameter, dequantized where it is stored as codes."""
        tensor = self.op.constants[name]
        if name not in self.op.attrs.get("schemes", {}):
            return tensor.numpy()
        return self.qtensor(name).dequantize().numpy()

    def stored_scheme(self, name: str) -> Scheme | None:
        """How a parameter is stored as codes; None where it is float32."""
        found = self.op.attrs.get("schemes", {}).get(name)
        return None if found is None else Scheme.from_json(found)

    def qtensor(self, name: str) -> QTensor:
        """A parameter that is stored as codes."""
        return qtensor_of(self.op, name)

    def optional(self, name: str) -> list[str]:
        """The parameter, if the layer has it."""
        return [self.weight(name)] if name in self.op.constants else []

    def filled(self, name: str, shape: Any, value: float) -> str:
        """The parameter, or a constant in its place."""
        if name in self.op.constants:
            return self.weight(name)
        return self.builder.constant(np.full(shape, value, np.float32), f"{self.name}.{name}")

    def weight(self, name: str, transposed: bool = False) -> str:
        """A parameter as a float32 value in the graph; ``transposed`` exchanges the two axes of a matrix."""
        if name in self.op.attrs.get("schemes", {}):
            return dequantized(self.builder, self.qtensor(name), f"{self.name}.{name}", transposed)
        array = self.array(name)
        return self.builder.constant(
            np.ascontiguousarray(array.T) if transposed else array, f"{self.name}.{name}"
        )

    def gates(self, name: str, order: list[int]) -> str:
        """A parameter whose rows are gates, one block after the other, in another order of blocks."""
        q = self.qtensor(name)
        rows = torch.arange(q.shape[0]).reshape(len(order), -1)[order].flatten()
        scale, zero, codebook = (_rows(v, q.shape[0], rows) for v in (q.scale, q.zero_point, q.codebook))
        assert scale is not None and zero is not None
        moved = replace(q, codes=q.codes[rows], scale=scale, zero_point=zero, codebook=codebook)
        return dequantized(self.builder, moved, f"{self.name}.{name}")


def _rows(values: Tensor | None, channels: int, rows: Tensor) -> Tensor | None:
    """What there is for each channel, or each group of it, in another order of channels."""
    if values is None or len(values) == 1:
        return values
    return values.reshape(channels, -1)[rows].reshape(values.shape)


def dequantized(builder: Builder, q: QTensor, name: str, transposed: bool = False) -> str:
    """A quantized tensor as stored codes and a DequantizeLinear; half-width floats as they are and a Cast.

    Formats that are no integers are looked up in a table: see ``looked_up``.

    A group is a ``block_size`` along the last axis of a matrix [N, K]. Groups of a tensor with more axes run
    across several of them, which ONNX cannot say: it is stored as the matrix of its channels, and reshaped.
    Only a transposed matrix keeps 4-bit codes up to the DequantizeLinear, because ONNX Runtime makes one
    operator of that and a MatMul; elsewhere a Cast, done once when the file is loaded, spares every run the
    slow unpacking.
    """
    scheme = q.scheme
    if scheme.format in HALVES:
        values = q.dequantize().numpy().astype(HALVES[scheme.format])
        stored = builder.constant(np.ascontiguousarray(values.T) if transposed else values, name)
        return builder.node("Cast", [stored], name, to=onnx.TensorProto.FLOAT)
    if has_table(scheme):
        return looked_up(builder, q, name, transposed)
    axis = scheme.axis % len(q.shape)
    codes, scale, zero = q.codes.numpy(), q.scale.numpy(), q.zero_point.numpy()
    attrs: dict[str, Any] = {}
    folded: tuple[int, ...] | None = None
    if scheme.granularity == "tensor":
        scale, zero = scale.reshape(()), zero.reshape(())
    elif scheme.granularity == "channel":
        attrs["axis"] = axis
    else:
        if len(q.shape) != 2 or axis != 0:
            codes = np.moveaxis(codes, axis, 0)
            folded = codes.shape
            codes = codes.reshape(folded[0], -1)
        scale, zero = (v.reshape(codes.shape[0], -1) for v in (scale, zero))
        attrs |= {"axis": 1, "block_size": int(scheme.group_size or 1)}
    if transposed and folded is None:
        codes = codes.T
        if scheme.granularity == "channel":
            attrs["axis"] = 1 - axis
        elif scheme.granularity == "group":
            scale, zero, attrs["axis"] = scale.T, zero.T, 0
    result = _stored(builder, scheme, [codes, scale, zero], name, attrs, packed=transposed)
    if folded is not None:
        result = _unfolded(builder, result, folded, axis, name)
        if transposed:
            result = builder.node("Transpose", [result], name, perm=[1, 0])
    return result


def _stored(
    builder: Builder, scheme: Scheme, parts: list[np.ndarray], name: str, attrs: dict[str, Any], packed: bool
) -> str:
    codes, scale, zero = parts
    kind = storage_type(scheme, name)
    stored = [
        stored_codes(builder, codes, scheme, name, packed),
        builder.constant(scale.copy(), f"{name}_scale"),
    ]
    if zero.any() or kind == "uint4":
        wide = kind if packed or not kind.endswith("int4") else kind.replace("4", "8")
        stored.append(builder.constant(_coded(zero, wide), f"{name}_zero_point"))
    return builder.node("DequantizeLinear", stored, name, **attrs)


def stored_codes(builder: Builder, codes: np.ndarray, scheme: Scheme, name: str, packed: bool = False) -> str:
    """Codes as an initializer, two to a byte where 4 bits hold them; unless ``packed``, unpacked to 8 bits.

    What is unpacked anyway may be packed more densely.
    """
    kind = storage_type(scheme, name)
    if not packed and not kind.endswith("16") and fewer_bytes(builder, codes):
        return numbers(builder, _coded(codes, "int8" if scheme.qmin < 0 else "uint8"), name)[0]
    stored = builder.constant(_coded(codes, kind), name)
    if packed or not kind.endswith("int4"):
        return stored
    wide = onnx.TensorProto.INT8 if kind == "int4" else onnx.TensorProto.UINT8
    return builder.node("Cast", [stored], name, to=wide)


def storage_type(scheme: Scheme, name: str) -> str:
    """The narrowest ONNX integer type that holds the format's codes."""
    signed, bits = scheme.qmin < 0, scheme.spec.bits
    for width in (4, 8, 16):
        if bits <= width:
            return f"{'' if signed else 'u'}int{width}"
    raise TargetError(f"{name}: ONNX has no type for {bits}-bit codes; use at most 16 bits")


def _coded(array: np.ndarray, kind: str) -> np.ndarray:
    array = np.array(array, order="C")
    return int4(array, kind == "int4") if kind.endswith("int4") else array.astype(kind)


def _unfolded(builder: Builder, value: str, shape: tuple[int, ...], axis: int, name: str) -> str:
    value = builder.node("Reshape", [value, builder.ints(shape)], name)
    if axis == 0:
        return value
    order = list(range(1, len(shape)))
    order.insert(axis, 0)
    return builder.node("Transpose", [value], name, perm=order)
