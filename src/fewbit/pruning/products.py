"""Coupling through operators of two tensors, and through functions of single numbers."""

import math
from typing import Any

from torch import fx

from fewbit.pruning.coupling import Coupling, Work, name_of, rule, shape_of
from fewbit.pruning.labels import Axes, Axis

_UNARY = (
    "relu", "relu6", "hardtanh", "clamp", "pow", "cast", "dropout", "hardswish", "hardsigmoid", "silu", "gelu", "elu",
    "celu", "selu", "mish", "softplus", "log_sigmoid", "sigmoid", "tanh", "leaky_relu", "threshold", "hardshrink",
    "softshrink", "exp", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "sign", "square",
    "sin", "cos", "erf", "floor", "ceil", "round",
)  # fmt: skip


@rule(*_UNARY)
def unary(c: Coupling, node: fx.Node) -> Any:
    return c.values[node.all_input_nodes[0]]


@rule("add", "sub", "mul", "div", "where")
def elementwise(c: Coupling, node: fx.Node) -> Axes:
    """Index by index; what is repeated along an axis has a size of one there and no labels."""
    sources = [each for each in node.all_input_nodes if "shape" in each.meta]
    return broadcast(c, node, [(c.axes(each), shape_of(each)) for each in sources], shape_of(node))


def broadcast(
    c: Coupling, node: fx.Node, operands: list[tuple[Axes, tuple[int, ...]]], shape: tuple[int, ...]
) -> Axes:
    out: list[Axis] = []
    for back in range(len(shape), 0, -1):
        aligned = [
            axes[-back]
            for axes, sizes in operands
            if len(sizes) >= back and (sizes[-back] > 1 or shape[-back] == 1)
        ]
        common = aligned[0] if aligned else None
        for axis in aligned[1:]:
            common = c.unite(common, axis, node)
        out.append(common)
    return tuple(out)


@rule("matmul")
def matmul(c: Coupling, node: fx.Node) -> Axes:
    a: Any
    b: Any
    a, b = node.args[:2]
    left, right, sizes, other = c.axes(a), c.axes(b), shape_of(a), shape_of(b)
    inner = c.unite(left[-1], right[max(len(right) - 2, 0)], node)
    c.contract(node, a, len(left) - 1, inner)
    c.contract(node, b, max(len(right) - 2, 0), inner)
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    shape = shape_of(node)
    outer = shape[: len(shape) - len(rows) - len(columns)]
    batch = broadcast(c, node, [(left[:-2], sizes[:-2]), (right[:-2], other[:-2])], outer)
    out = (*batch, *rows, *columns)
    c.work.append(Work(node, math.prod(shape) * sizes[-1], (*out, inner)))
    return out


@rule("sdpa")
def attention(c: Coupling, node: fx.Node) -> Any:
    """Heads leave whole; scores are divided by a root of their length, which therefore stays."""
    sources: Any = node.args[:3]
    if len({shape_of(each)[:-2] for each in sources}) > 1:
        return c.mixed(node, f"{name_of(node)} shares keys among heads")
    query, key, value = (c.axes(each) for each in sources)
    reason = f"{name_of(node)} scales scores by their length"
    c.freeze((query[-1], key[-1]), reason)
    c.unite(key[-2], value[-2], node)
    c.labels.freeze(key[-2], f"{name_of(node)} takes a softmax over them")
    outer = [
        c.unite(c.unite(q, k, node), v, node)
        for q, k, v in zip(query[:-2], key[:-2], value[:-2], strict=True)
    ]
    for mask in node.all_input_nodes:
        if mask not in sources:
            scores = (*shape_of(sources[0])[:-1], shape_of(sources[1])[-2])
            broadcast(
                c, node, [((*outer, query[-2], key[-2]), scores), (c.axes(mask), shape_of(mask))], scores
            )
    shape, long = shape_of(sources[0]), shape_of(sources[1])[-2]
    macs = math.prod(shape[:-1]) * long
    c.work.append(Work(node, macs * shape[-1], (*outer, query[-2])))
    c.work.append(Work(node, macs * shape_of(sources[2])[-1], (*outer, query[-2], value[-1])))
    return (*outer, query[-2], value[-1])


@rule("einsum")
def einsum(c: Coupling, node: fx.Node) -> Any:
    sources: Any = node.args[1]
    terms, _, out = str(node.args[0]).replace(" ", "").partition("->")
    if "..." in terms or not out:
        return c.mixed(node, f"{name_of(node)} has an open equation")
    found: dict[str, Axis] = {}
    count: dict[str, int] = {}
    sizes: dict[str, int] = {}
    split = terms.split(",")
    for term, source in zip(split, sources, strict=True):
        for letter, axis, size in zip(term, c.axes(source), shape_of(source), strict=True):
            found[letter] = c.unite(found[letter], axis, node) if letter in found else axis
            count[letter] = count.get(letter, 0) + 1
            sizes[letter] = size
    for term, source in zip(split, sources, strict=True):
        for dim, letter in enumerate(term):
            if letter in out:
                continue
            if count[letter] > 1:
                c.contract(node, source, dim, found[letter])
            else:
                c.labels.freeze(found[letter], f"{name_of(node)} adds them up")
    c.work.append(Work(node, math.prod(sizes.values()) * (len(split) - 1), tuple(found.values())))
    return tuple(found[letter] for letter in out)
