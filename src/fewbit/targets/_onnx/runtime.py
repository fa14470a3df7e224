"""ONNX Runtime sessions."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewbit.errors import ArtifactError, MissingExtraError


def session(source: Path | bytes, threads: int | None = None, optimized: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU with all graph optimizations on.

    ``source``: a file or the bytes of a model. ``threads``: for one operator; by default all cores. ``optimized``:
    where to write what the runtime made of the graph.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("onnxruntime is not installed: pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return ort.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises types of its own, which have no common importable base
        name = "the probed model" if isinstance(source, bytes) else str(source)
        raise ArtifactError(
            f"{name}: ONNX Runtime cannot load it ({str(error).splitlines()[0][:200]})"
        ) from error


def open_session(path: Path) -> Any:
    """A session for anybody's file. Raises ``ArtifactError`` where it is missing or ONNX Runtime refuses it."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    return session(path)


def run(path: Path, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    """The outputs of the file for these inputs."""
    s = session(path)
    return s.run(None, {i.name: x.numpy() for i, x in zip(s.get_inputs(), inputs, strict=True)})
