"""Arguments of graph nodes as JSON, and back: numbers, names from closed lists, and references to earlier nodes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64)}  # fmt: skip
_MEMORY = {str(m): m for m in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}
_TABLES: dict[str, dict[str, Any]] = {"dtype": DTYPES, "memory_format": _MEMORY}


def encode(value: Any, index: Mapping[Node, int]) -> Any:
    """An argument tree of a graph node as JSON; nodes become their position. TypeError for anything else."""
    if isinstance(value, Node):
        return {"node": index[value]}
    if isinstance(value, tuple):
        return {"tuple": [encode(v, index) for v in value]}
    if isinstance(value, list):
        return [encode(v, index) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k, index), encode(v, index)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v, index) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value)}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, torch.layout):
        return {"layout": str(value)}
    if isinstance(value, float) and not abs(value) < float("inf"):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a saved graph")


def decode(value: Any, nodes: list[Node]) -> Any:
    """The inverse of ``encode`` for the nodes before this one; KeyError, ValueError, ... where it is damaged."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()  # fmt: skip
    if kind == "node":
        if type(content) is not int or not 0 <= content < len(nodes):
            raise ValueError(f"node {content!r:.40} does not come before the one that reads it")
        return nodes[content]
    if kind in ("tuple", "slice"):
        parts = [decode(v, nodes) for v in content]
        return tuple(parts) if kind == "tuple" else slice(*parts)
    if kind == "dict":
        return {decode(k, nodes): decode(v, nodes) for k, v in content}
    if (kind == "layout" and content != "torch.strided") or (kind == "device" and content != "cpu"):
        raise ValueError(f"{kind} {content!r:.40}")
    if kind in ("layout", "device"):
        return torch.strided if kind == "layout" else torch.device("cpu")
    if kind == "float":
        return float(content)
    return _known(_TABLES[kind].get(content), content)


def _known(value: Any, name: object) -> Any:
    if value is None:
        raise ValueError(f"unknown value {name!r:.40}")
    return value
