"""ONNX, run by ONNX Runtime: Q/DQ nodes over int8 and int4 initializers, in the patterns its integer kernels take."""

import dataclasses
from pathlib import Path

import onnx

from fewbit.model.program import Program
from fewbit.plan import Row
from fewbit.targets._onnx.probe import coverage, probe, read_back
from fewbit.targets._onnx.runtime import open_file, runtime
from fewbit.targets._onnx.writer import Writer
from fewbit.targets._saturation import portable_bounds

SUFFIX = ".onnx"
REQUANTIZATION = "f32_even"
TOLERANCE = 0
describe = read_back
open = open_exact = open_file


def adapt(row: Row) -> Row:
    """Signed activations become unsigned of the same width: as many levels, and the only ones with fast x86 kernels."""
    scheme = row.scheme
    if (
        scheme is None
        or row.kind == "weight"
        or not scheme.spec.integer
        or scheme.dynamic
        or scheme.qmin >= 0
    ):
        return row
    unsigned = dataclasses.replace(scheme, format=f"u{scheme.format}", narrow=False)
    because = f"{row.because}; unsigned, as the integer kernels of ONNX Runtime on x86 want it"
    return dataclasses.replace(row, scheme=unsigned, because=because)


def check(row: Row) -> str | None:
    """None where ONNX Runtime can run the row, else why not and what to do."""
    scheme = row.scheme
    if scheme is None:
        return None
    if row.kind != "weight" and (not scheme.spec.integer or scheme.spec.bits > 8):
        return f"{scheme.format} activations have no integer kernel; use 8 bits or fewer, or keep the layer float"
    return None


def prepare(program: Program) -> Program:
    """As it is: the lowering was made for these kernels."""
    return program


def write(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write the program to ``path`` (no verification here: ``fewbit.export`` does that)."""
    onnx.save(Writer(program).model(metadata), str(path))


__all__ = [
    "REQUANTIZATION",
    "SUFFIX",
    "TOLERANCE",
    "adapt",
    "check",
    "coverage",
    "describe",
    "open",
    "open_exact",
    "portable_bounds",
    "prepare",
    "probe",
    "runtime",
    "write",
]
