"""OpenVINO: an ``.xml`` file with its weights in a ``.bin`` beside it, run by OpenVINO's CPU plugin."""

from pathlib import Path

from fewbit.errors import TargetError
from fewbit.model.program import Program
from fewbit.plan import Row
from fewbit.targets._openvino.probe import coverage, describe, embed, probe
from fewbit.targets._openvino.runtime import open_file, openvino, runtime
from fewbit.targets._openvino.writer import IrWriter, converted
from fewbit.targets._planning import check, unsigned
from fewbit.targets._saturation import portable_bounds

SUFFIX = ".xml"
REQUANTIZATION = "f32_even"
TOLERANCE = 1
open = open_exact = open_file
_GROUP = 32


def adapt(row: Row) -> Row:
    """Activations unsigned: see ``unsigned``."""
    return unsigned(row, "OpenVINO")


def prepare(program: Program) -> Program:
    """As it is: OpenVINO's kernels take uint8 activations and int8 weights, as the lowering gives them."""
    return program


def write(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write the program to ``path`` and its weights to the ``.bin`` of the same name."""
    if path.suffix != SUFFIX:
        raise TargetError(f"{path}: OpenVINO files end in {SUFFIX}")
    writer = IrWriter(program)
    graph = writer.model({})
    del graph.metadata_props[:]  # OpenVINO would keep a second description of the program
    model = converted(graph)
    embed(model, writer, metadata)
    dynamic = any(op.kind.startswith("dynamic_") for op in program.ops)
    model.set_rt_info(str(_GROUP if dynamic else 0), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    openvino().save_model(model, str(path), compress_to_fp16=False)


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
