"""What graph nodes and layers say about themselves, as JSON: types, sizes, constructor arguments."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fewbit.model.integer_forms import shape


def dtype_name(node: Node) -> str:
    """A node's dtype as ``float32``, ``int64`` ..."""
    return str(node.meta.get("dtype", torch.float32)).removeprefix("torch.")


def free_shape(node: Node) -> tuple[int | None, ...]:
    """Sizes of a node's output, None where a size is free (the batch, a sequence)."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else shape(node)
    return tuple(_number(s) for s in sizes)


def _number(size: Any) -> int | None:
    """A size as a number, if it has one: what export found to be fixed may still be a symbol with that value."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def value_type(node: Node) -> Any:
    """What a node's value is, as JSON: ``[dtype, sizes]`` (None: free), "int" for a size, or a list of these."""
    value = node.meta.get("val")
    return _type_of(value) if value is not None else [dtype_name(node), list(free_shape(node))]


def _type_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), [_number(s) for s in value.shape]]
    return [_type_of(v) for v in value] if isinstance(value, list | tuple) else "int"


def config(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a standard layer, as JSON: what its type declares and the module still holds."""
    names = [
        p for p in inspect.signature(type(module).__init__).parameters if p not in ("self", "device", "dtype")
    ]
    if isinstance(module, nn.RNNBase):
        names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        names += (
            ["proj_size"]
            if isinstance(module, nn.LSTM)
            else ["nonlinearity"]
            if isinstance(module, nn.RNN)
            else []
        )
    found: dict[str, Any] = {}
    for name in names:
        if not hasattr(module, name):
            continue
        value = getattr(module, name)
        if isinstance(value, Tensor) or (value is None and name == "bias"):
            value = value is not None
        found[name] = list(value) if isinstance(value, tuple) else value
    return {k: v for k, v in found.items() if v is None or isinstance(v, bool | int | float | str | list)}
