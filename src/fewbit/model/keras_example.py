"""Inputs on which a Keras model and what was read of it are compared: the shapes that the model declares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH = 4
FREE = 16  # for sizes that the model leaves open


def draw(model: Any) -> tuple[Tensor, ...]:
    """Normal numbers for each input, the same ones every time; whole numbers that fit where rows are looked up."""
    generator = torch.Generator().manual_seed(0)
    return tuple(_one(model, tensor, generator) for tensor in model.inputs)


def _one(model: Any, tensor: Any, generator: torch.Generator) -> Tensor:
    shape = [BATCH if tensor.shape[0] is None else tensor.shape[0]]
    shape += [FREE if size is None else size for size in tensor.shape[1:]]
    readers = consumers(model, tensor)
    rows = [layer.input_dim for layer in readers if type(layer).__name__ == "Embedding"]
    if rows and len(rows) == len(readers):
        dtype = torch.int32 if tensor.dtype == "int32" else torch.int64
        return torch.randint(0, min(rows), shape, generator=generator, dtype=dtype)
    if "int" in tensor.dtype:
        high = 256 if tensor.dtype == "uint8" else 2
        return torch.randint(0, high, shape, generator=generator, dtype=getattr(torch, tensor.dtype))
    numbers = torch.randn(shape, generator=generator)
    if any(type(layer).__name__ in ("Rescaling", "Normalization") for layer in readers):
        return (numbers * 64 + 128).clamp(0, 255)  # such layers are there for raw pixels
    return numbers


def consumers(model: Any, tensor: Any) -> list[Any]:
    """The layers that read an input, inside nested models too."""
    graph = getattr(model, "_functional", None) or model
    found: list[Any] = []
    for node in (node for nodes in graph._nodes_by_depth.values() for node in nodes if not node.is_input):
        for position, argument in enumerate(node.input_tensors):
            if argument is not tensor:
                continue
            inner = getattr(node.operation, "_functional", None) or node.operation
            nested = hasattr(inner, "_nodes_by_depth")
            found += consumers(inner, inner.inputs[position]) if nested else [node.operation]
    return found
