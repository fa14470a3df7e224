"""ONNX's LSTM, GRU and RNN as the `nn` layers: gates in torch's order, sequences in ONNX's layout around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbit.model.onnx_build import Constant, Operand
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_graph import Node

Rule = Callable[[Call], Any]
_STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _recurrent(cls: type[nn.RNNBase], order: list[int]) -> Rule:
    """`order`: which of ONNX's gates each of torch's gates is."""

    def rule(c: Call) -> Any:
        direction = str(c.attr("direction", "forward")).lower()
        directions = 2 if direction == "bidirectional" else 1
        settings = _check(c, directions)
        weights, hidden = _weights(c, order, directions)
        x = c.apply(torch.flip, c[0], dims=(0,), suffix="reverse") if direction == "reverse" else c[0]
        states = _initial(c, directions, hidden)
        result = c.layer(
            cls, [x, *states], weights, input_size=c.shape(1)[2], hidden_size=hidden,
            bias=any("bias" in name for name in weights), bidirectional=directions == 2, **settings,
        )  # fmt: skip
        sequence, final = c.builder.item(result, 0), c.builder.item(result, 1)
        finals = [c.builder.item(final, i) for i in range(2)] if cls is nn.LSTM else [final]
        if direction == "reverse":
            sequence = c.apply(torch.flip, sequence, dims=(0,), suffix="forward")
        return [_sequence(c, sequence, directions, hidden), *finals]

    return rule


def _check(c: Call, directions: int) -> dict[str, Any]:
    """Settings of the layer; an error for what torch's layers do not have."""
    op = c.node.op
    names = [str(a).capitalize() for a in c.attr("activations") or _ACTIVATIONS[op] * directions]
    settings: dict[str, Any] = {}
    if op == "RNN" and set(names) in ({"Relu"}, {"Tanh"}):
        settings["nonlinearity"] = names[0].lower()
    elif names != _ACTIVATIONS[op] * directions:
        raise c.error(f"activations {names}: expected {_ACTIVATIONS[op]}")
    if c.attr("layout", 0) or c.attr("clip") or c.attr("input_forget", 0):
        raise c.error("layout, clip or input_forget: expected none of them")
    if op == "GRU" and not c.attr("linear_before_reset", 0):
        raise c.error(
            "linear_before_reset=0 (reset_after=False in Keras): torch's GRU resets after the product"
        )
    if c.has(4) and not np.all(c.fixed(4, "sequence lengths") == c.shape(0)[0]):
        raise c.error("sequences of different lengths: expected all as long as the input")
    if op == "LSTM" and c.has(7) and np.any(c.fixed(7, "peepholes")):
        raise c.error("peepholes: expected none")
    return settings


def _weights(c: Call, order: list[int], directions: int) -> tuple[dict[str, Constant | None], int]:
    w, r = c.fixed(1, "weights"), c.fixed(2, "weights")
    b = c.fixed(3, "biases") if c.has(3) else None
    gates, hidden = len(order), r.shape[2]
    fits = w.shape[:2] == r.shape[:2] == (directions, gates * hidden) and (
        b is None or b.shape == (directions, 2 * gates * hidden)
    )
    if not fits:
        raise c.error(f"weights of shape {list(w.shape)} and {list(r.shape)} do not fit together")
    made: dict[str, Constant | None] = {}
    for at, suffix in enumerate(["", "_reverse"][:directions]):
        parts = {"weight_ih": w[at], "weight_hh": r[at]}
        if b is not None:
            parts |= {"bias_ih": b[at][: gates * hidden], "bias_hh": b[at][gates * hidden :]}
        for name, array in parts.items():
            blocks = np.split(array, gates)
            made[f"{name}_l0{suffix}"] = Constant(
                np.concatenate([blocks[i] for i in order]), c.node.inputs[1]
            )
    return made, hidden


def _initial(c: Call, directions: int, hidden: int) -> list[Any]:
    """The initial states as the layer takes them; none where they are zero."""
    indices = [5, 6][: _STATES[c.node.op]]
    if all(_is_zero(c, i) for i in indices):
        return []
    shape = (directions, c.shape(0)[1], hidden)
    states = [c[i] if c.has(i) else Constant(np.zeros(shape, np.float32), "") for i in indices]
    return [tuple(states)] if len(states) == 2 else states


def _is_zero(c: Call, index: int) -> bool:
    if not c.has(index):
        return True
    operand = c.raw(index)
    return not np.any(operand.array) if isinstance(operand, Constant) else operand.node in c.builder.zeros


def _sequence(c: Call, sequence: Operand, directions: int, hidden: int) -> Operand:
    """[T, N, directions * H] in ONNX's layout [T, directions, N, H].

    Exporters change that back at once; the nodes that do so then have the layer's own result.
    """
    output = c.node.outputs[0]
    node = c.only_consumer(output)
    if directions == 1 and node is not None and node.op == "Squeeze" and _constants(c, node) == [1]:
        c.absorbed[node] = sequence
    if node is not None and node.op == "Transpose" and node.attrs.get("perm") == [0, 2, 1, 3]:
        last = c.only_consumer(node.outputs[0])
        whole = ([0, 0, -1], [0, 0, directions * hidden])
        if last is not None and last.op == "Reshape" and _constants(c, last) in whole:
            c.absorbed[last] = sequence
    if directions == 1:
        return c.apply(torch.unsqueeze, sequence, dim=1)
    return c.apply(_by_direction, sequence, directions=directions)


def _constants(c: Call, node: Node) -> list[int] | None:
    """Axes or shape of a node, where they are constants."""
    if "axes" in node.attrs:
        return list(node.attrs["axes"])
    operand = c.builder.values.get(node.inputs[1]) if len(node.inputs) > 1 else None
    return [int(v) for v in operand.array.reshape(-1)] if isinstance(operand, Constant) else None


def _by_direction(x: Tensor, *, directions: int) -> Tensor:
    return x.unflatten(-1, (directions, -1)).permute(0, 2, 1, 3)


RULES: dict[str, Rule] = {
    "LSTM": _recurrent(nn.LSTM, [0, 2, 3, 1]),
    "GRU": _recurrent(nn.GRU, [1, 0, 2]),
    "RNN": _recurrent(nn.RNN, [0]),
}
