"""LSTM, GRU and plain recurrent layers: one ONNX node a layer for both directions, gates in ONNX's order."""

from typing import Any

import numpy as np

from fewbit.errors import TargetError
from fewbit.targets._onnx.floats_weights import Layer


def lstm(layer: Layer) -> list[Any]:
    """[output, [h, c]]; torch's gates i, f, g, o become ONNX's i, o, f, c."""
    if layer.config.get("proj_size"):
        raise TargetError(
            f"{layer.name}: ONNX has no LSTM with projections; use proj_size=0 and a linear layer behind it"
        )
    output, states = _stack(layer, "LSTM", [0, 3, 1, 2], 2)
    return [output, states]


def gru(layer: Layer) -> list[Any]:
    """[output, h]; torch's gates r, z, n become ONNX's z, r, h."""
    output, states = _stack(layer, "GRU", [1, 0, 2], 1)
    return [output, states[0]]


def rnn(layer: Layer) -> list[Any]:
    """[output, h]."""
    output, states = _stack(layer, "RNN", [0], 1)
    return [output, states[0]]


def _stack(layer: Layer, op_type: str, order: list[int], states: int) -> tuple[str, list[str]]:
    """All layers in a row: the sequence in torch's layout, and the final states [layers, N, H]."""
    a, b = layer.config, layer.builder
    batched = layer.rank == 3
    first = a["batch_first"] and batched
    x = layer.x if batched else layer.node("Unsqueeze", [layer.x, b.ints([1])])
    x = layer.node("Transpose", [x], perm=[1, 0, 2]) if first else x
    directions = 2 if a["bidirectional"] else 1
    initial = _initial(layer, states, batched)
    finals: list[list[str]] = [[] for _ in range(states)]
    for i in range(a["num_layers"]):
        inputs = [x, *_parameters(layer, i, order), ""]
        inputs += [_part(layer, s, i, directions) for s in initial]
        outputs = [b.unique(layer.name) for _ in range(1 + states)]
        attrs: dict[str, Any] = {"hidden_size": a["hidden_size"]}
        attrs |= {"direction": "bidirectional"} if directions == 2 else {}
        attrs |= {"linear_before_reset": 1} if op_type == "GRU" else {}
        if op_type == "RNN":
            attrs["activations"] = ["Relu" if a["nonlinearity"] == "relu" else "Tanh"] * directions
        b.nodes_of(op_type, inputs, layer.name, outputs, **attrs)
        for final, name in zip(finals, outputs[1:], strict=True):
            final.append(name)
        x = _joined(layer, outputs[0], directions)
    if not batched:
        x = layer.node("Squeeze", [x, b.ints([1])])
    elif first:
        x = layer.node("Transpose", [x], perm=[1, 0, 2])
    return x, [_final(layer, names, batched) for names in finals]


def _joined(layer: Layer, sequence: str, directions: int) -> str:
    """[T, directions, N, H] as [T, N, directions * H]."""
    if directions == 1:
        return layer.node("Squeeze", [sequence, layer.builder.ints([1])])
    apart = layer.node("Transpose", [sequence], perm=[0, 2, 1, 3])
    return layer.node("Reshape", [apart, layer.builder.ints([0, 0, -1])])


def _final(layer: Layer, names: list[str], batched: bool) -> str:
    states = names[0] if len(names) == 1 else layer.node("Concat", names, axis=0)
    return states if batched else layer.node("Squeeze", [states, layer.builder.ints([1])])


def _initial(layer: Layer, states: int, batched: bool) -> list[str]:
    """The given initial states, [layers * directions, N, H] each; none where they are left to be zero."""
    if len(layer.args) < 2 or layer.args[1] is None:
        return []
    given = layer.args[1] if states == 2 else [layer.args[1]]
    axis = layer.builder.ints([1])
    return [str(s) if batched else layer.node("Unsqueeze", [str(s), axis]) for s in given]


def _part(layer: Layer, state: str, index: int, directions: int) -> str:
    if layer.config["num_layers"] == 1:
        return state
    bounds = [layer.builder.ints([v]) for v in (index * directions, (index + 1) * directions, 0)]
    return layer.node("Slice", [state, *bounds])


def _parameters(layer: Layer, index: int, order: list[int]) -> list[str]:
    """W [D, gates * H, in], R [D, gates * H, H] and B [D, 2 * gates * H], gates reordered."""
    suffixes = ["", "_reverse"] if layer.config["bidirectional"] else [""]
    names = [
        _directions(layer, [f"{kind}_l{index}{s}" for s in suffixes], order)
        for kind in ("weight_ih", "weight_hh")
    ]
    if not layer.config["bias"]:
        return [*names, ""]
    rows = [
        np.concatenate([_gates(layer.array(f"{kind}_l{index}{s}"), order) for kind in ("bias_ih", "bias_hh")])
        for s in suffixes
    ]
    return [*names, layer.builder.constant(np.stack(rows), f"{layer.name}.bias_l{index}")]


def _directions(layer: Layer, names: list[str], order: list[int]) -> str:
    """The matrices of both directions as one tensor [D, rows, columns]."""
    if all(name not in layer.op.attrs.get("schemes", {}) for name in names):
        return layer.builder.constant(
            np.stack([_gates(layer.array(n), order) for n in names]), f"{layer.name}.{names[0]}"
        )
    axis = layer.builder.ints([0])
    parts = [layer.node("Unsqueeze", [layer.gates(name, order), axis]) for name in names]
    return parts[0] if len(parts) == 1 else layer.node("Concat", parts, axis=0)


def _gates(array: np.ndarray, order: list[int]) -> np.ndarray:
    blocks = np.split(array, len(order))
    return np.concatenate([blocks[i] for i in order])
