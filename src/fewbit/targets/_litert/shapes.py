"""Sizes of every value of a program at batch 1, and which axes grow with the batch, found by running it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.model.program import Program
from fewbit.model.reference import Reference

_UNKNOWN = 16  # a free size other than the batch, where the program does not say what it was read with


@dataclass(frozen=True)
class Sizes:
    """``shape`` of each tensor at batch 1; ``free``: its axes that grow with the batch; ``number``: plain integers,
    ``moving``: those that are others in another batch."""

    shape: dict[str, tuple[int, ...]]
    free: dict[str, frozenset[int]]
    dtype: dict[str, str]
    number: dict[str, int]
    moving: frozenset[str] = frozenset()

    def signature(self, name: str) -> tuple[int | None, ...]:
        """The shape with None for axes that grow with the batch."""
        return tuple(None if i in self.free[name] else s for i, s in enumerate(self.shape[name]))


def input_shapes(program: Program, batch: int) -> list[tuple[int, ...]]:
    """A concrete shape for every input: the batch, and what the program was read with for other free sizes."""
    found = []
    for i, shape in enumerate(program.input_shapes):
        example = program.example_shapes[i] if i < len(program.example_shapes) else shape
        sizes = [(e or _UNKNOWN) if s is None else s for s, e in zip(shape, example, strict=True)]
        if shape and shape[0] is None:
            sizes[0] = batch
        found.append(tuple(sizes))
    return found


def sizes(program: Program, free_batch: bool = True) -> Sizes:
    """Sizes of every value. ``free_batch`` False: no axis grows, the file is for one sample at a time."""
    one = _run(program, 1)
    two = one
    if free_batch and all(s and s[0] is None for s in program.input_shapes):
        try:
            two = _run(program, 2)
        except (FewbitError, RuntimeError):
            two = one
    shape, free, dtype, number = {}, {}, {}, {}
    for name, value in one.items():
        if isinstance(value, Tensor):
            shape[name] = tuple(value.shape)
            free[name] = frozenset(i for i, s in enumerate(value.shape) if two[name].shape[i] != s)
            dtype[name] = str(value.dtype).removeprefix("torch.")
        elif isinstance(value, int):
            number[name] = value
    moving = frozenset(name for name in number if two[name] != number[name])
    return Sizes(shape, free, dtype, number, moving)


def _run(program: Program, batch: int) -> dict[str, Any]:
    inputs = [
        torch.zeros(shape, dtype=getattr(torch, dtype))
        for shape, dtype in zip(input_shapes(program, batch), program.input_dtypes, strict=True)
    ]
    return Reference(program, "q31_double").run(*inputs)
