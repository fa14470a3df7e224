"""Walks a Keras model, Sequential or Functional, nested or not, and builds its PyTorch twin layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fewbit.errors import ModelError
from fewbit.model.keras_config import options, reason, refuse
from fewbit.model.keras_functions import name_of
from fewbit.model.keras_layers import LAYERS
from fewbit.model.keras_layout import Assembly, Value, clean
from fewbit.model.keras_operators import MASKS, OPERATORS
from fewbit.model.keras_weights import tensor

Rule = Callable[..., Any]
MASKED = (
    "leaves out the steps that a mask marks, expected none: use mask_zero=False and no Masking layer, and give "
    "sequences of one length"
)


def build(model: Any, example: tuple[Tensor, ...], notes: list[str]) -> fx.GraphModule:
    """The twin of ``model`` as a module: the same inputs and outputs, the user's layout, Keras's names."""
    import keras

    b = Assembly(notes=notes, backend=keras.config.backend())
    b.call = partial(call, b)
    b.free_sizes = any(size is None for t in model.inputs for size in t.shape[1:])
    b.reserved = {clean(layer.name) for layer in model.layers}
    inputs = [b.input(t.name, value) for t, value in zip(model.inputs, example, strict=True)]
    outputs = run(b, model, "", inputs)
    names = [f"output_{i}" if len(outputs) > 1 else "output" for i in range(len(outputs))]
    nodes = [b.as_keras(value, name).node for name, value in zip(names, outputs, strict=True)]
    b.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
    b.graph.lint()
    return fx.GraphModule(b.root, b.graph, class_name=clean(model.name)).eval()


def run(b: Assembly, model: Any, prefix: str, inputs: list[Value]) -> list[Value]:
    """The outputs of a model, the outermost or one inside it, on these inputs, flat and in Keras's order."""
    graph = graph_of(model)
    values = {id(t): value for t, value in zip(graph.inputs, inputs, strict=True)}
    for node in needed(graph):
        args, kwargs = _filled((node.arguments.args, node.arguments.kwargs), values)
        results = call(b, node.operation, b.path(node.operation, prefix), args, kwargs)
        values |= {id(t): value for t, value in zip(node.output_tensors, results, strict=False)}
    return [values[id(t)] for t in graph.outputs]


def graph_of(model: Any) -> Any:
    """The Functional model that a Sequential one is inside, or the model itself."""
    return getattr(model, "_functional", None) or model


def needed(graph: Any) -> list[Any]:
    """The calls that the outputs depend on, each behind what it reads; those that only feed masks are left out."""
    wanted = {id(t) for t in graph.outputs}
    found = []
    for depth in sorted(graph._nodes_by_depth):  # outputs first
        for node in graph._nodes_by_depth[depth]:
            if node.is_input or not any(id(t) in wanted for t in node.output_tensors):
                continue
            found.append(node)
            masks = (
                set()
                if uses_mask(node.operation)
                else {id(v) for v in masks_of(node.arguments.kwargs).values()}
            )
            wanted |= {id(t) for t in node.input_tensors if id(t) not in masks}
    return found[::-1]


def masks_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The masks among a call's arguments, those from the user and those that Keras carries along."""
    return {
        name: value for name, value in kwargs.items() if name.endswith("mask") and hasattr(value, "dtype")
    }


def uses_mask(layer: Any) -> bool:
    """Whether a mask that a layer is given changes what it computes at inference."""
    return type(layer).__name__ != "BatchNormalization"


def call(b: Assembly, layer: Any, path: str, args: Any, kwargs: Any) -> list[Value]:
    """What one layer gives for these arguments, among which are values."""
    if hasattr(graph_of(layer), "_nodes_by_depth"):
        return run(b, layer, f"{path}.", _flat(args[0]))
    rule = rule_of(type(layer))
    if rule is None:
        raise ModelError(
            f"{path} is a {type(layer).__name__}, which has no counterpart: replace it, or leave it out"
        )
    given = {
        name: value
        for name, value in kwargs.items()
        if value is not None and name not in ("training", "mask")
    }
    result = rule(b, layer, path, *args, **given)
    return list(result) if isinstance(result, list | tuple) else [result]


