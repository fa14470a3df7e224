"""Writes an operator without a rule of its own: torch exports it alone, and its nodes join the graph."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbit.errors import TargetError
from fewbit.model.program import aten, decode_args
from fewbit.targets._onnx.builder import OPSET, Builder
from fewbit.targets._onnx.floats_call import Call, Value

_FREE = 4  # a size for the dimensions that are free; torch treats 0 and 1 as special


def emit_alone(c: Call) -> Any:
    """The nodes of one operator; its output's name, or a list. Raises ``TargetError`` where that fails."""
    tensors = list(dict.fromkeys(v for v in pytree.tree_leaves(c.inputs) if isinstance(v, Value)))
    try:
        model = _exported(c, tensors)
    except Exception as error:  # the exporter raises errors of many kinds, all of which mean the same here
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise c.error(f"torch.onnx has no form of it either ({type(error).__name__}: {reason})") from error
    names = _spliced(c.builder, model, [v.name for v in tensors], c.layer)
    return names if isinstance(c.op.attrs.get("type"), list) and _several(c.op.attrs["type"]) else names[0]


def _several(kind: list[Any]) -> bool:
    return not isinstance(kind[0], str) or kind[0] == "int"


class _Alone(nn.Module):
    """A model that is this one operator."""

    def __init__(self, c: Call, tensors: list[Value]) -> None:
        super().__init__()
        self.operator, self.names = aten(c.target), [t.name for t in tensors]
        self.args, self.kwargs, self.inputs = c.op.attrs["args"], c.op.attrs["kwargs"], c.inputs

    def forward(self, given: list[Tensor]) -> Any:
        table = dict(zip(self.names, given, strict=True))
        inputs = pytree.tree_map_only(
            Value, lambda v: table[v.name], self.inputs, is_leaf=lambda v: isinstance(v, Value)
        )
        kwargs = {k: decode_args(v, inputs) for k, v in self.kwargs.items()}
        return self.operator(
            *decode_args(self.args, inputs), **{k: v for k, v in kwargs.items() if v is not None}
        )


def _exported(c: Call, tensors: list[Value]) -> onnx.ModelProto:
    if any(v.size or v.shape is None for v in tensors):
        raise TargetError("one of its arguments is a size that is known at run time only")
    examples = [_example(v) for v in tensors]
    auto = torch.export.Dim.AUTO
    shapes = [{i: auto for i, s in enumerate(v.shape or ()) if s is None} for v in tensors]
    with _silence():
        program = torch.onnx.export(
            _Alone(c, tensors).eval(),
            (examples,),
            dynamo=True,
            dynamic_shapes=(shapes,),
            opset_version=OPSET,
            verbose=False,
            optimize=True,
        )
    if program is None:
        raise TargetError("the exporter gave no answer")
    model = program.model_proto
    versions = {o.domain: o.version for o in model.opset_import}
    if versions.get("", OPSET) > OPSET or model.functions or any(n.domain for n in model.graph.node):
        raise TargetError(f"it needs more than the standard operators of opset {OPSET}")
    return model


def _example(value: Value) -> Tensor:
    sizes = [_FREE if s is None else s for s in value.shape or ()]
    dtype: torch.dtype = getattr(torch, value.dtype)
    return torch.rand(sizes) if dtype == torch.float32 else torch.zeros(sizes, dtype=dtype)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter's own chatter says nothing to a user of ours."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _spliced(builder: Builder, model: onnx.ModelProto, inputs: list[str], layer: str) -> list[str]:
    """Copy nodes and initializers into the graph under names of their own; returns the outputs' names.

    Inputs are matched by position: the exporter keeps those that nothing reads.
    """
    graph = model.graph
    names = dict(zip([i.name for i in graph.input], inputs, strict=True))
    for tensor in graph.initializer:
        names[tensor.name] = builder.constant(numpy_helper.to_array(tensor), f"{layer}.constant")
    for node in graph.node:
        for output in node.output:
            names[output] = builder.unique(layer) if output else ""
    for node in graph.node:
        builder.nodes.append(_renamed(node, names, builder.unique(f"{layer}/{node.op_type}")))
    return [names[o.name] for o in graph.output]


def _renamed(node: onnx.NodeProto, names: dict[str, str], name: str) -> onnx.NodeProto:
    """A node with other names, inside branches and loops too (what those define themselves stays)."""
    new = copy.deepcopy(node)
    new.name = name
    del new.metadata_props[:]
    _rename_values(new, names)
    return new


def _rename_values(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for values in (node.input, node.output):
        values[:] = [names.get(v, v) for v in values]
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            own = {t.name for t in body.initializer} | {i.name for i in body.input}
            own |= {o for n in body.node for o in n.output}
            outer = {k: v for k, v in names.items() if k not in own}
            for inner in body.node:
                _rename_values(inner, outer)
