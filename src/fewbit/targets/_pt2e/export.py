"""torch.export of a program's module: the inputs it is traced with, which of their sizes stay free, and silence."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fewbit.errors import TargetError
from fewbit.model.program import Program
from fewbit.model.torch_export import first_line, without_fast_path

BATCH = 16  # of the inputs that a program is traced with: torch takes smaller ones for a reason to choose other kernels
LARGEST_SIZE = 256  # of a free dimension that is not the batch, where a runtime wants to know
_SIZES = (16, 32, 64, 128, 224, 8, 4)

Shapes = list[tuple[int | None, ...]]


def fixed_sizes(program: Program, shapes: Shapes) -> Shapes:
    """Shapes with all free sizes but the first as in the example, where that is known."""
    if not program.example_shapes:
        return shapes
    return [
        tuple(
            given if i and size is None else size
            for i, (size, given) in enumerate(zip(shape, sizes, strict=True))
        )
        for shape, sizes in zip(shapes, program.example_shapes, strict=True)
    ]


def sample(program: Program, shapes: Shapes, module: nn.Module) -> tuple[Tensor, ...]:
    """Inputs (seeded) that the module runs on: in the example's sizes, or whatever its free dimensions want."""
    error: Exception | None = None
    shapes = fixed_sizes(program, shapes)
    for size in _SIZES:
        inputs = _inputs(program, shapes, size)
        try:
            with torch.no_grad():
                module(*inputs)
        except (RuntimeError, ValueError, IndexError) as found:
            error = error or found
            continue
        return inputs
    assert error is not None
    raise TargetError(
        f"no input size was found that the model runs on ({first_line(error)}); fix its input sizes"
    )


def _inputs(program: Program, shapes: Shapes, size: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape, dtype in zip(shapes, program.input_dtypes, strict=True):
        sizes = [(BATCH if i == 0 else size) if s is None else s for i, s in enumerate(shape)]
        if dtype.startswith("float"):
            found.append(torch.randn(sizes, generator=generator))
        else:
            found.append(torch.zeros(sizes, dtype=getattr(torch, dtype)))
    return tuple(found)


def exported(
    module: nn.Module, inputs: tuple[Tensor, ...], shapes: Shapes, largest: int | None = None
) -> ExportedProgram:
    """The module's graph; sizes that ``shapes`` leaves open stay free, with limits if there is a ``largest`` batch."""
    free = [
        {i: Dim.AUTO(min=1, max=_limit(i, largest)) for i, s in enumerate(shape) if s is None}
        for shape in shapes
    ]
    try:
        with quiet(), without_fast_path(), torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=(tuple(free),) if any(free) else None)
    except Exception as error:
        raise TargetError(f"torch.export cannot trace the quantized model ({first_line(error)})") from error


def _limit(axis: int, largest: int | None) -> int | None:
    return None if largest is None else largest if axis == 0 else LARGEST_SIZE


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines of the tools: none is about the user's model."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def mute() -> Iterator[None]:
    """Nothing on standard output and standard error either: C++ libraries and programs write there."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nothing, stream)
        with quiet():
            yield
    finally:
        for stream, before in zip((1, 2), kept, strict=True):
            os.dup2(before, stream)
            os.close(before)
        os.close(nothing)
