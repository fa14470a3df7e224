"""ONNX Runtime sessions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ArtifactError, DataError
from fewbit.extras import require


def session(source: Path | bytes, threads: int | None = None, optimized: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU with all graph optimizations on.

    ``source``: a file or the bytes of a model. ``threads``: for one operator; by default all cores. ``optimized``:
    where to write what the runtime made of the graph.
    """
    ort = require("onnxruntime", "onnx", "running ONNX files")
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


def runtime() -> str:
    """Its name and version."""
    return f"ONNX Runtime {require('onnxruntime', 'onnx', 'running ONNX files').__version__}"


def open_file(path: Path) -> Callable[..., list[Tensor]]:
    """The file ready to run, on one thread. Raises ``ArtifactError`` where it is missing or refused."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    opened = session(path, 1)
    names = [i.name for i in opened.get_inputs()]

    def answer(*inputs: Tensor) -> list[Tensor]:
        if len(inputs) != len(names):
            raise DataError(f"{path}: takes {len(names)} inputs ({', '.join(names)}), {len(inputs)} given")
        outputs = opened.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return [torch.from_numpy(o) for o in outputs]

    return answer
