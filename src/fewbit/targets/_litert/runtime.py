"""The LiteRT interpreter: files opened with its fast kernels, or with the reference kernels and every tensor kept."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import ArtifactError, DataError, TargetError
from fewbit.extras import require
from fewbit.targets import Runner

PURPOSE = "running .tflite files"


def runtime() -> str:
    """Its name and version."""
    return f"LiteRT {require('ai_edge_litert', 'litert', PURPOSE).__version__}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The interpreter's C++ code writes what it does to standard error; that is not the user's business."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def interpreter(path: Path, reference: bool = False) -> Any:
    """An interpreter on one thread. ``reference``: slow kernels by the book, and intermediate tensors kept."""
    module = require("ai_edge_litert.interpreter", "litert", PURPOSE)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    kinds = module.OpResolverType
    try:
        with quiet():
            return module.Interpreter(
                model_path=str(path),
                num_threads=1,
                experimental_op_resolver_type=kinds.BUILTIN_REF if reference else kinds.AUTO,
                experimental_preserve_all_tensors=reference,
            )
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path}: LiteRT cannot load it ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


class Session:
    """A file ready to run on any batch. Float tensors in and out, also where the file itself takes codes."""

    def __init__(self, path: Path, reference: bool = False) -> None:
        self.path, self.reference = path, reference
        self.it = interpreter(path, reference)
        self.inputs = self.it.get_input_details()
        self.outputs = self.it.get_output_details()
        self.shapes: list[tuple[int, ...]] | None = None
        self.batch_is_free = all(
            len(d["shape_signature"]) > 0 and d["shape_signature"][0] == -1 for d in self.inputs
        )

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if len(inputs) != len(self.inputs):
            raise DataError(f"{self.path}: takes {len(self.inputs)} inputs, {len(inputs)} given")
        results = [self.once(piece) for piece in self.pieces(inputs)]
        return results[0] if len(results) == 1 else [torch.cat(parts) for parts in zip(*results, strict=True)]

    def pieces(self, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The samples cut into as many as the file takes in one call."""
        stated = [tuple(d["shape"]) for d in self.inputs]
        if self.batch_is_free or [tuple(x.shape) for x in inputs] == stated or not stated[0]:
            return [inputs]
        step = int(stated[0][0])
        if len(inputs[0]) % step:
            raise DataError(f"{self.path}: takes {step} samples at a time, {len(inputs[0])} given")
        return [tuple(x[i : i + step] for x in inputs) for i in range(0, len(inputs[0]), step)]

    def once(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """One call of the interpreter."""
        try:
            with quiet():
                self._resize([tuple(x.shape) for x in inputs])
                for x, detail in zip(inputs, self.inputs, strict=True):
                    self.it.set_tensor(detail["index"], _given(x, detail))
                self.it.invoke()
                return [_taken(self.it.get_tensor(d["index"]), d) for d in self.outputs]
        except (ValueError, RuntimeError) as error:
            raise TargetError(f"{self.path}: LiteRT failed: {_first_line(error)}") from error

    def codes(self, inputs: list[Tensor]) -> Tensor:
        """The first output's codes for inputs that are codes, in a file that takes and gives codes."""
        with quiet():
            self._resize([tuple(x.shape) for x in inputs])
            for x, detail in zip(inputs, self.inputs, strict=True):
                self.it.set_tensor(detail["index"], x.numpy().astype(detail["dtype"]))
            self.it.invoke()
            return torch.from_numpy(self.it.get_tensor(self.outputs[0]["index"]).astype(np.int32))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the last call by name, as it is stored."""
        found = {}
        for detail in self.it.get_tensor_details():
            with contextlib.suppress(ValueError):  # a tensor that the call did not need
                found[str(detail["name"])] = torch.from_numpy(self.it.get_tensor(detail["index"]).copy())
        return found

    def _resize(self, shapes: list[tuple[int, ...]]) -> None:
        if shapes == self.shapes:
            return
        for shape, detail in zip(shapes, self.inputs, strict=True):
            if tuple(detail["shape"]) != shape or self.shapes is not None:
                self.it.resize_tensor_input(detail["index"], list(shape), strict=False)
        self.it.allocate_tensors()
        self.shapes = shapes


def _given(x: Tensor, detail: dict[str, Any]) -> np.ndarray:
    """An input as the file takes it: floats become codes where it takes codes."""
    value, dtype = x.numpy(), np.dtype(detail["dtype"])
    scale, zero_point = detail["quantization"]
    if np.issubdtype(dtype, np.integer) and scale and np.issubdtype(value.dtype, np.floating):
        limits = np.iinfo(dtype)
        quotient = (value / np.float32(scale)).astype(np.float64)
        # halves away from zero, as the operator QUANTIZE has it
        rounded = np.sign(quotient) * np.floor(np.abs(quotient) + 0.5)
        value = np.clip(rounded + zero_point, limits.min, limits.max)
    return np.ascontiguousarray(value.astype(dtype))


def _taken(value: np.ndarray, detail: dict[str, Any]) -> Tensor:
    """An output as numbers: codes are dequantized."""
    scale, zero_point = detail["quantization"]
    if np.issubdtype(value.dtype, np.integer) and scale:
        return torch.from_numpy(
            (value.astype(np.int32) - np.int32(zero_point)).astype(np.float32) * np.float32(scale)
        )
    return torch.from_numpy(np.array(value))


def open_file(path: Path) -> Runner:
    """The file ready to run with LiteRT's own choice of kernels (XNNPACK), on one thread."""
    return Session(path)


def open_exact(path: Path) -> Runner:
    """The file ready to run with the reference kernels."""
    return Session(path, reference=True)


def probe(path: Path, inputs: tuple[Tensor, ...], codes: dict[str, str]) -> dict[str, Tensor]:
    """Every tensor in ``codes`` as the reference kernels compute it."""
    session = Session(path, reference=True)
    parts: list[dict[str, Tensor]] = []
    for piece in session.pieces(inputs):
        session.once(piece)
        found = session.tensors()
        parts.append({value: found[name].to(torch.int32) for value, name in codes.items() if name in found})
    return {value: torch.cat([p[value] for p in parts]) for value in parts[0]}
