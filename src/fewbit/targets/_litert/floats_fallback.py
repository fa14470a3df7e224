"""An operator without an expansion of its own: torch says in which simpler ones it computes it."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fewbit.model.program import aten
from fewbit.targets._litert.expand import Call, Value
from fewbit.targets._litert.layout import FixedBatch

_IGNORED = ("device", "layout", "pin_memory", "memory_format", "non_blocking")


def decomposed(c: Call) -> Any:
    """The steps that torch takes for an operator; None where it has none, or where one of them has no operator."""
    values = [v for v in pytree.tree_leaves(_operands(c)) if isinstance(v, Value)]
    one = _traced(c, values, 1)
    if one is None or not _writable(c, one):
        return None
    if c.expansion.free_batch:
        two = _traced(c, values, 2)
        if two is None or _text(one) != _text(two):
            raise FixedBatch  # a size of the batch is among the numbers
    return _emitted(c, one, values)


def _operands(c: Call) -> Any:
    return [c.expansion.given(name) for name in c.op.inputs]


def _traced(c: Call, values: list[Value], batch: int) -> fx.Graph | None:
    """The operator in torch's core operators, with every axis that grows at a batch size."""
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    operator = aten(c.op.attrs["target"])
    names = [v.name for v in values]

    def run(*tensors: Tensor) -> Any:
        table = dict(zip(names, tensors, strict=True))
        place = functools.partial(_placed, table=table)
        known = {a.name for a in operator._schema.arguments if a.kwarg_only}
        positional = [place(c.arguments[a.name]) for a in operator._schema.arguments if not a.kwarg_only]
        return operator(*positional, **{k: place(v) for k, v in c.arguments.items() if k in known})

    free = c.expansion.sizes.free
    examples = []
    for value in values:
        grown = [s * batch if i in free.get(value.name, ()) else s for i, s in enumerate(value.shape)]
        examples.append(torch.zeros(grown, dtype=value.dtype))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table: Any = core_aten_decompositions()
            graph = make_fx(run, decomposition_table=table, tracing_mode="fake")(*examples)
    except (
        Exception
    ):  # torch raises errors of many kinds for what it cannot trace, all of which mean the same here
        return None
    return graph.graph


def _placed(value: Any, table: dict[str, Tensor]) -> Any:
    return pytree.tree_map_only(Value, lambda v: table[v.name], value, is_leaf=lambda v: isinstance(v, Value))


def _text(graph: fx.Graph) -> str:
    return "\n".join(node.format_node() or "" for node in graph.nodes if node.op != "placeholder")


def _steps(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _name(node: fx.Node) -> str:
    """The operator of a step; of one that writes over what nothing else reads, the form that does not."""
    name = str(node.target)
    source = node.args[0] if node.args else None
    if "_." in name and isinstance(source, fx.Node) and len(source.users) == 1:
        name = name.replace("_.", ".")
    return name.replace("view.default", "reshape.default")


def _writable(c: Call, graph: fx.Graph) -> bool:
    for node in _steps(graph):
        name, known = _name(node), c.expansion.known
        if (
            node.op != "call_function"
            or name == c.op.attrs["target"]
            or not isinstance(node.meta.get("val"), Tensor)
        ):
            return False
        if node.all_input_nodes and name not in known:
            return False
    return bool(_steps(graph))


def _emitted(c: Call, graph: fx.Graph, values: list[Value]) -> Any:
    made: dict[fx.Node, Any] = {}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    made.update(zip(inputs, values, strict=True))
    for node in _steps(graph):
        args: Any = fx.node.map_arg(node.args, lambda n: made[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: made[n])
        kwargs = {k: v for k, v in kwargs.items() if k not in _IGNORED}
        name = _name(node).removeprefix("aten.")
        if node.all_input_nodes:
            made[node] = c(name, *args, **kwargs)
        else:
            made[node] = c.constant(aten(f"aten.{name}")(*args, **kwargs))
    result: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    return [made[n] for n in result] if isinstance(result, list | tuple) else made[result]
