"""Builds a module from ONNX operators: layers under their names, functions between them, constants computed once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fewbit.errors import ModelError
from fewbit.model import onnx_sizes
from fewbit.model.onnx_names import identifier

LARGEST = 2**27  # numbers in one tensor of a run on the example: half a gigabyte
_GIVEN = object()


@dataclass(frozen=True, eq=False)
class Constant:
    """Numbers that do not depend on the inputs, and the stored tensor that they come from."""

    array: np.ndarray
    name: str


@dataclass(frozen=True, eq=False)
class Value:
    """What a node of the new graph computes. `example` has its sizes on the example but no numbers; it is a vector of
    numbers where the value is a shape or calculated from one.
    """

    node: fx.Node
    example: Any

    @property
    def is_size(self) -> bool:
        return isinstance(self.example, np.ndarray)


Operand = Constant | Value


@dataclass(frozen=True)
class Sizes:
    """A constant that a function takes as numbers, not as a tensor."""

    values: np.ndarray


class Function(nn.Module):
    """A function as a layer, so that what it computes bears the ONNX node's name."""

    def __init__(self, function: Callable[..., Any], template: list[Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.template, self.settings = function, template, settings

    def forward(self, *given: Any) -> Any:
        values = iter(given)
        arguments = [next(values) if a is _GIVEN else a for a in self.template]
        return self.function(*arguments, **self.settings)


class Network(fx.GraphModule):
    """The module that is read. It is nobody else's, so a copy is not needed: large weights stay mapped files."""

    def __deepcopy__(self, memo: Any) -> Network:
        return self


class Builder:
    """A graph under construction and the tensors it holds."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: dict[str, Operand] = {}
        self.zeros: set[fx.Node] = set()  # computed tensors that are known to be all zero
        self.free_sizes = False  # whether inputs have free sizes besides the batch
        self._layers: dict[Any, str] = {}
        self._parameters: dict[Any, nn.Parameter] = {}
        self._held: dict[Any, tuple[np.ndarray, Constant]] = {}
        self._attributes: dict[Any, tuple[Constant, fx.Node]] = {}
        self._names: set[str] = set()

    def placeholder(self, name: str, example: Tensor) -> None:
        """An input of the model."""
        taken = {n.target for n in self.graph.nodes}
        made = candidate = identifier(name)
        while candidate in taken:
            candidate = f"{made}_{len(taken)}"
        node = self.graph.placeholder(candidate)
        self.values[name] = Value(node, self.mode.from_tensor(example))

    def network(self, outputs: list[str]) -> Network:
        """The finished module; one output alone is returned as it is, several as a tuple."""
        results = [self.values[name] for name in outputs]
        sized = [isinstance(r, Value) and r.is_size for r in results]
        results = [
            self.call("sizes", onnx_sizes.tensor_of, [r], 0) if s else r
            for r, s in zip(results, sized, strict=True)
        ]
        nodes = [self.node_of(r) for r in results]
        self.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
        made = Network(self.root, self.graph, "Network")
        made.graph.eliminate_dead_code()
        made.recompile()
        return made.eval()

    # ---- steps ----

    def call(self, path: str, function: Callable[..., Any], args: Any, count: int, **settings: Any) -> Any:
        """The function of the arguments: constants where they all are, else a step of the network.

        `args` are operands, `Sizes`, numbers or None; `count` is the number of results, 0 for one alone.
        """
        template = [_GIVEN if isinstance(a, Operand) else a for a in args]
        template = [a.values if isinstance(a, Sizes) else a for a in template]
        module = Function(function, template, settings)
        operands = [a for a in args if isinstance(a, Operand)]
        if all(isinstance(o, Constant) for o in operands):
            return self._folded(module, operands)
        name = self.attach(path, module)
        return self.step(name, module, operands, count)

    def step(self, name: str, module: nn.Module, operands: Any, count: int = 0) -> Any:
        """A call of an attached module. An operand may be a tuple of operands."""
        nodes = [tuple(map(self.node_of, o)) if isinstance(o, tuple) else self.node_of(o) for o in operands]
        node = self.graph.call_module(name, tuple(nodes))
        examples = self._tried(module, [self._example(o) for o in operands])
        if not count:
            return Value(node, examples)
        return [
            Value(self.graph.call_function(operator.getitem, (node, i)), e) for i, e in enumerate(examples)
        ]

    def item(self, value: Value, index: int) -> Value:
        """One part of a result that is a tuple."""
        return Value(self.graph.call_function(operator.getitem, (value.node, index)), value.example[index])

    def _example(self, operand: Any) -> Any:
        if isinstance(operand, tuple):
            return tuple(map(self._example, operand))
        return operand.example if isinstance(operand, Value) else tensor_of(operand.array)

    def _tried(self, module: nn.Module, examples: list[Any]) -> Any:
        """The result's sizes, without calculating it. ModelError where a tensor would be too large."""
        with torch.no_grad(), self.mode:
            result = module(*examples)
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and math.prod(part.shape) > LARGEST:
                raise ModelError(
                    f"computes a tensor of shape {list(part.shape)} on the example: more than fewbit reads a model "
                    "with; give a smaller example"
                )
        return result

    def _folded(self, module: nn.Module, operands: Any) -> Any:
        examples = [tensor_of(o.array) for o in operands]
        self._tried(module, examples)
        with torch.no_grad():
            result = module(*examples)
        name = next((o.name for o in operands if o.array.ndim), "")
        if isinstance(result, list | tuple):
            return [Constant(_numpy(r), name) for r in result]
        return Constant(_numpy(result), name)

    # ---- tensors and layers ----

    def node_of(self, operand: Operand) -> fx.Node:
        """The graph's node for an operand; a constant becomes a parameter or buffer."""
        if isinstance(operand, Value):
            return operand.node
        key = _place_of(operand.array)
        if key not in self._attributes:
            name = identifier(operand.name) if operand.name else "constant"
            value = tensor_of(operand.array)
            trained = value.is_floating_point() and value.numel() > 1 and bool(value.isfinite().all())
            path = self.attach(name, nn.Parameter(value) if trained else value)
            self._attributes[key] = (operand, self.graph.get_attr(path))
        return self._attributes[key][1]

    def layer(
        self,
        cls: type[nn.Module],
        names: tuple[str, str],
        weights: dict[str, Constant | None],
        **settings: Any,
    ) -> tuple[str, nn.Module]:
        """A layer that holds these tensors, under the first of the names that is free; the same tensors and settings
        are the same layer.

        Not so for norms: exporters store equal tensors once, and untrained norms are all equal.
        """
        norm = "Norm" in cls.__name__
        present = {k: c for k, c in weights.items() if c is not None}
        held = tuple((k, _place_of(c.array)) for k, c in present.items())
        key = (cls, held, repr(sorted(settings.items())))
        if present and not norm and key in self._layers:
            return self._layers[key], self.root.get_submodule(self._layers[key])
        module = cls(**settings, device="meta") if present else cls(**settings)
        for attribute, constant in present.items():
            tensor = tensor_of(constant.array.copy() if norm else constant.array)
            if attribute in module._buffers:
                module._buffers[attribute] = tensor
            else:
                fresh = nn.Parameter(tensor, requires_grad=True)
                known = fresh if norm else self._parameters.setdefault(_place_of(constant.array), fresh)
                setattr(module, attribute, known)
        for attribute, buffer in module.named_buffers():
            if buffer.is_meta:
                module._buffers[attribute] = torch.zeros_like(buffer, device="cpu")
        module.eval()
        path = self.attach(names[1] if names[0] in self._names and names[1] else names[0], module)
        self._layers[key] = path
        return path, module

    def held(self, array: np.ndarray, name: str) -> Constant:
        """A constant for a view of another one's numbers; the same view is the same constant."""
        key = _place_of(array)
        if key not in self._held:
            self._held[key] = (array, Constant(np.ascontiguousarray(array), name))
        return self._held[key][1]

    def attach(self, name: str, value: Any) -> str:
        """Put a module or tensor into the tree under this name or, where it is taken, one like it."""
        candidate, count = name, 0
        while candidate in self._names or not self._place(candidate, value):
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def _place(self, name: str, value: Any) -> bool:
        *path, leaf = name.split(".")
        owner = self.root
        for part in path:
            if part not in owner._modules:
                if hasattr(owner, part):
                    return False
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        scope = owner._modules.get(leaf)
        if hasattr(owner, leaf) and not (type(scope) is nn.Module and isinstance(value, nn.Module)):
            return False
        if isinstance(value, nn.Module):
            for child, module in scope.named_children() if scope is not None else ():
                value.add_module(child, module)
            owner.add_module(leaf, value)
        elif isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)
        return True


def _place_of(array: np.ndarray) -> Any:
    """What two arrays share when they are the same numbers in the same order."""
    return array.__array_interface__["data"][0], array.shape, array.strides, str(array.dtype)


def tensor_of(array: np.ndarray) -> Tensor:
    """A tensor on the array's own memory; numbers of other precision in float32."""
    if array.dtype.kind == "f" or str(array.dtype) in ("bfloat16",) or array.dtype.kind == "V":
        array = array.astype(np.float32, copy=False)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    return torch.from_numpy(array)


def _numpy(value: Any) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, Tensor) else np.asarray(onnx_sizes.listed(value))
