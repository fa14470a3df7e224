"""What nodes know about their values (dtype, fixed and free sizes), as JSON and back as tensors without data."""

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

_LARGEST = 2**40
_HINT = 7  # what a free size is while shapes are worked out; 0 and 1 would be taken as fixed


def encode_value(value: Any) -> Any:
    """A tensor as ``{"dtype", "sizes"}``, a symbolic size as ``{"size"}`` (fixed: a number), or a list of these."""
    if isinstance(value, Tensor):
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "sizes": [_size(s) for s in value.shape],
        }
    if isinstance(value, torch.SymInt | int):
        return {"size": _size(value)}
    if isinstance(value, list | tuple):
        return [encode_value(v) for v in value]
    return None


def _size(size: Any) -> int | str:
    """A number where the size has one: what export found to be fixed may still be a symbol with that value."""
    number = size if isinstance(size, int) else size.node.maybe_as_int()
    return str(size) if number is None else number


class Sizes:
    """Free sizes by name: one symbol a name, in one environment a graph."""

    def __init__(self) -> None:
        self._environment = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self._environment)
        self._symbols: dict[str, Any] = {}

    def number(self, size: Any) -> int:
        """A size, checked. Raises ``ValueError``."""
        if type(size) is not int or not 0 <= size <= _LARGEST:
            raise ValueError(f"{size!r:.40} is no size")
        return size

    def symbol(self, size: Any) -> Any:
        """A size or, for a name such as ``s0`` or ``2*s0``, its symbol."""
        if not isinstance(size, str):
            return self.number(size)
        if size not in self._symbols:
            source = ConstantSource(f"size_{len(self._symbols)}")
            symbol = self._environment.create_symbol(_HINT, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            self._symbols[size] = self._environment.create_symintnode(symbol, hint=_HINT, source=source)
        return self._symbols[size]


def decode_value(data: Any, sizes: Sizes, dtypes: dict[str, torch.dtype]) -> Any:
    """The inverse of ``encode_value``; the names of free sizes become symbols of ``sizes``."""
    if isinstance(data, list):
        return [decode_value(d, sizes, dtypes) for d in data]
    if data is None or "size" in data:
        return None if data is None else sizes.symbol(data["size"])
    with sizes.mode:
        return torch.empty([sizes.symbol(s) for s in data["sizes"]], dtype=dtypes[data["dtype"]])
