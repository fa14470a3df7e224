"""Writes a program as an ONNX model with QuantizeLinear and DequantizeLinear, in patterns that ONNX Runtime fuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from fewbit.errors import TargetError
from fewbit.model.program import Coding, Op, Program
from fewbit.targets._onnx.builder import Builder, int4, value_info
from fewbit.targets._onnx.dynamic import emit_dynamic
from fewbit.targets._onnx.floats import emit_float
from fewbit.targets._onnx.probe import METADATA, describe
from fewbit.targets._onnx.tables import fewer_bytes, numbers


class Writer:
    """One program on its way into one ONNX graph.

    ``names``: the ONNX value of each program value. Codes are uint8 or int8 tensors; ``explicit`` keeps every operation
    between DequantizeLinear and QuantizeLinear, as TensorRT wants it, instead of moving codes about directly.
    """

    def __init__(self, program: Program, explicit: bool = False) -> None:
        self.program = program
        self.explicit = explicit
        self.builder = Builder(tables=not explicit)
        self.names: dict[str, Any] = {}
        self.views: dict[tuple[str, float, int], str] = {}
        self.constants: dict[str, Any] = {}

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """The ONNX model; ``metadata`` goes into its properties, beside a description of the program itself."""
        p = self.program
        inputs = []
        for name, dtype, shape in zip(p.inputs, p.input_dtypes, p.input_shapes, strict=True):
            self.names[name] = self.builder.unique(name)
            inputs.append(value_info(self.names[name], dtype, shape))
        outputs = p.output_names()
        for op in p.ops:
            self._emit(op)
        infos = []
        for i, (name, dtype, shape) in enumerate(zip(outputs, p.output_dtypes, p.output_shapes, strict=True)):
            final = self.builder.node(
                "Identity", [self.names[name]], name, output=self.builder.unique(_output(i, outputs))
            )
            infos.append(value_info(final, dtype, shape))
        codes = {v: n for v, n in self.names.items() if v in p.codings and isinstance(n, str)}
        described = {METADATA: describe(p, self.constants, codes)}
        return self.builder.model("fewbit", inputs, infos, metadata | described)

    # ---- operations -------------------------------------------------------------------------------------------------

    def _emit(self, op: Op) -> None:
        if op.kind == "quantize":
            self.names[op.output] = self.quantize(self.names[op.inputs[0]], op.output, self.coding(op.output))
        elif op.kind == "dequantize":
            self.names[op.output] = self.float_view(op.inputs[0])
        elif op.kind == "rescale":
            self.names[op.output] = self.names[op.inputs[0]]
        elif op.kind == "constant":
            self.names[op.output] = self.stored(op, "value", _array(op.constants["value"]), op.output)
        elif op.kind == "getitem":
            self.names[op.output] = self.names[op.inputs[0]][op.attrs["index"]]
        elif op.kind.startswith("dynamic_"):
            self.names[op.output] = emit_dynamic(self.builder, op, self.names[op.inputs[0]], self.constants)
        elif op.domain == "integer":
            self.names[op.output] = _INTEGER[op.kind](self, op)
        elif op.domain == "shares" and self.explicit:
            self._shares_explicitly(op)
        else:
            self.names[op.output] = emit_float(self.builder, op, [self.names[i] for i in op.inputs])

    def _shares_explicitly(self, op: Op) -> None:
        views = [self.float_view(i) if i in self.program.codings else self.names[i] for i in op.inputs]
        result = emit_float(self.builder, op, views)
        coding = self.coding(op.output)
        if isinstance(result, list):
            self.names[op.output] = [
                self.quantize(r, f"{op.output}_{i}", coding) for i, r in enumerate(result)
            ]
        else:
            self.names[op.output] = self.quantize(result, op.output, coding)

    def stored(self, op: Op, role: str, array: np.ndarray, name: str) -> str:
        """An initializer, remembered as the constant of an operation, so that the file can be verified later."""
        self.constants[f"{op.output}.{role}"] = stored = self.builder.constant(array, name)
        return stored

    # ---- codes ------------------------------------------------------------------------------------------------------

    def coding(self, value: str) -> Coding:
        return self.program.codings[value]

    def _qparams(self, coding: Coding) -> list[str]:
        scale = self.builder.scalar(coding.scale)
        return [scale, self.builder.constant(np.array(coding.zero_point, storage(coding)), "zero_point")]

    def quantize(self, x: str, name: str, coding: Coding, clamp: list[int] | None = None) -> str:
        """Codes of a float value; limits that the storage type does not imply become a Clip of codes."""
        codes = self.builder.node("QuantizeLinear", [x, *self._qparams(coding)], f"{name}_codes")
        limits = np.iinfo(storage(coding))
        lo, hi = clamp or (int(coding.scheme.qmin), int(coding.scheme.qmax))
        if (lo, hi) == (limits.min, limits.max) or (lo == -limits.max and hi == limits.max):
            return codes
        return self.clip(codes, lo, hi, name, coding)

    def clip(self, codes: str, lo: int, hi: int, name: str, coding: Coding) -> str:
        bounds = [self.builder.constant(np.array(v, storage(coding)), "limit") for v in (lo, hi)]
        return self.builder.node("Clip", [codes, *bounds], f"{name}_codes")

    def float_view(self, value: str, codes: str | None = None) -> str:
        """The DequantizeLinear of a value's codes; one for each value, however many read it."""
        coding, codes = self.coding(value), codes or self.names[value]
        key = (codes, coding.scale, coding.zero_point)
        if key not in self.views:
            self.views[key] = self.builder.node("DequantizeLinear", [codes, *self._qparams(coding)], value)
        return self.views[key]

    def finish(self, op: Op, x: str) -> str:
        """Quantize an integer operation's result, its fused clamp included."""
        coding = self.coding(op.output)
        clamp = op.attrs.get("clamp")
        if clamp and self.explicit and clamp == [coding.zero_point, int(coding.scheme.qmax)]:
            return self.quantize(self.builder.node("Relu", [x], op.layer), op.output, coding)
        return self.quantize(x, op.output, coding, clamp)

    def weight(self, op: Op, axis: int = 0) -> str:
        """Dequantized weights: int8 or packed 4-bit codes in the file, per-channel scales."""
        codes, scale = _array(op.constants["weight"]), _array(op.constants["weight_scale"])
        name = f"{op.layer}.weight"
        if codes.dtype not in (np.int8, np.uint8):
            raise TargetError(
                f"{op.layer}: {codes.dtype} weights have no integer kernel in ONNX Runtime; use int8"
            )
        if fewer_bytes(self.builder, codes):
            stored, parts = numbers(self.builder, codes, name)
            self.constants[f"{op.output}.weight"] = parts
        elif self.explicit or np.abs(codes).max(initial=0) > 7:
            stored = self.stored(op, "weight", codes, name)
        else:
            # ONNX Runtime has no 4-bit kernel: it folds this Cast when it loads the file, and then sees int8 weights.
            packed = self.stored(op, "weight", int4(codes, signed=True), name)
            stored = self.builder.node("Cast", [packed], name, to=onnx.TensorProto.INT8)
        zeros = self.builder.constant(np.zeros(len(scale), np.int8), "zeros")
        scales = self.stored(op, "weight_scale", scale, f"{name}_scale")
        return self.builder.node("DequantizeLinear", [stored, scales, zeros], name, axis=axis)

    def bias(self, op: Op) -> list[str]:
        if "bias" not in op.constants:
            return []
        x = np.float32(self.coding(op.inputs[0]).scale)
        scale = (x * _array(op.constants["weight_scale"])).astype(np.float32)
        if self.explicit:  # TensorRT takes float biases only: what the int32 codes stand for
            values = (_array(op.constants["bias"]).astype(np.float64) * scale).astype(np.float32)
            return [self.stored(op, "bias", values, f"{op.layer}.bias")]
        stored = self.stored(op, "bias", _array(op.constants["bias"]), f"{op.layer}.bias")
        scales = self.builder.constant(scale, f"{op.layer}.bias_scale")
        zeros = self.builder.constant(np.zeros(len(scale), np.int32), "zeros")
        return [self.builder.node("DequantizeLinear", [stored, scales, zeros], f"{op.layer}.bias", axis=0)]


