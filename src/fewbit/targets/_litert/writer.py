"""Writes a prepared program as a ``.tflite`` file: an operator for each operation, named tensors throughout."""

import numpy as np
from torch import Tensor

from fewbit.errors import TargetError
from fewbit.model.program import Coding, Op, Program
from fewbit.targets._litert.builder import Builder, Shape
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

    def file(self, metadata: dict[str, bytes]) -> bytes:
        """The file's bytes. Raises ``TargetError`` for an operation that cannot be written."""
        from fewbit.targets._litert.operators import OPERATORS

        for name in self.program.inputs:
            self.tensor(name)
        for op in self.program.ops:
            write = OPERATORS.get(key(op))
            if write is None:
                raise TargetError(f"{op.layer or op.node}: {key(op)} cannot be written for LiteRT")
            write(self, op)
        return self.b.finish(self.program.inputs, self.program.output_names(), metadata)

    def tensor(self, name: str) -> str:
        """The tensor of a value of the program."""
        coding = self.program.codings.get(name)
        dtype = (
            self.dtypes[name] if coding is None else str(coding.scheme.spec.code_dtype).removeprefix("torch.")
        )
        return self.b.tensor(name, self.shapes[name], dtype, coding)

    def temporary(self, name: str, shape: Shape, dtype: str = "float32", coding: Coding | None = None) -> str:
        """A tensor between the operators of one operation."""
        return self.b.tensor(name, shape, dtype, coding)

    def numbers(self, op: Op, role: str, values: list[int]) -> str:
        """A constant of int32 that an operator reads, such as a shape."""
        return self.b.constant(f"{op.output}/{role}", np.asarray(values, np.int32))

    def bias(self, op: Op, x: Coding) -> list[str]:
        """The int32 bias of a layer, with the scales that the runtime's delegates want to see; [] where it has none."""
        bias = op.constants.get("bias")
        if bias is None:
            return []
        scales = np.float32(x.scale) * _scales(op)
        name = f"{op.output}/bias"
        return [
            self.b.constant(name, array(bias), scales=scales, zero_points=np.zeros(len(scales), np.int64))
        ]

    def weight(self, op: Op, value: Tensor, axis: int) -> str:
        """The int8 weights of a layer, laid out as the runtime wants them, with a scale for each output channel."""
        scales = _scales(op)
        zeros = np.zeros(len(scales), np.int64)
        return self.b.constant(
            f"{op.output}/weight", array(value), scales=scales, zero_points=zeros, axis=axis
        )


def _scales(op: Op) -> np.ndarray:
    return array(op.constants["weight_scale"]).astype(np.float32).reshape(-1)


def array(value: Tensor) -> np.ndarray:
    """A tensor as a contiguous array."""
    return np.ascontiguousarray(value.detach().cpu().numpy())
