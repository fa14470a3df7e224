"""Keras's recurrent layers as PyTorch's: the same gates in another order, one bias as two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.model.keras_functions import name_of
from fewbit.model.keras_layout import Assembly, Value, clean, identity
from fewbit.model.keras_weights import parameters, tensor

CELLS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "SimpleRNN": nn.RNN}
States = Sequence[Value]


def recurrent(b: Assembly, layer: Any, path: str, x: Value, initial_state: Any = None) -> Any:
    """LSTM, GRU or SimpleRNN over [n, time, features]; the states, where asked for, behind the output."""
    x = b.as_keras(x, path)
    node = x.node
    if layer.go_backwards:
        node = b.function(f"{path}.flip", torch.flip, node, [1])
    given = _states(b, path, [initial_state] if isinstance(initial_state, Value) else initial_state)
    call = b.module(path, lambda: _cell(layer, [layer]), node, *given)
    sequence, states = b.item(call, 0), _final(b, path, layer, b.item(call, 1))
    output = sequence if layer.return_sequences else b.function(f"{path}.last", torch.select, sequence, 1, -1)
    results = [Value(output, identity(3 if layer.return_sequences else 2))]
    if layer.return_state:
        results += [
            Value(b.function(f"{path}.state", torch.select, state, 0, 0), identity(2)) for state in states
        ]
    return results


def bidirectional(b: Assembly, layer: Any, path: str, x: Value, initial_state: Any = None) -> Any:
    """One PyTorch layer of two directions; how their outputs are merged stands behind it."""
    forward, backward = layer.forward_layer, layer.backward_layer
    if type(forward) is not type(backward) or forward.units != backward.units or forward.go_backwards:
        raise ModelError(
            f"{path} runs {forward.name!r} and {backward.name!r}, which differ: expected the same class and units, "
            "the first one forwards; use two recurrent layers and a Concatenate instead"
        )
    if layer.return_state or initial_state is not None:
        raise ModelError(
            f"{path} passes states in or out: expected a Bidirectional layer without; use two recurrent layers instead"
        )
    x = b.as_keras(x, path)
    call = b.module(path, lambda: _cell(forward, [forward, backward]), x.node)
    if layer.return_sequences:
        return _merged(b, layer, path, b.item(call, 0), 3)
    last = _final(b, path, forward, b.item(call, 1))[0]  # [2, n, units]: where each direction ends
    ends = [b.function(f"{path}.state", torch.select, last, 0, i) for i in range(2)]
    if layer.merge_mode == "concat":
        return Value(b.function(f"{path}.cat", _joined, *ends), identity(2))
    return _combined(b, layer, path, ends, 2)


def _merged(b: Assembly, layer: Any, path: str, sequence: fx.Node, rank: int) -> Any:
    if layer.merge_mode == "concat":
        return Value(sequence, identity(rank))
    units = layer.forward_layer.units
    parts = [b.function(f"{path}.half", torch.narrow, sequence, 2, i * units, units) for i in range(2)]
    return _combined(b, layer, path, parts, rank)


def _combined(b: Assembly, layer: Any, path: str, parts: list[fx.Node], rank: int) -> Any:
    if layer.merge_mode is None:
        return [Value(part, identity(rank)) for part in parts]
    function = torch.mul if layer.merge_mode == "mul" else torch.add
    node = b.function(f"{path}.{layer.merge_mode}", function, *parts)
    if layer.merge_mode == "ave":
        node = b.function(f"{path}.half", torch.mul, node, 0.5)
    return Value(node, identity(rank))


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], -1)


def _states(b: Assembly, path: str, initial: States | None) -> list[Any]:
    """Initial states as PyTorch takes them: [1, n, units], a pair of them for an LSTM."""
    if initial is None:
        return []
    nodes = [b.function(f"{path}.unsqueeze", torch.unsqueeze, b.as_keras(s, path).node, 0) for s in initial]
    return [tuple(nodes)] if len(nodes) > 1 else nodes


def _final(b: Assembly, path: str, layer: Any, states: fx.Node) -> list[fx.Node]:
    lstm = isinstance(states.meta["val"], tuple)
    return [b.item(states, i) for i in range(2)] if lstm else [states]


def _cell(layer: Any, directions: list[Any]) -> nn.Module:
    """The PyTorch layer with the weights of one Keras layer, or of two for both directions."""
    kind = kind_of(layer)
    settings = {"nonlinearity": name_of(layer.cell.activation)} if kind == "SimpleRNN" else {}
    made = CELLS[kind](
        layer.cell.kernel.shape[0], layer.units, bias=layer.use_bias, batch_first=True,
        bidirectional=len(directions) == 2, **settings,
    )  # fmt: skip
    for suffix, direction in zip(("", "_reverse"), directions, strict=False):
        named = {f"{name}_l0{suffix}": value for name, value in _weights(kind, direction.cell).items()}
        parameters(made, layer, **named)
    return made


def _weights(kind: str, cell: Any) -> dict[str, Tensor]:
    units = cell.recurrent_kernel.shape[0]
    found = {"weight_ih": tensor(cell.kernel).t(), "weight_hh": tensor(cell.recurrent_kernel).t()}
    if cell.use_bias:
        bias = tensor(cell.bias)
        found |= {"bias_ih": bias, "bias_hh": torch.zeros_like(bias)} if bias.dim() == 1 else {}
        found |= {"bias_ih": bias[0], "bias_hh": bias[1]} if bias.dim() == 2 else {}
    if kind != "GRU":
        return found
    # Keras keeps a GRU's gates as update, reset, new; PyTorch as reset, update, new
    return {name: torch.cat([w[units : 2 * units], w[:units], w[2 * units :]]) for name, w in found.items()}


def kind_of(layer: Any) -> str:
    """The Keras class that a recurrent layer is or is derived from."""
    return next(cls.__name__ for cls in type(layer).__mro__ if cls.__name__ in CELLS)


def time_distributed(b: Assembly, layer: Any, path: str, x: Value) -> Any:
    """A layer over every step: as it is where it works along the last axis, else with the steps as samples."""
    inner = layer.layer
    if type(inner).__name__ in ("Dense", "Activation", "Dropout", "ReLU", "LeakyReLU", "ELU"):
        return b.call(inner, path, [x], {})
    x = b.as_keras(x, path)
    sizes = x.shape
    if b.free_sizes:
        raise ModelError(
            f"{path} runs a {type(inner).__name__} over sequences of any length: expected an input of fixed sizes; "
            "build the model with them"
        )
    samples = Value(b.function(f"{path}.flatten", torch.flatten, x.node, 0, 1), identity(x.rank - 1))
    [result] = b.call(inner, f"{path}.{clean(inner.name)}", [samples], {})
    result = b.as_keras(result, path)
    node = b.function(f"{path}.reshape", torch.reshape, result.node, (-1, sizes[1], *result.shape[1:]))
    return Value(node, identity(result.rank + 1))