def storage(coding: Coding) -> Any:
    """The NumPy type that holds the codes in the file."""
    return np.uint8 if coding.scheme.qmin >= 0 else np.int8


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _output(index: int, outputs: list[str]) -> str:
    return "output" if len(outputs) == 1 else f"output_{index}"


def _conv(w: Writer, op: Op) -> str:
    a = op.attrs
    n = len(a["stride"])
    pad = a["pad"] or [0] * (2 * n)
    begins, ends = list(reversed(pad[0::2])), list(reversed(pad[1::2]))
    inputs = [w.float_view(op.inputs[0]), w.weight(op), *w.bias(op)]
    result = w.builder.node("Conv", inputs, op.layer, pads=begins + ends, strides=a["stride"],
                            dilations=a["dilation"], group=a["groups"])  # fmt: skip
    return w.finish(op, result)


def _linear(w: Writer, op: Op) -> str:
    """Gemm takes matrices only (and only Gemm takes an int32 bias): more dimensions are folded into rows, and back."""
    shape = op.attrs["shape"]
    codes = w.names[op.inputs[0]]
    rows = (
        codes
        if len(shape) == 2
        else w.builder.node("Reshape", [codes, w.builder.ints([-1, shape[-1]])], op.layer)
    )
    inputs = [w.float_view(op.inputs[0], rows), w.weight(op), *w.bias(op)]
    result = w.finish(op, w.builder.node("Gemm", inputs, op.layer, transB=1))
    if len(shape) == 2:
        return result
    features = op.constants["weight"].shape[0]
    return w.builder.node("Reshape", [result, leading_shape(w.builder, codes, shape, features)], op.layer)


