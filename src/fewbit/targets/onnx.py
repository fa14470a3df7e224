"""ONNX, run by ONNX Runtime: Q/DQ nodes over int8 and int4 initializers, in the patterns its integer kernels take."""

from pathlib import Path

import onnx

from fewbit.model.program import Program
from fewbit.model.signed import unsigned_codes
from fewbit.plan import Row
from fewbit.targets._onnx.probe import coverage, probe, read_back
from fewbit.targets._onnx.runtime import open_file, runtime
from fewbit.targets._onnx.writer import Writer
from fewbit.targets._planning import check, unsigned
from fewbit.targets._saturation import portable_bounds

SUFFIX = ".onnx"
REQUANTIZATION = "f32_even"
TOLERANCE = 0
TABLES = True
describe = read_back
open = open_exact = open_file


def adapt(row: Row) -> Row:
    """Activations unsigned: see ``unsigned``."""
    return unsigned(row, "ONNX Runtime")


def prepare(program: Program) -> Program:
    """The program with unsigned codes: the only ones that its kernels on x86 are fast for."""
    return unsigned_codes(program)


def write(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write the program to ``path`` (no verification here: ``fewbit.export`` does that)."""
    onnx.save(Writer(program).model(metadata), str(path))


__all__ = [
    "REQUANTIZATION",
    "SUFFIX",
    "TABLES",
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