def rule_of(cls: type) -> Rule | None:
    """What builds a layer or an operator of this class."""
    name = read_as(cls) or ""
    return OPERATORS.get(name) if cls.__module__.startswith("keras.src.ops.") else LAYERS.get(name)


def read_as(cls: type) -> str | None:
    """The name of the Keras class that a class is, or is derived from without another ``call``; None if there is none
    that can be read.
    """
    for base in cls.__mro__:
        known = _known(base)
        if known is not None and getattr(cls, "call", None) is getattr(base, "call", None):
            return base.__name__ if base.__name__ in known else None
    return None


def _known(base: type) -> Container[str] | None:
    """The names that can be read of the part of Keras that a class is in."""
    if base.__module__.startswith("keras.src.ops."):
        return OPERATORS.keys() | MASKS
    if base.__module__.startswith("keras.src.models."):
        return ("Functional", "Sequential")
    layers = base.__module__.startswith(("keras.src.layers.", "keras.src.applications."))
    return {"InputLayer", *LAYERS} if layers else None


def check(model: Any, where: str) -> None:
    """ModelError that lists every layer of a live model that cannot be read."""
    if read_as(type(model)) not in ("Functional", "Sequential"):
        raise ModelError(
            f"{where} is a {type(model).__name__} with a call of its own: expected a Sequential or Functional model, "
            "whose layers can be seen; build it with keras.Model(inputs, outputs)"
        )
    if not hasattr(graph_of(model), "_nodes_by_depth"):
        raise ModelError(
            f"{where} has no input shape yet: put keras.Input(shape) in front of its layers, or build it"
        )
    if found := list(_inside(model)):
        refuse(where, found)


def _inside(model: Any) -> Iterator[str]:
    """What is wrong with the calls that the outputs depend on, those of nested models too."""
    nodes = needed(graph_of(model))
    for node in nodes:
        if masks_of(node.arguments.kwargs) and uses_mask(node.operation):
            yield f"{node.operation.name!r} ({type(node.operation).__name__}: {MASKED})"
    for operation in dict.fromkeys(node.operation for node in nodes):
        if hasattr(graph_of(operation), "_nodes_by_depth"):
            yield from _inside(operation)
            continue
        yield from _problems(operation)
        if type(operation).__name__ == "TimeDistributed":
            yield from _problems(operation.layer)


def _problems(layer: Any) -> Iterator[str]:
    kind, name = read_as(type(layer)), type(layer).__name__
    if kind is None:
        yield f"{layer.name!r} ({reason(name)})"
        return
    settings = layer.get_config() if kind in LAYERS and type(layer).__name__ == kind else {}
    for why in options(kind, settings):
        yield f"{layer.name!r} ({name}: {why})"
    function = getattr(layer, "activation", None)
    if callable(function) and not hasattr(function, "get_config") and not name_of(function):
        yield f"{layer.name!r} ({name}: activation {getattr(function, '__name__', '?')!r} is none of Keras's own)"
    if (dtype := getattr(layer, "compute_dtype", "float32")) != "float32":
        yield f"{layer.name!r} ({name}: computes in {dtype}, expected float32: save the model and read the file)"


def _filled(value: Any, values: dict[int, Value]) -> Any:
    """Arguments with our values in the place of Keras's symbolic tensors."""
    if isinstance(value, list | tuple):
        return type(value)(_filled(v, values) for v in value)
    if isinstance(value, dict):
        return {key: _filled(v, values) for key, v in value.items()}
    return values.get(id(value), value)


def _flat(value: Any) -> list[Value]:
    if isinstance(value, Value):
        return [value]
    items = [value[key] for key in sorted(value)] if isinstance(value, dict) else value
    return [leaf for item in items for leaf in _flat(item)]


def outputs_of(model: Any, example: tuple[Tensor, ...]) -> list[Tensor]:
    """What Keras itself computes for the example at inference, flat."""
    from keras import ops, tree

    arrays = [ops.convert_to_tensor(t.numpy()) for t in example]
    struct = getattr(model, "_inputs_struct", None)
    inputs = arrays[0] if struct is None else tree.pack_sequence_as(struct, arrays)
    with torch.no_grad():
        return [tensor(result) for result in tree.flatten(model(inputs, training=False))]
