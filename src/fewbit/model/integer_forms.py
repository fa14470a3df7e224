"""Which operators have an exact integer form, under which conditions, and the attributes that the form needs.

One function an operator: it answers with an ``IntegerForm``, or with the reason why this very node has none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fewbit.model.operators import Operator

FIXED_UNIT = 1.0 / 256.0  # sigmoid and softmax answer in [0, 1]: their codes need no observer


@dataclass(frozen=True)
class IntegerForm:
    """How a node computes on codes: the kernel's ``kind``, its data inputs, its attributes.

    ``heavy`` forms (products summed up) are worth quantizing their inputs for; the others follow where codes
    already are. ``fixed`` is the (scale, zero point for uint8) of an output whose range the operator itself gives.
    """

    kind: str
    inputs: tuple[Node, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    heavy: bool = False
    fixed: tuple[float, int] | None = None


Answer = IntegerForm | str


def integer_form(node: Node, op: Operator, gm: GraphModule) -> Answer:
    """The integer form of ``node``, or one sentence why it has none."""
    rule = _RULES.get(op.name)
    if rule is not None:
        return rule(node, gm)
    if op.role == "table":
        return IntegerForm("table", (_node(node.args[0]),))
    return f"{op.name} has no integer form"


def _node(value: Any) -> Node:
    assert isinstance(value, Node)
    return value


def shape(node: Node) -> tuple[int, ...]:
    """Sizes on the example input."""
    return tuple(node.meta.get("shape", ()))


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """A positional or keyword argument of a torch operator."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * n if len(values) == 1 else values


