"""One ONNX node as the tables of operators see it: inputs as constants, tensors or sizes, attributes, results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from fewbit.errors import ModelError
from fewbit.model import onnx_sizes
from fewbit.model.onnx_build import Builder, Constant, Operand, Sizes, Value
from fewbit.model.onnx_graph import Graph, Node
from fewbit.model.onnx_names import layer_name, scope


class Call:
    """One ONNX node as a rule of the tables sees it."""

    def __init__(self, builder: Builder, node: Node, graph: Graph, consumers: dict[str, list[Node]]) -> None:
        self.builder, self.node, self.graph, self.consumers = builder, node, graph, consumers
        self.version = graph.opset
        self.operands = [builder.values[name] if name else None for name in node.inputs]
        self.absorbed: dict[Node, Operand | None] = {}  # later nodes, and their results if not this one's

    # ---- arguments ----

    def has(self, index: int) -> bool:
        return index < len(self.operands) and self.operands[index] is not None

    def raw(self, index: int) -> Operand:
        """An input as it is: a constant, a tensor or a vector of sizes."""
        operand = self.operands[index] if index < len(self.operands) else None
        if operand is None:
            raise self.error(f"its input {index} is missing")
        return operand

    def __getitem__(self, index: int) -> Operand:
        """An input as a tensor."""
        operand = self.raw(index)
        if isinstance(operand, Value) and operand.is_size:
            return self.apply(onnx_sizes.tensor_of, operand, suffix="sizes")
        return operand

    def known(self, index: int) -> np.ndarray | None:
        """The numbers of an input that is constant; None where it is computed or missing."""
        operand = self.raw(index) if self.has(index) else None
        return operand.array if isinstance(operand, Constant) else None

    def fixed(self, index: int, what: str) -> np.ndarray:
        """The numbers of an input that must be constant."""
        array = self.known(index)
        if array is None:
            raise self.error(f"its {what} are computed at run time: expected constants")
        return array

    def sizes(self, index: int) -> Any:
        """An input that says sizes or positions: numbers, or calculated from shapes."""
        operand = self.raw(index)
        if isinstance(operand, Constant):
            return Sizes(onnx_sizes.scalar(operand.array.item()) if operand.array.ndim == 0
                         else onnx_sizes.sizes(operand.array.reshape(-1).tolist()))  # fmt: skip
        if not operand.is_size:
            raise self.error(
                f"its input {self.node.inputs[index]!r} is a size calculated from the values of a tensor: "
                "expected one that depends on shapes only"
            )
        return operand

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attrs.get(name, default)

    def shape(self, index: int) -> tuple[int, ...]:
        """The sizes of an input on the example."""
        operand = self.raw(index)
        return tuple(operand.array.shape if isinstance(operand, Constant) else operand.example.shape)

    def rank(self, index: int) -> int:
        return len(self.shape(index))

    def keeps_batch(self, index: int) -> bool:
        """Whether an input's first size is the number that the file fixes the batch at."""
        batches = {i.shape[0] for i in self.graph.inputs if i.shape}
        return self.shape(index)[:1] == tuple(batches)

    def axis(self, value: int, rank: int) -> int:
        """An axis counted from the front."""
        if not -rank <= value < max(rank, 1):
            raise self.error(f"axis {value} of a tensor of {rank} dimensions")
        return value % max(rank, 1)

    def axes(self, index: int) -> list[int] | None:
        """Axes from the attribute of old opsets or the input of new ones; None where there are neither."""
        found = self.attr("axes")
        if found is None and self.has(index):
            found = self.fixed(index, "axes").reshape(-1).tolist()
        return None if found is None else [int(a) for a in found]

    def uses(self, name: str) -> int:
        """How many nodes and outputs of the model read a value."""
        return self.graph.users.get(name, 0)

    def only_consumer(self, name: str) -> Node | None:
        """The one node that reads a value; None if several do or the model returns it."""
        found = self.consumers.get(name, [])
        return found[0] if len(found) == 1 and self.uses(name) == 1 else None

    def example_is_float(self, index: int) -> bool:
        operand = self[index]
        return (
            operand.array.dtype.kind == "f"
            if isinstance(operand, Constant)
            else operand.example.is_floating_point()
        )

    def is_size(self, *indices: int) -> bool:
        """Whether this is arithmetic of sizes: some inputs are such, the others are constants."""
        chosen = [self.raw(i) for i in indices]
        some = any(isinstance(o, Value) and o.is_size for o in chosen)
        return some and all(isinstance(o, Constant) or o.is_size for o in chosen)

    # ---- results ----

    def apply(self, function: Callable[..., Any], *args: Any, suffix: str = "", **settings: Any) -> Any:
        return self.builder.call(self._path(suffix), function, args, 0, **settings)

    def apply_many(self, function: Callable[..., Any], count: int, *args: Any, **settings: Any) -> list[Any]:
        made: list[Any] = self.builder.call(self._path(""), function, args, count, **settings)
        return made

    def layer(
        self, cls: type[nn.Module], inputs: list[Any], weights: dict[str, Constant | None], count: int = 0,
        **settings: Any,
    ) -> Any:  # fmt: skip
        """The result of a layer with these weights, under the name that they or the node give it."""
        named = {k: c.name for k, c in weights.items() if c is not None}
        first = next((n for k, n in named.items() if k != "bias"), "")
        names = (
            layer_name(self.node.name, self.node.op, first, named.get("bias", "")),
            scope(self.node.name, self.node.op, drop=True),
        )
        path, module = self.builder.layer(cls, names, weights, **settings)
        return self.builder.step(path, module, inputs, count)

    def _path(self, suffix: str) -> str:
        path = scope(self.node.name, self.node.op) or self.node.op.lower()
        return f"{path}.{suffix}" if suffix else path

    def error(self, reason: str) -> ModelError:
        return ModelError(
            f"{self.node.name!r:.120} ({self.node.op}) cannot be read: {reason}; export the model without it, or "
            "cut it off"
        )
