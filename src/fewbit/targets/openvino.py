"""OpenVINO: an ``.xml`` file with its weights in a ``.bin`` beside it, run by OpenVINO's CPU plugin.

What was measured (2026.4 on x86-64: SSE4.1, AVX2, AVX512, VNNI), and what a user of these files should know:

- Given its inputs, each layer answers as ``f32_even``, but for one code in some 400,000, which is one unit off: float32
  products rounded elsewhere. A tie in the first quantize step may go the other way, too; hence the tolerance of 1.
- A convolution that only an addition reads becomes one kernel with it, in which the convolution's own codes are not
  rounded: closer to the float model than the program is, and up to two units away from it. The gate makes all codes
  visible, which undoes that, and judges each layer; outputs are those of the file as it is.
- Without VNNI, kernels saturate sums of two products in 16 bits, as ONNX Runtime's do: ``portable_bounds`` prevents it.
- Where the CPU has bfloat16, OpenVINO computes float parts in it unless it is told ``INFERENCE_PRECISION_HINT="f32"``.
- Fixed shapes (``model.reshape``) are up to twice as fast as the free ones that files have; ``open`` fixes them.
- Activations are rounded on the way only if the recipe says so: ``activations="float"`` switches OpenVINO's dynamic
  quantization off in the file, ``activations="dynamic"`` asks for it, with a range for each group of 32 numbers.
"""

from pathlib import Path

from fewbit.errors import TargetError
from fewbit.model.program import Program
from fewbit.model.signed import unsigned_codes
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
_GROUP = 32  # of numbers that share a range taken at run time: OpenVINO's own default


def adapt(row: Row) -> Row:
    """Activations unsigned: see ``unsigned``."""
    return unsigned(row, "OpenVINO")


def prepare(program: Program) -> Program:
    """The program with unsigned codes: OpenVINO's kernels take uint8 activations and int8 weights."""
    return unsigned_codes(program)


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
