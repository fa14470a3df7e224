"""LiteRT (TensorFlow Lite): ``.tflite`` files with channels last, run by ai-edge-litert.

Activations have 8 bits, or 16 ("16x8" with 8-bit weights); then functions such as softmax or sigmoid run in float.
The gate runs a file twice: with the reference kernels, whose every code must be what the program says (an int32
multiplier and shift, ``q31_double``), and with the kernels that LiteRT chooses itself (XNNPACK, which requantizes in
float32), whose differences are counted, layer by layer and at the outputs.
"""

import dataclasses
from pathlib import Path

from torch import Tensor

from fewbit.model.program import Program
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Row
from fewbit.targets import Kernel
from fewbit.targets._litert.fast import fast_codes
from fewbit.targets._litert.prepare import prepare
from fewbit.targets._litert.reader import PROPERTIES, read_back
from fewbit.targets._litert.runtime import open_exact, open_file, probe, runtime
from fewbit.targets._litert.writer import Writer

SUFFIX = ".tflite"
REQUANTIZATION = "q31_double"
TOLERANCE = 0
IO = ("float32", "int8", "uint8", "int16")
describe = read_back
open = open_file


def adapt(row: Row) -> Row:
    """Activations become affine int8, or symmetric int16: what LiteRT's kernels take."""
    scheme = row.scheme
    if scheme is None or row.kind == "weight" or scheme.dynamic or scheme.format not in ("uint8", "int16"):
        return row
    if scheme.format == "int16":
        centred = dataclasses.replace(scheme, symmetric=True, narrow=False)
        return dataclasses.replace(
            row, scheme=centred, because=f"{row.because}; symmetric, as LiteRT wants it"
        )
    signed = dataclasses.replace(scheme, format="int8", narrow=False)
    return dataclasses.replace(row, scheme=signed, because=f"{row.because}; signed, as LiteRT wants it")


def check(row: Row) -> str | None:
    """None where LiteRT can run the row, else why not and what to do."""
    scheme = row.scheme
    if scheme is None:
        return None
    if row.kind != "weight" and (
        not scheme.spec.integer or (scheme.spec.bits > 8 and scheme.format != "int16")
    ):
        return (
            f"{scheme.format} activations have no integer kernel here; use int16, 8 bits or fewer, or keep the layer "
            "float"
        )
    return None


def portable_bounds(weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """As they come: its kernels add products in 32 bits on every CPU."""
    return lo, hi


def write(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write a prepared program to ``path``."""
    content = {PROPERTIES: metadata["fewbit"].encode()} if "fewbit" in metadata else {}
    path.write_bytes(Writer(program).file(content))


def coverage(path: Path, program: Program, codes: dict[str, str]) -> list[Kernel]:
    """Which operations the file computes on codes, read from its operators: LiteRT runs each as it is written."""
    kernels = []
    for op in program.ops:
        if op.domain == "integer" and op.kind not in ("clip", "pad", "requantize"):
            kernels.append(Kernel(op.layer, op.kind, True))
        elif op.kind == "module" and op.attrs["type"].startswith(("Conv", "Linear", "LSTM", "GRU")):
            cause = op.note or "planned as float"
            kernels.append(Kernel(op.layer, op.attrs["type"], False, cause, planned=False))
        elif op.note:
            kernels.append(Kernel(op.layer, op.kind.split(".")[-2], False, op.note, planned=False))
    return kernels


__all__ = [
    "IO",
    "REQUANTIZATION",
    "SUFFIX",
    "TOLERANCE",
    "adapt",
    "check",
    "coverage",
    "describe",
    "fast_codes",
    "open",
    "open_exact",
    "portable_bounds",
    "prepare",
    "probe",
    "runtime",
    "write",
]
