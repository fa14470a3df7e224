"""Walks a Keras model, Sequential or Functional, nested or not, and builds its PyTorch twin layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fewbit.errors import ModelError
from fewbit.model.keras_layers import LAYERS
from fewbit.model.keras_layout import Assembly, Value, clean

Rule = Callable[..., Any]


def build(model: Any, example: tuple[Tensor, ...], notes: list[str]) -> fx.GraphModule:
    """The twin of ``model`` as a module: the same inputs and outputs, the user's layout, Keras's names."""
    import keras

    b = Assembly(notes=notes, backend=keras.config.backend())
    b.free_sizes = any(size is None for t in model.inputs for size in t.shape[1:])
    b.reserved = {clean(layer.name) for layer in model.layers}
    inputs = [b.input(t.name, value) for t, value in zip(model.inputs, example, strict=True)]
    outputs = run(b, model, "", inputs)
    nodes = [
        b.as_keras(value, f"output_{i}" if len(outputs) > 1 else "output").node
        for i, value in enumerate(outputs)
    ]
    b.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
    b.graph.lint()
    return fx.GraphModule(b.root, b.graph, class_name=clean(model.name)).eval()


def run(b: Assembly, model: Any, prefix: str, inputs: list[Value]) -> list[Value]:
    """The outputs of a model, the outermost or one inside it, on these inputs, flat and in Keras's order."""
    graph = getattr(model, "_functional", None) or model
    values = {id(t): value for t, value in zip(graph.inputs, inputs, strict=True)}
    for nodes in (graph._nodes_by_depth[depth] for depth in sorted(graph._nodes_by_depth, reverse=True)):
        for node in nodes:
            if node.is_input or any(id(t) not in values for t in node.input_tensors):
                continue
            args, kwargs = _filled((node.arguments.args, node.arguments.kwargs), values)
            results = call(b, node.operation, f"{prefix}{clean(node.operation.name)}", args, kwargs)
            values |= {id(t): value for t, value in zip(node.output_tensors, results, strict=False)}
    return [values[id(t)] for t in graph.outputs]


def call(b: Assembly, layer: Any, path: str, args: Any, kwargs: Any) -> list[Value]:
    """What one layer gives for these arguments, among which are values."""
    if hasattr(layer, "_nodes_by_depth") or hasattr(layer, "_functional"):
        return run(b, layer, f"{path}.", _flat(args[0]))
    rule = rule_of(layer)
    if rule is None:
        raise ModelError(
            f"{path} is a {type(layer).__name__}, which has no counterpart: replace it, or leave it out"
        )
    kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "training"}
    result = rule(b, layer, path, *args, **kwargs)
    return list(result) if isinstance(result, list | tuple) else [result]


def rule_of(layer: Any) -> Rule | None:
    """The rule of Keras's own class that a layer is, or is derived from without another ``call``."""
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("keras.src.layers."):
            return (
                LAYERS.get(cls.__name__)
                if type(layer).call is vars(cls).get("call", type(layer).call)
                else None
            )
    return None


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
    inputs = (
        tree.pack_sequence_as(model._inputs_struct, arrays) if hasattr(model, "_inputs_struct") else arrays[0]
    )
    with torch.no_grad():
        results = tree.flatten(model(inputs, training=False))
    return [torch.from_numpy(ops.convert_to_numpy(result).copy()) for result in results]
