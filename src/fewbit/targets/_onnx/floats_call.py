"""One call of a torch operator as a writer of nodes sees it: arguments by name, tensors as ONNX values."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from fewbit.errors import TargetError
from fewbit.model.program import Op, aten, decode_args
from fewbit.targets._onnx.builder import Builder

NUMPY = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int16": TensorProto.INT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
END = 2**63 - 1


@dataclass(frozen=True)
class Value:
    """A tensor or a symbolic size: its ONNX name, and what torch knows of it.

    ``dtype`` is torch's name of the type; where codes are moved about, the type that they stand for.
    ``shape`` has None for free sizes and is None where even the rank is unknown. A symbolic size is an int64
    vector of one element.
    """

    name: str
    dtype: str = "float32"
    shape: tuple[int | None, ...] | None = None
    size: bool = False


class Call:
    """Arguments of one operator by the names of torch's own declaration, defaults included."""

    def __init__(self, builder: Builder, op: Op, inputs: list[Any]) -> None:
        self.builder, self.op, self.layer = builder, op, op.layer
        types = op.attrs.get("types") or [["float32", None]] * len(inputs)
        self.inputs = [_value(name, kind) for name, kind in zip(inputs, types, strict=True)]
        self.target = str(op.attrs["target"])
        positional = decode_args(op.attrs["args"], self.inputs)
        named = {k: decode_args(v, self.inputs) for k, v in op.attrs["kwargs"].items()}
        declared = aten(self.target)._schema.arguments
        defaults = {a.name: a.default_value for a in declared}
        self.arguments = defaults | dict(zip(defaults, positional, strict=False)) | named
        kind = op.attrs.get("type")
        self.dtype = kind[0] if isinstance(kind, list) and kind and isinstance(kind[0], str) else "float32"
        self.shape = kind[1] if isinstance(kind, list) and kind and isinstance(kind[0], str) else None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    # ---- what is known of the arguments ----

    def rank(self, value: Value) -> int:
        """The number of dimensions. Raises ``TargetError`` where the program does not say."""
        if value.shape is None:
            raise self.error("the rank of its input is unknown")
        return len(value.shape)

    def axis(self, dim: int, value: Value) -> int:
        """A dimension counted from the front."""
        return dim % max(self.rank(value), 1)

    def axes(self, dims: Any, value: Value) -> list[int]:
        """Dimensions counted from the front; all of them for None or none."""
        if dims is None or dims == []:
            return list(range(self.rank(value)))
        return [self.axis(d, value) for d in (dims if isinstance(dims, list) else [dims])]

    def known(self, value: Value, axes: Iterable[int]) -> list[int] | None:
        """The sizes along ``axes``, or None where one of them is free."""
        sizes = [value.shape[a] for a in axes] if value.shape is not None else [None]
        return None if None in sizes else [s for s in sizes if s is not None]

    def error(self, reason: str) -> TargetError:
        return TargetError(
            f"{self.layer}: {self.target} cannot be written as ONNX: {reason}; "
            "replace the operator, or cut it off the model"
        )

    # ---- nodes ----

    def node(self, op_type: str, inputs: list[Any], **attrs: Any) -> str:
        """A node; inputs are values, names or "" for one left out."""
        return self.builder.node(op_type, [name_of(i) for i in inputs], self.layer, **attrs)

    def nodes(self, op_type: str, inputs: list[Any], count: int, **attrs: Any) -> list[str]:
        """A node with several outputs."""
        outputs = [self.builder.unique(self.layer) for _ in range(count)]
        return self.builder.nodes_of(op_type, [name_of(i) for i in inputs], self.layer, outputs, **attrs)

    def constant(self, value: Any, dtype: str = "float32") -> str:
        """An initializer with these numbers."""
        return self.builder.constant(np.asarray(value, NUMPY[dtype]), f"{self.layer}.constant")

    def cast(self, value: Any, dtype: str) -> str:
        """A tensor, size or number as a tensor of this type."""
        if not isinstance(value, Value):
            return self.constant(value, dtype)
        return value.name if value.dtype == dtype else self.node("Cast", [value], to=TYPES[dtype])

    def vector(self, sizes: Iterable[Any]) -> str:
        """Numbers and symbolic sizes as one int64 vector."""
        parts = list(sizes)
        if all(isinstance(p, int) for p in parts):
            return self.builder.ints(parts)
        names = [p.name if isinstance(p, Value) else self.builder.ints([p]) for p in parts]
        return names[0] if len(names) == 1 else self.node("Concat", names, axis=0)

    def sizes(self, value: Value) -> list[Any]:
        """The sizes of a tensor: numbers where they are known, values where only the run will tell."""
        self.rank(value)
        return [self.size(value, i) if s is None else s for i, s in enumerate(value.shape or ())]

    def size(self, value: Value, axis: int) -> Any:
        """One size of a tensor, likewise."""
        if value.shape is not None and value.shape[axis] is not None:
            return value.shape[axis]
        axis = self.axis(axis, value)
        return Value(self.node("Shape", [value], start=axis, end=axis + 1), "int64", (1,), size=True)

    def sum(self, a: Any, b: Any) -> Any:
        """Sizes added: a number where both are, else a value."""
        return a + b if isinstance(a, int) and isinstance(b, int) else self._arithmetic("Add", a, b)

    def difference(self, a: Any, b: Any) -> Any:
        return a - b if isinstance(a, int) and isinstance(b, int) else self._arithmetic("Sub", a, b)

    def product(self, a: Any, b: Any) -> Any:
        return a * b if isinstance(a, int) and isinstance(b, int) else self._arithmetic("Mul", a, b)

    def quotient(self, a: Any, b: int) -> Any:
        """The floor of a size that is not negative, divided by a positive number."""
        return a // b if isinstance(a, int) else self._arithmetic("Div", a, b)

    def largest(self, a: Any, b: Any) -> Any:
        return max(a, b) if isinstance(a, int) and isinstance(b, int) else self._arithmetic("Max", a, b)

    def smallest(self, a: Any, b: Any) -> Any:
        return min(a, b) if isinstance(a, int) and isinstance(b, int) else self._arithmetic("Min", a, b)

    def _arithmetic(self, op_type: str, a: Any, b: Any) -> Value:
        return Value(self.node(op_type, [self.vector([a]), self.vector([b])]), "int64", (1,), size=True)

    def reshape(self, value: Any, sizes: list[Any]) -> str:
        """The same numbers in another shape; among the sizes at most one -1."""
        free = [i for i, s in enumerate(sizes) if isinstance(s, Value)]
        if len(free) == 1 and -1 not in sizes:
            sizes = [-1 if isinstance(s, Value) else s for s in sizes]
        return self.node("Reshape", [value, self.vector(sizes)], **({"allowzero": 1} if 0 in sizes else {}))

    def count(self, value: Value, axes: list[int], dtype: str = "float32") -> Any:
        """How many numbers lie along ``axes``: a number, or the name of a tensor of one element."""
        known = self.known(value, axes)
        if known is not None:
            return int(np.prod(known, dtype=np.int64))
        product = self.node("ReduceProd", [self.vector([self.size(value, a) for a in axes])], keepdims=0)
        return self.node("Cast", [product], to=TYPES[dtype])


Rule = Callable[[Call], Any]


def name_of(value: Any) -> str:
    return value.name if isinstance(value, Value) else str(value)


def _value(name: Any, kind: Any) -> Any:
    if isinstance(name, list | tuple):
        return [_value(n, k) for n, k in zip(name, kind, strict=True)]
    if kind == "int":
        return Value(name, "int64", (1,), size=True)
    dtype, shape = kind
    return Value(name, dtype, None if shape is None else tuple(shape))
