"""PyTorch itself: a ``.pt2`` archive of the Q/DQ graph, compiled by torch's inductor into oneDNN's integer kernels.

Anybody can load such a file with ``torch.export.load``, after importing ``torch.ao.quantization.fx._decomposed``, and
compile it with ``torch.compile(dynamic=False)`` under ``torch.no_grad()`` and
``torch._inductor.config.patch(freezing=True)``. fewbit rebuilds the same graph from the program in the archive
instead, because loading a ``.pt2`` file runs what it says.

Convolutions and linear layers follow ``f32_even`` except where oneDNN's own order of the scales moves a tie:
measured with torch 2.13 on AVX512-VNNI, 19 of 12.6 million codes of ResNet-20 and MobileNetV2 differ, each by one unit.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from fewbit.model.program import Program
from fewbit.model.signed import unsigned_codes
from fewbit.plan import Row
from fewbit.targets import Kernel, Runner
from fewbit.targets._pt2e import archive, inductor
from fewbit.targets._pt2e.export import exported, sample
from fewbit.targets._pt2e.module import QdqModule, visible
from fewbit.targets._pt2e.styles import ONEDNN
from fewbit.targets._saturation import portable_bounds

SUFFIX = ".pt2"
REQUANTIZATION = "f32_even"
TOLERANCE = 1
describe = archive.read


def runtime() -> str:
    """torch and its compiler; part of every installation."""
    return f"PyTorch {torch.__version__} (inductor, oneDNN)"


def adapt(row: Row) -> Row:
    """Signed activations become unsigned of the same width: as many levels, and what oneDNN multiplies fastest."""
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
    return dataclasses.replace(
        row, scheme=unsigned, because=f"{row.because}; unsigned, as oneDNN's kernels want it"
    )


def check(row: Row) -> str | None:
    """None where torch's integer kernels can run the row, else why not and what to do."""
    scheme = row.scheme
    if scheme is not None and row.kind != "weight" and (not scheme.spec.integer or scheme.spec.bits > 8):
        return f"{scheme.format} activations have no integer kernel; use 8 bits or fewer, or keep the layer float"
    return None


def prepare(program: Program) -> Program:
    """The program with unsigned codes: oneDNN takes uint8 activations and int8 weights."""
    return unsigned_codes(program)


def write(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write the program as a torch.export archive; all sizes stay free that the program leaves open."""
    module = QdqModule(program, ONEDNN)
    inputs = sample(program, program.input_shapes, module)
    archive.write(exported(module, inputs, program.input_shapes), module, inputs, path, metadata)


def open(path: Path) -> Runner:
    """The file compiled for each size of input that it is given (seconds, the first time), on one thread."""
    return _runner(_program(path))


open_exact = open


def probe(path: Path, inputs: tuple[Tensor, ...], codes: dict[str, str]) -> dict[str, Tensor]:
    """The codes (int32) inside the compiled graph, compiled once more so that it gives them too."""
    program = _program(path)
    names = [name for name in visible(program) if name in codes]
    values = _runner(program, names)(*inputs)[len(program.output_names()) :]
    return {name: value.to(torch.int32) for name, value in zip(names, values, strict=True)}


def coverage(path: Path, program: Program, codes: dict[str, str]) -> list[Kernel]:
    """Which layers oneDNN multiplies as integers, read from the compiler's own graph."""
    module = QdqModule(program, ONEDNN)
    inputs = sample(program, program.input_shapes, module)
    return inductor.kernels(program, inductor.products(module, inputs))


def _program(path: Path) -> Program:
    program = archive.read(path).program
    assert program is not None
    return program


def _runner(program: Program, codes: list[str] | None = None) -> Runner:
    module = QdqModule(program, ONEDNN, codes or ())
    functions: dict[tuple[torch.Size, ...], inductor.Compiled] = {}

    def answer(*inputs: Tensor) -> list[Tensor]:
        sizes = tuple(x.shape for x in inputs)
        if sizes not in functions:
            functions[sizes] = inductor.compiled(module, inputs)
        return functions[sizes](*inputs)

    return answer


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
