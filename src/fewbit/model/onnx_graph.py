"""An ONNX graph in plain Python: nodes with their attributes, stored numbers, and the shapes of its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.errors import ArtifactError, ModelError
from fewbit.model.onnx_file import array, opset

SUBGRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})


@dataclass(eq=False)
class Node:
    """One operator. `name` is its own, or made from what it computes."""

    name: str
    op: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any]


@dataclass
class Input:
    """An input of the model: a number for each fixed size, a name or None for each free one."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass
class Graph:
    """What the reader works on. `nodes` are those that outputs depend on, in an order that can be run; `users` says
    how many nodes and outputs read a value, `makers` which node computes it.
    """

    name: str
    opset: int
    nodes: list[Node]
    constants: dict[str, np.ndarray]
    inputs: list[Input]
    outputs: list[str]
    users: dict[str, int] = field(default_factory=dict)
    makers: dict[str, Node] = field(default_factory=dict)


def graph_of(model: Any, path: Path) -> Graph:
    """The graph of a model. Raises ArtifactError where it is damaged."""
    g = model.graph
    stored = {t.name: t for t in g.initializer}
    twice = next((o for n in g.node for o in n.output if o in stored), None)
    if twice is not None:
        raise ArtifactError(f"{path}: {twice!r:.80} is both stored and computed: damaged; export it again")
    if g.sparse_initializer:
        raise ModelError(
            f"{path}: {g.sparse_initializer[0].values.name!r} is a sparse tensor: expected dense weights; "
            "store the weights dense"
        )
    nodes = _needed([_node(n, path) for n in g.node], [o.name for o in g.output], path)
    read = {name for node in nodes for name in node.inputs} | {o.name for o in g.output}
    constants = {name: array(t, path) for name, t in stored.items() if name in read}
    inputs = [_input(i, path) for i in g.input if i.name not in stored]
    graph = Graph(g.name, opset(model), nodes, constants, inputs, [o.name for o in g.output])
    if not graph.outputs:
        raise ArtifactError(f"{path}: the graph has no outputs: expected at least one; export it again")
    _check_order(graph, path)
    graph.makers = {name: node for node in nodes for name in node.outputs if name}
    for name in [*(i for node in nodes for i in node.inputs), *graph.outputs]:
        graph.users[name] = graph.users.get(name, 0) + 1
    return graph


def _node(proto: Any, path: Path) -> Node:
    outputs = list(proto.output)
    made = next((o for o in outputs if o), "")
    name = proto.name or made
    attrs = {a.name: _attribute(a, name, path) for a in proto.attribute}
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    return Node(name, proto.op_type, domain, list(proto.input), outputs, attrs)


def _attribute(a: Any, node: str, path: Path) -> Any:
    kinds = a.AttributeType
    if a.type == kinds.STRING:
        return a.s.decode("utf-8", "replace")
    if a.type == kinds.STRINGS:
        return [s.decode("utf-8", "replace") for s in a.strings]
    if a.type == kinds.TENSOR:
        return array(a.t, path)
    if a.type in (kinds.FLOAT, kinds.INT):
        return a.f if a.type == kinds.FLOAT else int(a.i)
    if a.type in (kinds.FLOATS, kinds.INTS):
        return list(a.floats if a.type == kinds.FLOATS else a.ints)
    if a.type in (kinds.GRAPH, kinds.GRAPHS):
        return None  # operators with inner graphs are refused by name
    raise ArtifactError(f"{path}: attribute {a.name!r:.80} of {node!r:.80} has a type that is not read")


def _needed(nodes: list[Node], outputs: list[str], path: Path) -> list[Node]:
    """The nodes that the outputs depend on, in the order of the file."""
    makers: dict[str, Node] = {}
    for node in nodes:
        for name in filter(None, node.outputs):
            if name in makers:
                raise ArtifactError(f"{path}: {name!r:.80} is computed twice: damaged; export it again")
            makers[name] = node
    found: set[Node] = set()
    waiting = list(outputs)
    while waiting:
        maker = makers.get(waiting.pop())
        if maker is not None and maker not in found:
            found.add(maker)
            waiting += maker.inputs
    return [node for node in nodes if node in found]


def _check_order(graph: Graph, path: Path) -> None:
    known = {i.name for i in graph.inputs} | set(graph.constants) | {""}
    for node in graph.nodes:
        for name in node.inputs:
            if name not in known and node.op not in SUBGRAPHS:
                raise ArtifactError(
                    f"{path}: {node.name!r:.80} ({node.op:.40}) reads {name!r:.80}, which nothing before it "
                    "computes: damaged; export it again"
                )
        known |= set(node.outputs)
    for name in graph.outputs:
        if name not in known or not name:
            raise ArtifactError(f"{path}: nothing computes the output {name!r:.80}: damaged; export it again")


def _input(info: Any, path: Path) -> Input:
    import onnx

    kind = info.type.tensor_type
    if not info.type.HasField("tensor_type"):
        raise ModelError(f"{path}: input {info.name!r:.80} is no tensor: expected tensors only")
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    except Exception as error:
        raise ArtifactError(
            f"{path}: input {info.name!r:.80} has the unknown type {kind.elem_type}"
        ) from error
    if dtype.hasobject:
        raise ModelError(
            f"{path}: input {info.name!r:.80} takes strings: cut the text processing off the model"
        )
    if not kind.HasField("shape"):
        raise ModelError(
            f"{path}: input {info.name!r:.80} has no shape: expected at least its number of dimensions; "
            "export it again, or set it with onnx.helper.make_tensor_value_info"
        )
    return Input(info.name, dtype, tuple(_size(d, info.name, path) for d in kind.shape.dim))


def _size(dim: Any, name: str, path: Path) -> int | str | None:
    if not dim.HasField("dim_value"):
        return dim.dim_param or None
    if dim.dim_value < 0:
        return None  # what some exporters write for a free size
    return int(dim.dim_value)
