"""Inputs to read an ONNX model with: random numbers of the shapes that the file declares."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import ModelError
from fewbit.model.onnx_graph import Graph, Input

BATCH = 4
FREE = (16, 64, 224)  # sizes to try for other free dimensions
_LARGEST = 2**25  # numbers in a made-up input
_CARRIERS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"})


def draw(graph: Graph, free: int = FREE[0]) -> tuple[Tensor, ...]:
    """One tensor for each input: a batch of 4 and `free` for other sizes where the file leaves them free."""
    generator = torch.Generator().manual_seed(0)
    return tuple(_drawn(i, _below(graph, i), free, generator) for i in graph.inputs)


def given(graph: Graph, example: Any) -> tuple[Tensor, ...]:
    """The user's example, checked against the inputs that the file declares."""
    items = example if isinstance(example, tuple | list) else (example,)
    tensors = tuple(torch.as_tensor(item) if isinstance(item, np.ndarray) else item for item in items)
    names = ", ".join(f"{i.name} {_declared(i)}" for i in graph.inputs)
    if len(tensors) != len(graph.inputs) or not all(isinstance(t, Tensor) for t in tensors):
        raise ModelError(
            f"the example has {len(tensors)} parts: expected one tensor for each input of the file: {names}"
        )
    for tensor, wanted in zip(tensors, graph.inputs, strict=True):
        fits = len(wanted.shape) == tensor.dim() and all(
            not isinstance(s, int) or s == n or at == 0
            for at, (s, n) in enumerate(zip(wanted.shape, tensor.shape, strict=True))
        )
        if not fits:
            raise ModelError(
                f"the example's {wanted.name!r:.80} has shape {list(tensor.shape)}: expected {_declared(wanted)}"
            )
    return tuple(t.detach().to(torch_type(i)) for t, i in zip(tensors, graph.inputs, strict=True))


def torch_type(i: Input) -> torch.dtype:
    """The torch type of an input; floats of any precision are float32."""
    if i.dtype.kind == "f" or str(i.dtype) == "bfloat16":
        return torch.float32
    try:
        return torch.from_numpy(np.zeros(1, i.dtype)).dtype
    except TypeError as error:
        raise ModelError(
            f"input {i.name!r:.80} is of type {i.dtype}: expected floats, integers or bool"
        ) from error


def _declared(i: Input) -> str:
    return f"[{', '.join('?' if s is None else str(s) for s in i.shape)}] of {i.dtype}"


def _drawn(i: Input, below: int, free: int, generator: torch.Generator) -> Tensor:
    shape = [s if isinstance(s, int) else BATCH if at == 0 else free for at, s in enumerate(i.shape)]
    if math.prod(shape) > _LARGEST or any(s == 0 for s in shape):
        raise ModelError(
            f"input {i.name!r:.80} has shape {_declared(i)}: an example of that size is not made up; give one with "
            "example="
        )
    dtype = torch_type(i)
    if dtype == torch.float32:
        return torch.randn(shape, generator=generator)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.8
    return torch.randint(0, max(1, below), shape, generator=generator).to(dtype)


def _below(graph: Graph, i: Input) -> int:
    """A bound for made-up integers: the rows of the smallest table that they look up, else 2."""
    bound, seen, names = 128, False, {i.name}
    for node in graph.nodes:
        if not names & set(node.inputs):
            continue
        if node.op in _CARRIERS and node.inputs[0] in names:
            names |= set(node.outputs)
        elif node.op == "Gather" and len(node.inputs) > 1 and node.inputs[1] in names:
            table = graph.constants.get(node.inputs[0])
            axis = node.attrs.get("axis", 0)
            if table is not None and isinstance(axis, int) and -table.ndim <= axis < table.ndim:
                bound, seen = min(bound, table.shape[axis]), True
    return bound if seen else 2
