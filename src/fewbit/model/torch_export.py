"""Runs `torch.export` on a private copy of a module: free dimensions, eval mode, float32, and errors in one
sentence.
"""

from __future__ import annotations

import copy
import logging
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fewbit.errors import ModelError

Example = tuple[Tensor, ...]
_SIZE = re.compile(r"L\['(\w+)'\](?:\[\d+\])*\.size\(\)\[(\d+)\]")


@dataclass
class Traced:
    """An exported program, the private float32 copy it was traced from, and the example that fits both."""

    program: ExportedProgram
    module: nn.Module
    example: Example
    notes: list[str] = field(default_factory=list)


def private_copy(module: nn.Module, notes: list[str]) -> nn.Module:
    """A float32 copy of `module` on the CPU in eval mode; the user's module is left as it is."""
    module = getattr(module, "_orig_mod", module)
    try:
        clone = copy.deepcopy(module)
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} cannot be copied ({first_line(error)}): fewbit reads a copy, so "
            "that your "
            "model stays as it is; remove old-style weight_norm or tensors that carry a gradient "
            "history first"
        ) from error
    tensors = [*clone.parameters(), *clone.buffers()]
    foreign = sorted(
        {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {"float32"}
    )
    if foreign:
        notes.append(f"{' and '.join(foreign)} parameters were converted to float32 before reading")
    if any(t.device.type != "cpu" for t in tensors):
        notes.append("the model was copied to the CPU before reading")
    return clone.to("cpu").float().eval()


def as_example(example: Any) -> Example:
    """The example as a tuple of CPU tensors, floating ones in float32; ModelError for anything else."""
    items = example if isinstance(example, tuple | list) else (example,)
    if not items:
        raise ModelError("the example is empty: expected one tensor for each input of the model's forward")
    for index, item in enumerate(items):
        if not isinstance(item, Tensor):
            raise ModelError(
                f"example input {index} is {a(item)}: expected a torch.Tensor; "
                "wrap the model if its forward takes other arguments"
            )
    return tuple(
        t.detach().to("cpu", torch.float32) if t.is_floating_point() else t.detach().to("cpu") for t in items
    )


def trace(
    module: nn.Module, example: Example, dynamic_shapes: Any, notes: list[str], images_fixed: bool = False
) -> Traced:
    """Export `module` (already private) with as many free dimensions as it allows; ModelError if it cannot
    be.

    `images_fixed` leaves inputs of four and more dimensions no other freedom than the batch size.
    """
    if dynamic_shapes is not None:
        return Traced(_export(module, example, dynamic_shapes), module, example, notes)
    doubled = _double_batch(example)
    attempts = [(doubled, _all_free(doubled, images_fixed)), (doubled, _batch_free(doubled))]
    for inputs, shapes in attempts:
        try:
            program = _export(module, inputs, shapes)
            if (pinned := _pinned(program, inputs, shapes)) != shapes:
                program = _export(module, inputs, pinned)
        except ModelError:
            continue  # a freedom that the model does not have; the attempt without any says what is wrong
        if _free_batch(program):
            return Traced(program, module, inputs, notes)
        if inputs is example:
            notes.append(_fixed_note(example))
            return Traced(program, module, example, notes)
    program = _export(module, example, None)
    notes.append(_fixed_note(example))
    return Traced(program, module, example, notes)


def _fixed_note(example: Example) -> str:
    batch = example[0].shape[0] if example[0].dim() else 1
    return f"the batch size is fixed at {batch}: the model does not allow another"


def _double_batch(example: Example) -> Example:
    """The example with a batch of 2 where it was 1, because export takes a size of 1 for a constant."""
    if not example[0].dim() or example[0].shape[0] != 1:
        return example
    return tuple(torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t for t in example)


def _all_free(example: Example, images_fixed: bool) -> tuple[dict[int, Any], ...]:
    free = [1 if images_fixed and t.dim() >= 4 else t.dim() for t in example]
    return tuple(dict.fromkeys(range(dims), Dim.AUTO) for dims in free)


def _batch_free(example: Example) -> tuple[dict[int, Any], ...]:
    batch = example[0].shape[0] if example[0].dim() else None
    return tuple({0: Dim.AUTO} if t.dim() and t.shape[0] == batch else {} for t in example)


def _pinned(program: ExportedProgram, example: Example, shapes: tuple[dict[int, Any], ...]) -> Any:
    """`shapes` less the dimensions that work for some sizes only (`x.size(1) % 2 == 0`, ...)."""
    names = list(program.graph_signature.user_inputs)
    fixed: set[tuple[str, int]] = set()
    for guard in getattr(program, "_guards_code", None) or []:
        sizes = {(name, int(dim)) for name, dim in _SIZE.findall(guard)}
        plain = re.fullmatch(rf"{_SIZE.pattern} == (\d+|{_SIZE.pattern})", guard)
        if "==" in guard and not plain:
            fixed |= sizes
    return tuple(
        {d: free for d, free in shape.items() if (name, d) not in fixed}
        for name, shape in zip(names, shapes, strict=True)
    )


def _free_batch(program: ExportedProgram) -> bool:
    name = program.graph_signature.user_inputs[0]
    value = next(n for n in program.graph.nodes if n.name == name).meta["val"]
    if not value.dim():
        return True
    return not isinstance(value.shape[0], int) and value.shape[0].node.maybe_as_int() is None


def _export(module: nn.Module, example: Example, shapes: Any) -> ExportedProgram:
    try:
        with quiet(), without_fast_path():
            return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _explain(module, error) from error


def _explain(module: nn.Module, error: Exception) -> ModelError:
    name, where = type(module).__name__, _place(error)
    if "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__:
        return ModelError(
            f"{name} branches or takes a size from the values of a tensor{where}: expected control "
            "flow that depends "
            "on shapes only; use torch.where, or quantize the parts around it"
        )
    return ModelError(
        f"{name} cannot be exported{where} ({first_line(error)}): expected a forward that "
        "torch.export can trace; "
        "replace code that leaves PyTorch, or fix sizes with dynamic_shapes"
    )


def _place(error: BaseException) -> str:
    """Where the user's code was when it failed: the innermost frame that is neither torch's nor ours."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*own, "<"))]
    frames = [f for f in frames if not f.filename.startswith(sysconfig.get_path("stdlib"))]
    return f" at {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


def first_line(error: BaseException) -> str:
    """The first sentence of an exception's message, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.split(r"\. |\.$", lines[0])[0].rstrip(":") if lines else type(error).__name__


def a(value: object) -> str:
    """The class of a value with its article: "a list", "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings from inside torch.export: none is about the user's model."""
    talkative = logging.getLogger("torch._export.non_strict_utils")  # says so of every dimension of size one
    before = talkative.level
    talkative.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talkative.setLevel(before)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Attention as separate operators: the fused fast path has no standard form."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
