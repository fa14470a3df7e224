"""Functions that exporters write as several operators, recognised where their last operator is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

from fewbit.model.onnx_build import Constant
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_graph import Node


def _maker(c: Call, name: str, *ops: str) -> Node | None:
    """The node that computes a value, if it is one of these operators."""
    node = c.graph.makers.get(name)
    return node if node is not None and node.op in ops and not node.domain else None


def _constant(c: Call, name: str) -> np.ndarray | None:
    operand = c.builder.values.get(name)
    return operand.array if isinstance(operand, Constant) else None


def gated(c: Call) -> Any:
    """x * sigmoid(x) is SiLU, x * hard sigmoid(x) hard swish; None for any other product."""
    for x, gate in (c.node.inputs, c.node.inputs[::-1]):
        node = _maker(c, gate, "Sigmoid", "HardSigmoid")
        if node is None or node.inputs[0] != x:
            continue
        if node.op == "Sigmoid":
            return c.apply(F.silu, c.builder.values[x])
        if abs(node.attrs.get("alpha", 0.2) - 1 / 6) < 1e-6 and node.attrs.get("beta", 0.5) == 0.5:
            return c.apply(F.hardswish, c.builder.values[x])
    return None


def layer_norm(c: Call) -> Any:
    """(x - mean) / sqrt(variance + eps), with the product and sum behind it; None for any other quotient."""
    found = _standardised(c)
    if found is None:
        return None
    x, eps = found
    width = c.builder.values[x].example.shape[-1]  # type: ignore[union-attr]
    weight, bias, last = None, None, c.node
    if (product := _behind(c, last, "Mul", width)) is not None:
        weight, last = product
        if (total := _behind(c, last, "Add", width)) is not None:
            bias, last = total
    result = c.layer(
        nn.LayerNorm, [c.builder.values[x]], {"weight": weight, "bias": bias},
        normalized_shape=(width,), eps=eps, elementwise_affine=weight is not None, bias=bias is not None,
    )  # fmt: skip
    node: Node = c.node
    while node is not last:  # every node up to the last one has the layer's result
        following = c.only_consumer(node.outputs[0])
        assert following is not None
        c.absorbed[following] = result
        node = following
    return result


def _standardised(c: Call) -> tuple[str, float] | None:
    """The input and epsilon of a quotient that standardises the last axis."""
    centred, deviation = c.node.inputs
    difference, root = _maker(c, centred, "Sub"), _maker(c, deviation, "Sqrt")
    if difference is None or root is None:
        return None
    x, mean = difference.inputs
    total = _maker(c, root.inputs[0], "Add")
    if total is None or not _is_last_mean(c, mean, x):
        return None
    for variance, small in (total.inputs, total.inputs[::-1]):
        eps, average = _constant(c, small), _maker(c, variance, "ReduceMean")
        if eps is None or eps.size != 1 or average is None:
            continue
        square = _maker(c, average.inputs[0], "Pow", "Mul")
        if square is None or not _is_last_mean(c, variance, average.inputs[0]):
            continue
        power = _constant(c, square.inputs[1]) if square.op == "Pow" else None
        twice = square.op == "Mul" and square.inputs == [centred, centred]
        if square.inputs[0] == centred and (
            twice or (power is not None and power.size == 1 and power.item() == 2)
        ):
            return x, float(eps.item())
    return None


def _is_last_mean(c: Call, name: str, x: str) -> bool:
    """Whether a value is the mean of x over its last axis, which is kept."""
    node, operand = _maker(c, name, "ReduceMean"), c.builder.values.get(x)
    if (
        node is None
        or node.inputs[0] != x
        or operand is None
        or isinstance(operand, Constant)
        or operand.is_size
    ):
        return False
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        given = _constant(c, node.inputs[1])
        axes = None if given is None else given.reshape(-1).tolist()
    rank = operand.example.dim()
    return axes in ([-1], [rank - 1]) and bool(node.attrs.get("keepdims", 1))


def _behind(c: Call, node: Node, op: str, width: int) -> tuple[Constant, Node] | None:
    """The vector that the only consumer of a node multiplies or adds."""
    following = c.only_consumer(node.outputs[0])
    if following is None or following.op != op:
        return None
    other = next((i for i in following.inputs if i != node.outputs[0]), "")
    operand = c.builder.values.get(other)
    if not isinstance(operand, Constant) or operand.array.shape != (width,):
        return None
    return operand, following
