"""Which operations XNNPACK computes on integers, read from its graphs in the file."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fewbit.model.program import Op, Program
from fewbit.targets import Kernel
from fewbit.targets._pt2e.pte import hashes

_INTEGER_INPUTS = ("xnn_datatype_qint8", "xnn_datatype_qdint8")
_NODES = {
    "add": ("XNNAdd",),
    "mul": ("XNNMultiply",),
    "global_avg_pool": ("XNNGlobalAvgPooling2d",),
    "concat": ("XNNConcatenate2", "XNNConcatenate3", "XNNConcatenate4", "XNNConcatenate5"),
    "pad": ("XNNStaticConstantPad",),
    "clip": ("XNNClamp", "XNNHardswish"),
}
_FLOAT_KERNEL = "XNNPACK's kernel for it is a float one here: codes are converted before and after"
_NO_KERNEL = "ExecuTorch's own float kernel: XNNPACK did not take it"
_FLOAT_LAYERS = ("Conv", "Linear", "LSTM", "GRU")


@dataclass(frozen=True)
class _Node:
    kind: str
    integer: bool
    filter: str


def kernels(program: Program, graphs: list[dict[str, Any]]) -> list[Kernel]:
    """Layers are found by their weights, other operations by how many of their kind XNNPACK has on integers."""
    nodes = [node for graph in graphs for node in _nodes(graph)]
    by_weight = {node.filter: node for node in nodes if node.filter}
    counts = {kind: sum(n.integer for n in nodes if n.kind in names) for kind, names in _NODES.items()}
    found = []
    for op in program.ops:
        kind = op.attrs["type"] if op.kind == "module" else op.kind
        if op.kind == "module" and kind.startswith(_FLOAT_LAYERS):
            found.append(Kernel(op.layer, kind, False, op.note or "planned as float", planned=False))
        elif op.kind.startswith("dynamic_") or (op.domain == "integer" and "weight" in op.constants):
            node = next((by_weight[h] for h in hashes(op.constants["weight"]) if h in by_weight), None)
            done = node is not None and node.integer
            found.append(Kernel(op.layer, kind, done, "" if done else _NO_KERNEL))
        elif op.domain == "integer":
            found.append(_counted(op, counts))
    return found


def _counted(op: Op, counts: dict[str, int]) -> Kernel:
    if counts.get(op.kind, 0) > 0:
        counts[op.kind] -= 1
        return Kernel(op.layer, op.kind, True)
    return Kernel(op.layer, op.kind, False, _FLOAT_KERNEL, planned=False)


def _nodes(graph: dict[str, Any]) -> Iterator[_Node]:
    types: dict[int, str] = {}
    keys: dict[int, str] = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        types[tensor["id_out"]] = tensor["datatype"]
        keys[tensor["id_out"]] = graph["constant_data"][tensor["constant_buffer_idx"]].get("named_key", "")
    for node in graph["xnodes"]:
        union = node["xnode_union"]
        first = union.get("input1_id", union.get("input_id"))
        yield _Node(
            node["xnode_union_type"],
            types.get(first) in _INTEGER_INPUTS,
            keys.get(union.get("filter_id"), ""),
        )
