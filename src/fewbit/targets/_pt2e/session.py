"""Runs ``.pte`` files in ExecuTorch's own runtime, on one thread, in pieces where a file takes fewer samples."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ArtifactError, DataError, TargetError
from fewbit.model.torch_export import first_line
from fewbit.targets._pt2e.export import mute
from fewbit.targets._pt2e.xnnpack import package


@cache
def _runtime() -> Any:
    """The runtime with one thread: its pool belongs to the whole process."""
    bindings, runtime = package("extension.pybindings.portable_lib"), package("runtime")
    with mute():
        bindings._unsafe_reset_threadpool(1)
        return runtime.Runtime.get()


def verified(path: Path, data: bytes) -> Any:
    """The file as the runtime loads it, with its own checks. Raises ``ArtifactError`` where it refuses it."""
    with mute():
        try:
            return _runtime().load_program(data)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: ExecuTorch cannot load it ({first_line(error)})") from error


class Session:
    """A file that is loaded and ready: called with the model's inputs, it gives the list of outputs.

    ``independent`` samples are run in pieces where more are given than fit at once.
    """

    def __init__(self, path: Path, data: bytes, independent: bool = False) -> None:
        self._path = path
        self._independent = independent
        self._program = verified(path, data)  # kept: its methods live in its memory
        with mute():
            try:
                self._method = self._program.load_method("forward")
            except RuntimeError as error:
                raise ArtifactError(f"{path}: ExecuTorch cannot prepare it ({first_line(error)})") from error
        if self._method is None:
            raise ArtifactError(f"{path}: has no method 'forward'")
        meta = self._method.metadata
        self._limits = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        self._check(inputs)
        size = self._limits[0][0] if self._limits and self._limits[0] else 1
        if not inputs or not inputs[0].dim() or len(inputs[0]) <= size:
            return self._execute(inputs)
        if not self._independent:
            raise DataError(f"{self._path}: {len(inputs[0])} samples given, at most {size} fit at once")
        results = [self._execute(piece) for piece in zip(*(x.split(size) for x in inputs), strict=True)]
        return [torch.cat(parts) for parts in zip(*results, strict=True)]

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self._limits):
            raise DataError(f"{self._path}: {len(inputs)} inputs given, the model takes {len(self._limits)}")
        for i, (x, limits) in enumerate(zip(inputs, self._limits, strict=True)):
            if x.dim() != len(limits) or any(
                n > most for n, most in zip(x.shape[1:], limits[1:], strict=True)
            ):
                raise DataError(
                    f"{self._path}: input {i} has shape {tuple(x.shape)}, the file takes up to {limits}; export again "
                    "with an example of that size"
                )

    def _execute(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        try:
            outputs = self._method.execute([x.contiguous() for x in inputs])
        except RuntimeError as error:
            shapes = [tuple(x.shape) for x in inputs]
            raise TargetError(
                f"{self._path}: ExecuTorch failed on inputs of shapes {shapes}, the file takes up to {self._limits} "
                f"({first_line(error)})"
            ) from error
        return [x.clone() for x in outputs]  # its memory is written again by the next call
