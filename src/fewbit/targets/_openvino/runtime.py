"""OpenVINO on the CPU: reading IR files, compiling them with known settings, running them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import ArtifactError, DataError, TargetError
from fewbit.extras import require

_SHAPES = 4  # for which a file stays compiled
# Float parts in float32: by itself OpenVINO computes them in bfloat16 where the CPU can. One thread, the caller's own:
# with a stream it is another one, and on a busy machine waiting for that takes longer than a small network.
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "0", "INFERENCE_NUM_THREADS": "1"}


def openvino() -> Any:
    """The package. Raises ``MissingExtraError`` where it is not installed."""
    return require("openvino", "openvino", "writing and running OpenVINO files")


def runtime() -> str:
    """Its name and version."""
    return f"OpenVINO {openvino().__version__.split('-')[0]}"


@cache
def core() -> Any:
    """OpenVINO itself: one for the process, since making one takes its time."""
    return openvino().Core()


def read(path: Path) -> Any:
    """The model of an IR file. Raises ``ArtifactError`` where a part is missing or OpenVINO refuses it."""
    for part in (path, path.with_suffix(".bin")):
        if not part.is_file():
            also = "" if part == path else f", which belongs to {path.name}"
            raise ArtifactError(f"{part}: no such file{also}")
    try:
        return core().read_model(str(path), str(path.with_suffix(".bin")))
    except Exception as error:  # OpenVINO raises RuntimeError and types of its bindings
        raise ArtifactError(f"{path}: not a valid OpenVINO file ({_reason(error)})") from error


def compiled(model: Any, path: Path, inputs: tuple[Tensor, ...] | None = None) -> Any:
    """The model ready to run on the CPU, for the shapes of ``inputs`` only where these are given (twice as fast).

    Raises ``DataError`` where the inputs are not the model's, ``ArtifactError`` where OpenVINO cannot compile it.
    """
    if inputs is not None:
        if len(inputs) != len(model.inputs):
            names = ", ".join(i.any_name for i in model.inputs)
            raise DataError(f"{path}: takes {len(model.inputs)} inputs ({names}), {len(inputs)} given")
        shapes = [tuple(x.shape) for x in inputs]
        try:
            model.reshape({i: list(shape) for i, shape in zip(model.inputs, shapes, strict=True)})
        except Exception as error:
            raise DataError(f"{path}: does not take inputs of shapes {shapes} ({_reason(error)})") from error
    try:
        return core().compile_model(model, "CPU", SETTINGS)
    except Exception as error:  # OpenVINO raises RuntimeError and types of its bindings
        raise ArtifactError(f"{path}: OpenVINO cannot compile it ({_reason(error)})") from error


def infer(ready: Any, inputs: tuple[Tensor, ...], path: Path) -> list[np.ndarray]:
    """All outputs of a compiled model."""
    try:
        results = ready([x.detach().contiguous().numpy() for x in inputs])
        return [np.array(results[i]) for i in range(len(ready.outputs))]
    except Exception as error:
        raise TargetError(f"{path}: OpenVINO failed: {_reason(error)}") from error


def open_file(path: Path) -> Callable[..., list[Tensor]]:
    """The file ready to run, on one thread, compiled for each shape of input that it is given.

    Raises ``ArtifactError`` where it is missing or refused.
    """
    read(path)
    ready: dict[tuple[torch.Size, ...], Any] = {}

    def answer(*inputs: Tensor) -> list[Tensor]:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in ready:
            if len(ready) >= _SHAPES:
                del ready[next(iter(ready))]
            ready[shapes] = compiled(read(path), path, inputs)
        return [torch.from_numpy(o) for o in infer(ready[shapes], inputs, path)]

    return answer


def _reason(error: Exception) -> str:
    """The last line that says something: OpenVINO tells first where in its sources it failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
