"""What LiteRT's own choice of kernels (XNNPACK) computes, one operation at a time, on the codes of the exact kernels.

Inside a delegate no tensor can be seen, so each integer operation is written as a file of its own.
"""

import tempfile
from pathlib import Path

from torch import Tensor

from fewbit.model.program import Op, Program
from fewbit.targets._litert.runtime import Session
from fewbit.targets._litert.writer import Writer


def fast_codes(program: Program, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes (int32) of every integer operation whose inputs were seen, by the value's name."""
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.tflite"
        for op in program.ops:
            names = [*op.inputs, op.output]
            if op.domain != "integer" or any(n not in seen or _format(program, n) != "int8" for n in names):
                continue
            path.write_bytes(Writer(_alone(op, program, seen)).file({}))
            found[op.output] = Session(path).codes([seen[name] for name in dict.fromkeys(op.inputs)])
    return found


def _format(program: Program, name: str) -> str:
    return program.codings[name].scheme.format if name in program.codings else ""


def _alone(op: Op, program: Program, seen: dict[str, Tensor]) -> Program:
    """A program of one operation that takes codes and gives codes."""
    names = list(dict.fromkeys(op.inputs))
    outside = {name: f"{name}/outside" for name in names}
    steps = [Op("quantize", "boundary", name, name, [outside[name]], name) for name in names]
    result = f"{op.output}/outside"
    ops = [*steps, op, Op("dequantize", "boundary", op.output, op.output, [op.output], result)]
    shapes: list[tuple[int | None, ...]] = [(None, *seen[name].shape[1:]) for name in names]
    batches = {len(seen[name]) for name in names}
    if len(batches) > 1:  # a constant beside what was computed: sizes as they are
        shapes = [tuple(seen[name].shape) for name in names]
    codings = {name: program.codings[name] for name in (*names, op.output)}
    return Program(
        list(outside.values()), shapes, ["float32"] * len(names), result, [tuple(seen[op.output].shape)], ["float32"],
        ops, codings, io="int8",
    )  # fmt: skip
