"""Cuts a graph into blocks that can be run one after the other, with nothing kept but what crosses the cuts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from fewbit.model.sites import QUANTIZERS


@dataclass(frozen=True)
class Block:
    """A run of nodes, in order: ``inputs`` are the tensors that it reads, ``outputs`` those that are read after it."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    def calls(self) -> list[str]:
        """The layers that the block calls, by their paths in the model."""
        return [str(n.target) for n in self.nodes if n.op == "call_module"]


def split(gm: GraphModule, layers: Iterable[str], example: tuple[Tensor, ...]) -> list[Block]:
    """Blocks that each call at least one of ``layers``, as small as can be with one tensor crossing each cut.

    A residual block stays whole, since its shortcut crosses every cut within. Nodes that hold no batch of values
    (sizes, constants) belong to every block that reads them.

    Args:
        example: inputs with at least two samples on axis 0, on which the graph is run once.
    """
    wanted, batched = set(layers), _batched(gm, example)
    order = [n for n in gm.graph.nodes if n in batched and n.op != "placeholder"]
    place = {n: index for index, n in enumerate(order)}
    last = {n: max((place[u] for u in _readers(n, batched)), default=-1) for n in batched}
    for node in next(n for n in gm.graph.nodes if n.op == "output").all_input_nodes:
        last[node] = len(order)
    live = {n for n in batched if n.op == "placeholder"}
    cuts, candidate, busy, index = [0], None, False, 0
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) in wanted:
            if busy and candidate is not None:
                cuts.append(candidate)
                candidate = None
            busy = True
        if node in place:
            live = {n for n in live | {node} if last[n] > index}
            index += 1
            if busy and len(live) == 1:
                candidate = index
    return [
        _block(order[a:b], order[b:], batched) for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True)
    ]


def twin(block: Block, gm: GraphModule) -> Block:
    """The same block of the graph without quantize steps, from which this one was made: nodes of the same names."""
    named = {n.name: n for n in gm.graph.nodes}
    nodes = tuple(named[n.name] for n in block.nodes if not _is_step(n))
    inputs = tuple(named[_source(n).name] for n in block.inputs)
    return Block(nodes, inputs, tuple(named[_source(n).name] for n in block.outputs))


def as_module(block: Block, gm: GraphModule, replaced: dict[str, nn.Module] | None = None) -> GraphModule:
    """The block as a module of its own that shares the model's layers; gives a tuple of its outputs.

    ``replaced`` puts modules in the place of layers, by path.
    """
    graph, env = Graph(), {}
    for node in block.inputs:
        env[node] = graph.placeholder(node.name)
    for node in block.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in block.outputs))
    parts: dict[str, Any] = {}
    for node in block.nodes:
        path = str(node.target)
        if node.op == "call_module":
            parts[path] = (replaced or {}).get(path) or gm.get_submodule(path)
        elif node.op == "get_attr":
            owner, _, name = path.rpartition(".")
            parts[path] = getattr(gm.get_submodule(owner), name)
    return GraphModule(parts, graph)


def _block(nodes: list[Node], later: list[Node], batched: set[Node]) -> Block:
    own, after = set(nodes), set(later)
    whole: dict[Node, None] = {}
    for node in nodes:
        _with_constants(node, batched, own, whole)
    inputs = dict.fromkeys(i for n in whole for i in n.all_input_nodes if i in batched and i not in own)
    read = [n for n in nodes if any(_reaches(u, after, batched) for u in n.users)]
    return Block(tuple(whole), tuple(inputs), tuple(read))


def _with_constants(node: Node, batched: set[Node], own: set[Node], found: dict[Node, None]) -> None:
    """The node after all that it reads and that is no batch of values itself."""
    for source in node.all_input_nodes:
        if source not in batched and source not in found:
            _with_constants(source, batched, own, found)
    found[node] = None


def _readers(node: Node, batched: set[Node]) -> list[Node]:
    """The batched nodes that read a node, through sizes too."""
    found = []
    for user in node.users:
        found += [user] if user in batched else _readers(user, batched)
    return found


def _reaches(user: Node, after: set[Node], batched: set[Node]) -> bool:
    if user.op == "output" or user in after:
        return True
    return user not in batched and any(_reaches(u, after, batched) for u in user.users)


def _is_step(node: Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{QUANTIZERS}.")


def _source(node: Node) -> Node:
    return node.all_input_nodes[0] if _is_step(node) else node


def _batched(gm: GraphModule, example: tuple[Tensor, ...]) -> set[Node]:
    """The nodes whose value is a tensor with one entry a sample on axis 0."""
    samples = example[0].shape[0]
    found: set[Node] = set()

    class Run(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == samples and n.op != "get_attr":
                found.add(n)
            return value

    Run(gm).run(*example)
    return {n for n in found if n.op != "output"}