def _conv(node: Node, gm: GraphModule) -> Answer:
    conv = gm.get_submodule(str(node.target))
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r} has no integer kernel"
    n = conv.weight.dim() - 2
    stride, dilation = _tuple(conv.stride, n), _tuple(conv.dilation, n)
    pads: list[tuple[int, int]] = []
    for i in range(n):
        total = dilation[i] * (conv.weight.shape[2 + i] - 1)
        if conv.padding == "same":
            pads.append((total // 2, total - total // 2))
        elif conv.padding == "valid":
            pads.append((0, 0))
        else:
            pads.append((_tuple(conv.padding, n)[i],) * 2)
    flat = [p for pair in reversed(pads) for p in pair]  # torch.nn.functional.pad wants the last axis first
    attrs = {
        "stride": list(stride),
        "dilation": list(dilation),
        "groups": conv.groups,
        "pad": flat if any(flat) else [],
    }
    return IntegerForm("conv", (_node(node.args[0]),), attrs, heavy=True)


def _linear(node: Node, gm: GraphModule) -> Answer:
    return IntegerForm("linear", (_node(node.args[0]),), heavy=True)


def _matmul(node: Node, gm: GraphModule) -> Answer:
    a, b = node.args[:2]
    if not (isinstance(a, Node) and isinstance(b, Node)) or "get_attr" in (a.op, b.op):
        return "a product with a constant that is no layer's weight runs in float"
    if len(shape(a)) < 2 or len(shape(b)) < 2:
        return "a product with a vector runs in float"
    return IntegerForm("matmul", (a, b), heavy=True)


def _elementwise(kind: str) -> Callable[[Node, GraphModule], Answer]:
    def rule(node: Node, gm: GraphModule) -> Answer:
        a, b = node.args[:2]
        if not (isinstance(a, Node) and isinstance(b, Node)):
            return f"{kind} with a number runs in float"
        if a.op == b.op == "get_attr":
            return f"{kind} of two constants runs in float"
        if node.kwargs.get("alpha", 1) != 1:
            return f"{kind} with alpha runs in float"
        for constant in (n for n in (a, b) if n.op == "get_attr"):
            if not torch.isfinite(_tensor(gm, constant)).all():
                return f"{kind} with a constant that is not finite runs in float"
        if not (_is_float(a) and _is_float(b)):
            return f"{kind} of integers runs as it is"
        # The kernel's rounding depends on which operand is repeated: the whole one always comes first.
        first, second = (a, b) if shape(a) == shape(node) else (b, a)
        if shape(first) != shape(node):
            return f"{kind} that repeats both operands runs in float"
        return IntegerForm(kind, (first, second))

    return rule


def _tensor(gm: GraphModule, node: Node) -> torch.Tensor:
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor)
    return value


def _is_float(node: Node) -> bool:
    return node.meta.get("dtype", torch.float32) == torch.float32


def _cat(node: Node, gm: GraphModule) -> Answer:
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    if not all(isinstance(p, Node) and _is_float(p) for p in parts):
        return "concatenation of integers runs as it is"
    axis = argument(node, 1, "dim", 0)
    nodes = tuple(_node(p) for p in parts)
    return IntegerForm("concat", nodes, {"axis": axis % len(shape(node))})


def _avg_pool(node: Node, gm: GraphModule) -> Answer:
    n = len(shape(node)) - 2
    kernel = _tuple(node.args[1], n)
    stride = _tuple(argument(node, 2, "stride") or kernel, n)
    if any(_tuple(argument(node, 3, "padding", 0), n)) or argument(node, 4, "ceil_mode", False):
        return "average pooling with padding or ceil mode runs in float"
    if argument(node, 6, "divisor_override") is not None:
        return "average pooling with a divisor of its own runs in float"
    if n not in (1, 2):
        return "3-d average pooling runs in float"
    return _pool(node, kernel, stride)


def _pool(node: Node, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Answer:
    return IntegerForm("avg_pool", (_node(node.args[0]),), {"kernel": list(kernel), "stride": list(stride)})


def _adaptive_avg_pool(node: Node, gm: GraphModule) -> Answer:
    source = _node(node.args[0])
    n = len(shape(node)) - 2
    sizes, wanted = shape(source)[2:], shape(node)[2:]
    if all(w == 1 for w in wanted):
        return IntegerForm("global_avg_pool", (source,))
    if any(s % w for s, w in zip(sizes, wanted, strict=True)) or n not in (1, 2):
        return f"adaptive average pooling from {sizes} to {wanted} has windows of several sizes and runs in float"
    kernel = tuple(s // w for s, w in zip(sizes, wanted, strict=True))
    return _pool(node, kernel, kernel)


def _mean(node: Node, gm: GraphModule) -> Answer:
    source = _node(node.args[0])
    rank = len(shape(source))
    dims = argument(node, 1, "dim")
    dims = (
        sorted(d % rank for d in (dims if isinstance(dims, list | tuple) else [dims]))
        if dims is not None
        else []
    )
    if rank < 3 or dims != list(range(2, rank)):
        return f"a mean over axes {dims or 'all'} runs in float; over all axes after the channels it would be integer"
    keep = bool(argument(node, 2, "keepdim", False))
    return IntegerForm("global_avg_pool", (source,), {} if keep else {"squeeze": True})


def _softmax(node: Node, gm: GraphModule) -> Answer:
    rank = len(shape(node))
    if argument(node, 1, "dim", -1) % rank != rank - 1:
        return "a softmax over another axis than the last runs in float"
    return IntegerForm("softmax", (_node(node.args[0]),), fixed=(FIXED_UNIT, 0))


def _sigmoid(node: Node, gm: GraphModule) -> Answer:
    return IntegerForm("table", (_node(node.args[0]),), fixed=(FIXED_UNIT, 0))


_RULES: dict[str, Callable[[Node, GraphModule], Answer]] = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "add": _elementwise("add"),
    "mul": _elementwise("mul"),
    "cat": _cat,
    "avg_pool": _avg_pool,
    "global_avg_pool": _adaptive_avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "mean": _mean,
    "softmax": _softmax,
    "sigmoid": _sigmoid,
}
