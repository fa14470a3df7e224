"""Writes a prepared program as a ``.tflite`` file: an operator for each operation, named tensors throughout."""

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

from fewbit.errors import TargetError
from fewbit.model.kernels_16x8 import wide
from fewbit.model.program import Coding, Op, Program
from fewbit.targets._litert.builder import Builder, Shape
from fewbit.targets._litert.fusion import fused_clamps
from fewbit.targets._litert.layout import key
from fewbit.targets._litert.shapes import sizes


class Writer:
    """One file. ``OPERATORS`` maps an operation to the function that writes it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.b = Builder()
        found = sizes(program)
        self.shapes: dict[str, Shape] = {name: found.signature(name) for name in found.shape}
        self.dtypes = found.dtype
        self.dequantized: dict[Any, str] = {}  # constants that are stored as codes, and their float32 tensors
        self.clamps = fused_clamps(program, found.dtype)

    def file(self, metadata: dict[str, bytes]) -> bytes:
        """The file's bytes. Raises ``TargetError`` for an operation that cannot be written."""
        from fewbit.targets._litert.operators import OPERATORS

        inputs = [self._input(name) for name in self.program.inputs]
        ends = {} if self.program.io == "float32" else self._coded_outputs()
        for op in self.program.ops:
            if op.output in self.b.index or op.output in ends:
                continue  # handed over as codes
            write = OPERATORS.get(key(op))
            if write is None:
                raise TargetError(f"{op.layer or op.node}: {key(op)} cannot be written for LiteRT")
            write(self, op)
        outputs = [self._output(ends[n]) if n in ends else n for n in self.program.output_names()]
        return self.b.finish(inputs, outputs, metadata)

    def _input(self, name: str) -> str:
        """The tensor that the file takes: floats, or the codes that the first step makes of them."""
        readers = [op for op in self.program.ops if name in op.inputs]
        if self.program.io == "float32" or self.dtypes[name] != "float32":
            return self.tensor(name)
        if len(readers) != 1 or readers[0].kind != "quantize":
            raise TargetError(
                f"input {name!r} is also read as floats: it cannot be handed over as {self.program.io}"
            )
        codes = self._handed_over(readers[0].output)
        if self.program.io != "uint8":
            return self.tensor(codes)
        outside = self.temporary(
            f"{codes}/uint8", self.shapes[codes], "uint8", _unsigned(self.program.codings[codes])
        )
        self.b.operator("QUANTIZE", [outside], [self.tensor(codes)], ("QuantizeOptions", {}), 2)
        return outside

    def _coded_outputs(self) -> dict[str, str]:
        """Codes that stand for float outputs, by the output's name."""
        by_output = {op.output: op for op in self.program.ops}
        found = {}
        for name in self.program.output_names():
            if by_output[name].kind != "dequantize":
                raise TargetError(
                    f"output {name!r} is computed in float: it cannot be handed over as {self.program.io}"
                )
            found[name] = by_output[name].inputs[0]
        return found

    def _handed_over(self, codes: str) -> str:
        """The codes, where the file computes such as are asked for."""
        found = self.program.codings[codes].scheme.format
        if found != ("int16" if self.program.io == "int16" else "int8"):
            raise TargetError(f"{codes!r} has {found} codes: it cannot be handed over as {self.program.io}")
        return codes

    def _output(self, codes: str) -> str:
        if self._handed_over(codes) and self.program.io != "uint8":
            return codes
        outside = self.temporary(
            f"{codes}/uint8", self.shapes[codes], "uint8", _unsigned(self.program.codings[codes])
        )
        self.b.operator("QUANTIZE", [codes], [outside], ("QuantizeOptions", {}), 2)
        return outside

    def tensor(self, name: str) -> str:
        """The tensor of a value of the program."""
        coding = self.program.codings.get(name)
        dtype = (
            self.dtypes[name] if coding is None else str(coding.scheme.spec.code_dtype).removeprefix("torch.")
        )
        return self.b.tensor(name, self.shapes[name], dtype, coding)

    def clamped(self, op: Op) -> tuple[str, int]:
        """The tensor that a float operation computes, and the activation that its operator applies."""
        name, output = self.clamps.get(op.output, ("NONE", op.output))
        return self.tensor(output), int(getattr(self.b.s.ActivationFunctionType, name))

    def temporary(self, name: str, shape: Shape, dtype: str = "float32", coding: Coding | None = None) -> str:
        """A tensor between the operators of one operation."""
        return self.b.tensor(name, shape, dtype, coding)

    def numbers(self, op: Op, role: str, values: list[int]) -> str:
        """A constant of int32 that an operator reads, such as a shape."""
        return self.b.constant(f"{op.output}/{role}", np.asarray(values, np.int32))

    def bias(self, op: Op, x: Coding) -> list[str]:
        """The bias of a layer, with the scales that the runtime's delegates want to see; zeros for none.

        It has 32 bits, or 64 where the codes ``x`` have 16.
        """
        scales = np.float32(x.scale) * _scales(op)
        channels = op.constants["weight"].shape[0]
        given = op.constants.get("bias")
        value = np.zeros(channels, np.int64 if wide(x) else np.int32) if given is None else array(given)
        zeros = np.zeros(len(scales), np.int64)
        return [self.b.constant(f"{op.output}/bias", value, scales=scales, zero_points=zeros)]

    def weight(self, op: Op, value: Tensor, axis: int) -> str:
        """The weights of a layer, laid out as the runtime wants them, with a scale for each output channel.

        Codes of 4 bits are packed, two to a byte: the runtime unpacks them when it loads the file.
        """
        scales, codes = _scales(op), array(value)
        zeros, name = np.zeros(len(scales), np.int64), f"{op.output}/weight"
        if np.abs(codes).max(initial=0) > 7:
            return self.b.constant(name, codes, scales=scales, zero_points=zeros, axis=axis)
        return self.b.constant(
            name, packed(codes), scales=scales, zero_points=zeros, axis=axis, dtype="int4", shape=codes.shape
        )


def packed(codes: np.ndarray) -> np.ndarray:
    """4-bit codes two to a byte, the first one in the lower half."""
    halves = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.int8)).astype(np.uint8) & 15
    pairs: np.ndarray = halves[0::2] | (halves[1::2] << 4)
    return pairs


def _unsigned(coding: Coding) -> Coding:
    """The same numbers as uint8 codes."""
    scheme = dataclasses.replace(coding.scheme, format="uint8")
    return Coding(scheme, coding.scale, coding.zero_point + 128)


def _scales(op: Op) -> np.ndarray:
    return array(op.constants["weight_scale"]).astype(np.float32).reshape(-1)


def array(value: Tensor) -> np.ndarray:
    """A tensor as a contiguous array."""
    return np.ascontiguousarray(value.detach().cpu().numpy())