def leading_shape(builder: Builder, like: str, shape: list[int | None], last: int) -> str:
    """The shape of ``like`` with another last size, as an int64 vector; computed at run time only where it must be."""
    if shape[:-1].count(None) <= 1:
        return builder.ints([-1 if s is None else s for s in shape[:-1]] + [last])
    sizes = builder.node("Shape", [like], "leading", start=0, end=len(shape) - 1)
    return builder.node("Concat", [sizes, builder.ints([last])], "leading", axis=0)


def _simple(
    op_type: str, attributes: Callable[[Op], dict[str, Any]] = lambda op: {}
) -> Callable[[Writer, Op], str]:
    def emit(w: Writer, op: Op) -> str:
        views = [w.float_view(i) for i in op.inputs]
        return w.finish(op, w.builder.node(op_type, views, op.layer, **attributes(op)))

    return emit


def _global_avg_pool(w: Writer, op: Op) -> str:
    codes = w.finish(op, w.builder.node("GlobalAveragePool", [w.float_view(op.inputs[0])], op.layer))
    return w.builder.node("Flatten", [codes], op.layer, axis=1) if op.attrs.get("squeeze") else codes


def _table(w: Writer, op: Op) -> str:
    function = Op(op.kind, "float", op.layer, op.node, op.inputs, op.output, op.attrs["function"])
    return w.finish(op, emit_float(w.builder, function, [w.float_view(op.inputs[0])]))


def _clip(w: Writer, op: Op) -> str:
    lo, hi = op.attrs["clamp"]
    return w.clip(w.names[op.inputs[0]], lo, hi, op.output, w.coding(op.output))


def _pad(w: Writer, op: Op) -> str:
    # All axes are listed: with an `axes` input, ONNX Runtime 1.31's layout optimizer breaks the node.
    flat, coding = op.attrs["pad"], w.coding(op.output)
    pads = w.builder.ints([*reversed(flat[0::2]), *reversed(flat[1::2])])
    fill = w.builder.constant(np.array(coding.zero_point, storage(coding)), "zero_point")
    return w.builder.node("Pad", [w.names[op.inputs[0]], pads, fill], op.layer)


_INTEGER: dict[str, Callable[[Writer, Op], str]] = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _simple("MatMul"),
    "add": _simple("Add"),
    "mul": _simple("Mul"),
    "avg_pool": _simple(
        "AveragePool", lambda op: {"kernel_shape": op.attrs["kernel"], "strides": op.attrs["stride"]}
    ),
    "global_avg_pool": _global_avg_pool,
    "concat": _simple("Concat", lambda op: {"axis": op.attrs["axis"]}),
    "softmax": _simple("Softmax", lambda op: {"axis": -1}),
    "table": _table,
    "clip": _clip,
    "pad": _pad,
}
