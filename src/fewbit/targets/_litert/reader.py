"""Reads a ``.tflite`` file back as an integer program: what its operators say, not what their writer meant."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbit.errors import ArtifactError, FewbitError
from fewbit.model.program import Coding, Op, Program
from fewbit.numerics.scheme import Scheme
from fewbit.targets import Described
from fewbit.targets._litert.model import Model, Operator, Tensor, load
from fewbit.targets._litert.shapes import sizes

_CODES = {"INT8": "int8", "UINT8": "uint8", "INT16": "int16"}
PROPERTIES = "fewbit"


def read_back(path: Path) -> Described:
    """The program that a file says, whoever wrote it, and its properties.

    ``program`` is None where it has operators that fewbit cannot read back; they are in the property ``unread``.
    Raises ``ArtifactError`` for a damaged file.
    """
    model = load(path)
    properties = {PROPERTIES: model.metadata.get(PROPERTIES, b"{}").decode("utf-8", "replace")}
    reading = Reading(model, path)
    codes = {name: name for name in reading.codings}
    unread = reading.unread()
    if unread:
        return Described(None, codes, properties | {"unread": json.dumps(unread)})
    try:
        program = reading.program()
        reading.check_shapes(program)
    except FewbitError:
        raise
    except Exception as error:  # numbers that do not belong together can break any step
        raise ArtifactError(f"{path}: damaged ({type(error).__name__}: {error!s:.150})") from error
    return Described(program, codes, properties)


class Reading:
    """One file on its way to a program. Readers of operators use ``value``, ``data``, ``coding`` and ``add``."""

    def __init__(self, model: Model, path: Path) -> None:
        self.model, self.path = model, path
        self.ops: list[Op] = []
        self.codings: dict[str, Coding] = {}
        self.constants: set[str] = set()
        self.widened: dict[str, torch.Tensor] = {}  # weights stored as codes or halves, as float32
        for tensor in model.tensors:
            if tensor.data is None and (coding := self.coding(tensor)) is not None:
                self.codings[tensor.name] = coding

    def unread(self) -> list[str]:
        """Names of operators without a reader."""
        missing = [op for op in self.model.operators if self._reader(op) is None]
        return sorted({op.name if self.coded(op) else f"{op.name} on floats" for op in missing})

    def _reader(self, op: Operator) -> Callable[["Reading", Operator], None] | None:
        """By what an operator computes: codes, or floats of floats."""
        from fewbit.targets._litert.reader_layers import READERS_LAYERS
        from fewbit.targets._litert.reading import BOTH, INEXACT_WIDE, READERS

        if self.coded(op):
            inexact = op.name in INEXACT_WIDE and self.tensor(op.outputs[0]).kind == "INT16"
            return None if inexact else READERS.get(op.name)
        mixed = any(self.tensor(i).name in self.codings for i in op.inputs if i >= 0)
        if mixed and op.name not in BOTH:
            return None
        return READERS_LAYERS.get(op.name, BOTH.get(op.name))

    def program(self) -> Program:
        """The file's program; for files without ``unread`` operators."""
        inputs = [self._input(self.model.tensors[i]) for i in self.model.inputs]
        for op in self.model.operators:
            read = self._reader(op)
            assert read is not None
            read(self, op)
        for index in self.model.outputs:
            self.value(index)  # an output may be a constant
        outputs = [self._output(self.model.tensors[i]) for i in self.model.outputs]
        ins = [self.model.tensors[i] for i in self.model.inputs]
        outs = [self.model.tensors[i] for i in self.model.outputs]
        return Program(
            inputs, [t.shape for t in ins], [self._dtype(t) for t in ins],
            outputs, [t.shape for t in outs], [self._dtype(t) for t in outs], self.ops, self.codings,
        )  # fmt: skip

    def check_shapes(self, program: Program) -> None:
        """What the program computes has the shapes that the file states: the runtime trusts them, and would crash."""
        found = sizes(program)
        for tensor in self.model.tensors:
            computed = found.shape.get(tensor.name)
            if tensor.data is None and computed is not None and not _fits(computed, tensor.shape):
                raise ArtifactError(
                    f"{self.path}: tensor {tensor.name!r} has the shape {tensor.shape}, but {computed} is computed: "
                    "damaged"
                )

    def _dtype(self, tensor: Tensor) -> str:
        return "float32" if tensor.name in self.codings else tensor.kind.lower()

    def _input(self, tensor: Tensor) -> str:
        """An input that takes codes is quantized from float in front of the file."""
        if tensor.name not in self.codings:
            return tensor.name
        name = f"{tensor.name}/float"
        self.ops.append(Op("quantize", "boundary", tensor.name, tensor.name, [name], tensor.name))
        return name

    def _output(self, tensor: Tensor) -> str:
        if tensor.name not in self.codings:
            return tensor.name
        name = f"{tensor.name}/float"
        self.ops.append(Op("dequantize", "boundary", tensor.name, name, [tensor.name], name))
        return name

    # ---- what readers of operators use ----------------------------------------------------------------------------

    def tensor(self, index: int) -> Tensor:
        return self.model.tensors[index]

    def coding(self, tensor: Tensor) -> Coding | None:
        """How the codes of a tensor are read; None for floats and for integers that are no codes."""
        if tensor.kind not in _CODES or len(tensor.scales) != 1:
            return None
        scheme = Scheme(_CODES[tensor.kind], symmetric=False)
        zero_point = int(tensor.zero_points[0])
        wide = tensor.kind == "INT16" and zero_point != 0  # which the runtime refuses
        if wide or not scheme.qmin <= zero_point <= scheme.qmax:
            raise ArtifactError(
                f"{self.path}: tensor {tensor.name!r} has the zero point {zero_point}: damaged"
            )
        return Coding(scheme, float(tensor.scales[0]), zero_point)

    def data(self, index: int, what: str) -> np.ndarray:
        """The numbers of a constant. Raises ``ArtifactError`` where it is computed."""
        tensor = self.tensor(index)
        if tensor.data is None:
            raise ArtifactError(f"{self.path}: {what} ({tensor.name!r}) is computed: expected a constant")
        return tensor.data

    def value(self, index: int) -> str:
        """The name of an operand; a constant becomes an operation of its own when it is first used."""
        tensor = self.tensor(index)
        name = tensor.name
        if name in self.widened and name not in self.constants:
            self.constants.add(name)
            self.ops.append(Op("constant", "float", name, name, [], name, {}, {"value": self.widened[name]}))
        if tensor.data is not None and tensor.name not in self.constants:
            self.constants.add(tensor.name)
            coding = self.coding(tensor)
            if coding is not None:
                self.codings[tensor.name] = coding
            domain = "float" if coding is None else "boundary"
            constants = {"value": torch.from_numpy(tensor.data.copy())}
            self.ops.append(Op("constant", domain, tensor.name, tensor.name, [], tensor.name, {}, constants))
        return tensor.name

    def coded(self, op: Operator) -> bool:
        """Whether an operator computes codes."""
        return self.tensor(op.outputs[0]).name in self.codings

    def add(
        self, op: Operator, kind: str, domain: str, inputs: list[str], attrs: dict[str, Any] | None = None,
        constants: dict[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """One operation for an operator with one output."""
        name = self.tensor(op.outputs[0]).name
        self.ops.append(
            Op(kind, domain, name.split(";")[0], name, inputs, name, attrs or {}, constants or {})
        )

    def fail(self, op: Operator, what: str) -> ArtifactError:
        """An error that says what of an operator cannot be read."""
        return ArtifactError(f"{self.path}: {op.name} ({self.tensor(op.outputs[0]).name}): {what}")


def _fits(computed: tuple[int, ...], stated: tuple[int | None, ...]) -> bool:
    """Whether sizes are those that a file states; None: any."""
    same = len(computed) == len(stated)
    return same and all(s is None or s == c for c, s in zip(computed, stated, strict=True))
