"""ExecuTorch, run by its own runtime: ``.pte`` files whose integer kernels are XNNPACK's.

A file takes up to 64 samples at once; what the model leaves open besides has the sizes of the example. Convolutions
and linear layers follow ``f32_even``, sums XNNPACK's fixed point, as the profile "xnnpack" says.
"""

from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from fewbit.errors import ArtifactError, TargetError
from fewbit.model.program import Op, Program
from fewbit.model.signed import signed
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Row
from fewbit.targets import Described, Kernel, Runner
from fewbit.targets._pt2e import pte
from fewbit.targets._pt2e.delegates import kernels
from fewbit.targets._pt2e.export import fixed_sizes
from fewbit.targets._pt2e.module import visible
from fewbit.targets._pt2e.session import Session, verified
from fewbit.targets._pt2e.xnnpack import lowered, package

SUFFIX = ".pte"
REQUANTIZATION = "xnnpack"
TOLERANCE = 1
_MOST_PROBED = 150  # operations: to lower more takes a minute


def runtime() -> str:
    """ExecuTorch and its version. Raises ``MissingExtraError`` where it is not installed."""
    package("version")
    return f"ExecuTorch {version('executorch')} (XNNPACK)"


def adapt(row: Row) -> Row:
    """As it is: unsigned codes become signed ones when the file is written, on the same grid."""
    return row


def check(row: Row) -> str | None:
    """None where XNNPACK can run the row, else why not and what to do."""
    scheme = row.scheme
    if scheme is not None and row.kind != "weight" and (not scheme.spec.integer or scheme.spec.bits > 8):
        return f"{scheme.format} activations have no integer kernel; use 8 bits or fewer, or keep the layer float"
    return None


def portable_bounds(weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """As they are: XNNPACK widens codes to 16 bits before it multiplies, so no CPU saturates."""
    return lo, hi


def prepare(program: Program) -> Program:
    """The program with signed codes, which is what XNNPACK's kernels take."""
    return signed(program)


def write(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write the program, lowered to XNNPACK, with a description of itself that refers to the file's own constants.

    Raises ``TargetError`` for what ExecuTorch has no kernel for at all.
    """
    _refuse(program)

    def methods(constants: list[Tensor | bytes], independent: bool) -> dict[str, str]:
        facts = {"metadata": metadata, "independent": independent}
        return pte.methods(pte.described(program, pte.by_hash(constants), facts))

    path.write_bytes(pte.sealed(lowered(program, fixed_sizes(program, program.input_shapes), methods)))


def open(path: Path) -> Runner:
    """The file ready to run on one thread, which is then the number of threads of ExecuTorch in this process."""
    data = _bytes(path)
    verified(path, data)
    return Session(path, data, pte.read(path, data).independent)


open_exact = open


def describe(path: Path) -> Described:
    """What the file carries; no program where another tool wrote it."""
    data = _bytes(path)
    verified(path, data)
    content = pte.read(path, data)
    if content.program is None:
        return Described(None)
    return Described(content.program, {name: name for name in visible(content.program)}, content.properties)


def probe(path: Path, inputs: tuple[Tensor, ...], codes: dict[str, str]) -> dict[str, Tensor]:
    """The codes (int32) inside: the file's program, lowered once more so that XNNPACK's kernels give them too."""
    program = describe(path).program
    if program is None or not program.complete() or len(program.ops) > _MOST_PROBED:
        return {}
    names = [name for name in visible(program) if name in codes]
    shapes: list[tuple[int | None, ...]] = [tuple(x.shape) for x in inputs]
    data = lowered(program, shapes, lambda constants, independent: {}, names)
    values = Session(path, data)(*inputs)[len(program.output_names()) :]
    return {name: value.to(torch.int32) for name, value in zip(names, values, strict=True)}


def coverage(path: Path, program: Program, codes: dict[str, str]) -> list[Kernel]:
    """Which operations XNNPACK computes on integers, read from its graphs in the file."""
    data = _bytes(path)
    verified(path, data)
    return kernels(program, pte.graphs(path, data))


def _refuse(program: Program) -> None:
    volumes = [op.layer for op in program.ops if "weight" in op.constants and _is_volume(op)]
    if volumes:
        raise TargetError(
            f"{', '.join(volumes)}: ExecuTorch has no three-dimensional convolution; write this model for another "
            "target, such as onnx"
        )


def _is_volume(op: Op) -> bool:
    return (
        str(op.attrs.get("type", op.kind)).startswith(("Conv", "conv", "dynamic_conv"))
        and op.constants["weight"].dim() == 5
    )


def _bytes(path: Path) -> bytes:
    """The file's content, as it was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not pte.sound(data):
        raise ArtifactError(f"{path}: damaged: its checksum is another one; copy or export it again")
    return data


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
