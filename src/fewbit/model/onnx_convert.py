"""Turns an ONNX graph into a module, node by node, by the tables of operators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fewbit.errors import FewbitError, ModelError
from fewbit.model import (
    onnx_attention,
    onnx_codes,
    onnx_functions,
    onnx_gathers,
    onnx_layers,
    onnx_recurrent,
    onnx_reductions,
    onnx_resize,
    onnx_shapes,
    onnx_windows,
)
from fewbit.model.onnx_build import Builder, Constant, Network, Value
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_graph import SUBGRAPHS, Graph, Node
from fewbit.model.onnx_quantized import DOMAINS, QUANTIZED
from fewbit.model.torch_export import first_line

OPERATORS: dict[str, Callable[[Call], Any]] = {
    **onnx_attention.RULES,
    **onnx_codes.RULES,
    **onnx_functions.RULES,
    **onnx_gathers.RULES,
    **onnx_layers.RULES,
    **onnx_recurrent.RULES,
    **onnx_reductions.RULES,
    **onnx_resize.RULES,
    **onnx_shapes.RULES,
    **onnx_windows.RULES,
}


_MOVING = frozenset({"Slice", "Split", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Gather", "Identity"})


def check_operators(graph: Graph) -> None:
    """ModelError that lists every operator without a counterpart."""
    unknown = [n for n in graph.nodes if n.op not in (QUANTIZED if n.domain in DOMAINS else ())]
    unknown = [n for n in unknown if n.domain or n.op not in OPERATORS]
    if not unknown:
        return
    listed = "; ".join(f"{n.name!r:.80} ({_full(n)}{_why(n)})" for n in unknown[:50])
    more = f" and {len(unknown) - 50} more" if len(unknown) > 50 else ""
    raise ModelError(
        f"{len(unknown)} operator{'s' * (len(unknown) > 1)} of the file cannot be read: {listed}{more}. "
        "Export the model without them, replace them by plain operators, or cut the graph before them with "
        "onnx.utils.extract_model"
    )


def _full(node: Node) -> str:
    return f"{node.domain}.{node.op}" if node.domain else node.op


def _why(node: Node) -> str:
    return ": control flow, with a graph inside" if node.op in SUBGRAPHS else ""


def network(graph: Graph, example: tuple[Tensor, ...]) -> Network:
    """The module that computes the graph. `example` has one tensor for each input.

    Raises ModelError for operators and attributes that torch has no counterpart for, by node name.
    """
    check_operators(graph)
    builder = Builder()
    builder.free_sizes = any(not isinstance(size, int) for i in graph.inputs for size in i.shape[1:])
    for name, array in graph.constants.items():
        builder.values[name] = Constant(array, name)
    for given, tensor in zip(graph.inputs, example, strict=True):
        builder.placeholder(given.name, tensor)
    consumers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in dict.fromkeys(node.inputs):
            consumers.setdefault(name, []).append(node)
    done: set[Node] = set()
    with _quiet():
        for node in sorted(graph.nodes, key=lambda node: node.op != "Constant"):
            if node not in done:
                done |= _convert(builder, node, graph, consumers)
    return builder.network(graph.outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """No tracebacks of torch's own on the log: an operator that does not fit is one error of ours."""
    talkative = logging.getLogger("torch._subclasses.fake_tensor")
    before = talkative.level
    talkative.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        talkative.setLevel(before)


def _convert(builder: Builder, node: Node, graph: Graph, consumers: dict[str, list[Node]]) -> set[Node]:
    """Read one node; returns later ones that its layer absorbed."""
    try:
        call = Call(builder, node, graph, consumers)
        result = OPERATORS[node.op](call)
    except FewbitError as error:
        message = str(error)
        raise type(error)(
            message if node.name in message else f"{node.name!r:.120} ({node.op}) {message}"
        ) from error
    except Exception as error:
        raise ModelError(
            f"{node.name!r:.120} ({node.op}) cannot be read ({first_line(error)}): expected what ONNX defines for "
            f"opset {graph.opset}; check the shapes of its inputs, or export the model again"
        ) from error
    results = result if isinstance(result, list) else [result]
    if len(results) < sum(bool(o) for o in node.outputs):
        unread = [o for o in node.outputs[len(results) :] if graph.users.get(o)]
        if unread:
            raise ModelError(f"{node.name!r:.120} ({node.op}): its output {unread[0]!r:.80} cannot be read")
    builder.values.update(zip(node.outputs, results, strict=False))
    first = call.operands[0] if call.operands else None
    if node.op in _MOVING and isinstance(first, Value) and first.node in builder.zeros:
        builder.zeros |= {r.node for r in results if isinstance(r, Value)}
    for absorbed, made in call.absorbed.items():
        builder.values[absorbed.outputs[0]] = made or results[0]
    return set(call.absorbed)
