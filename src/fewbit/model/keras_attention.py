"""Keras's attention layers as linear layers, products of matrices and a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.model.keras_layout import Assembly, Value, identity
from fewbit.model.keras_weights import parameters, tensor


def multi_head_attention(
    b: Assembly,
    layer: Any,
    path: str,
    query: Value,
    value: Value,
    key: Value | None = None,
    use_causal_mask: bool = False,
    return_attention_scores: bool = False,
) -> Any:
    """Over [n, time, width]: ``<name>.query``, ``.key``, ``.value`` and ``.attention_output`` are linear layers."""
    key = value if key is None else key
    for one in (query, value, key):
        if one.rank != 3:
            raise ModelError(f"{path} attends over {one.rank} dimensions: expected 3; reshape in front of it")
    if layer.dropout:
        b.notes.append(
            f"{path}: dropout of attention weights (p={layer.dropout}) acts in training only and was not kept"
        )
    q, k, v = (
        _heads(b, dense, f"{path}.{name}", b.as_keras(x, path))
        for x, dense, name in ((query, layer.query_dense, "query"), (key, layer.key_dense, "key"),
                               (value, layer.value_dense, "value"))
    )  # fmt: skip
    scale = layer.key_dim**-0.5
    node = b.function(f"{path}.attention", _attended, q, k, v, scale, use_causal_mask)
    mixed = b.function(f"{path}.merge", _side_by_side, b.item(node, 0))
    output = Value(_linear(b, layer.output_dense, f"{path}.attention_output", mixed, 2), identity(3))
    return [output, Value(b.item(node, 1), identity(4))] if return_attention_scores else output


def _heads(b: Assembly, dense: Any, path: str, x: Value) -> fx.Node:
    """[n, time, width] through a projection as [n, heads, time, width of a head]."""
    heads, width = dense.kernel.shape[-2:]
    return b.function(f"{path}.split", _apart, _linear(b, dense, path, x.node, 1), int(heads), int(width))


def _linear(b: Assembly, dense: Any, path: str, node: fx.Node, inputs: int) -> fx.Node:
    """A projection of Keras's by einsum, whose first ``inputs`` axes are summed over, as a linear layer."""
    weight = tensor(dense.kernel).flatten(0, inputs - 1).flatten(1).t()
    bias = None if dense.bias is None else tensor(dense.bias).flatten()
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return b.module(path, lambda: parameters(made, dense, weight=weight, bias=bias), node)


def _apart(x: Tensor, heads: int, width: int) -> Tensor:
    return x.unflatten(2, (heads, width)).transpose(1, 2)


def _side_by_side(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v, and the weights themselves (arXiv 1706.03762)."""
    scores = torch.matmul(q * scale, k.transpose(-2, -1))
    if causal:
        ahead = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    weights = torch.softmax(scores, -1)
    return torch.matmul(weights, v), weights


def attention(
    b: Assembly,
    layer: Any,
    path: str,
    inputs: Sequence[Value],
    use_causal_mask: bool = False,
    return_attention_scores: bool = False,
) -> Any:
    """Dot-product attention without weights of its own, of [query, value] or [query, value, key]."""
    query, value = (b.as_keras(x, path).node for x in inputs[:2])
    key = b.as_keras(inputs[2], path).node if len(inputs) > 2 else value
    scale = float(tensor(layer.scale)) if layer.use_scale else 1.0
    if layer.dropout:
        b.notes.append(
            f"{path}: dropout of attention weights (p={layer.dropout}) acts in training only and was not kept"
        )
    node = b.function(path, _attended, query, key, value, scale, use_causal_mask)
    output = Value(b.item(node, 0), identity(3))
    return [output, Value(b.item(node, 1), identity(3))] if return_attention_scores else output
