"""Matrix products, attention, softmax, concatenation and reductions, as ONNX nodes."""

import math
from typing import Any

import numpy as np

from fewbit.targets._onnx.floats_call import TYPES, Call, Rule, Value

_LOWEST = float(np.finfo(np.float32).min)


def _matmul(c: Call) -> str:
    other = c["other"] if "other" in c.arguments else c["mat2"]
    return c.node("MatMul", [c.cast(c["self"], c.dtype), c.cast(other, c.dtype)])


def _linear(c: Call) -> str:
    x, weight = c["input"], c["weight"]
    turned = c.node("Transpose", [weight], perm=[1, 0]) if c.rank(weight) == 2 else weight
    product = c.node("MatMul", [x, turned])
    return c.node("Add", [product, c["bias"]]) if c["bias"] is not None else product


def _einsum(c: Call) -> str:
    return c.node("Einsum", c["tensors"], equation=c["equation"])


def _sdpa(c: Call) -> str:
    """softmax(q k^T * scale + mask) v. Rows that a mask leaves nothing of are zero, as torch has them."""
    q, k, v = c["query"], c["key"], c["value"]
    keys, values = (_heads(c, t, q) if c["enable_gqa"] else t.name for t in (k, v))
    n = len(k.shape)
    turned = c.node("Transpose", [keys], perm=[*range(n - 2), n - 1, n - 2])
    scores = c.node("MatMul", [_scaled(c, q), turned])
    mask = Value(_causal(c, q, k), "bool") if c["is_causal"] else c["attn_mask"]
    if mask is None:
        weights = c.node("Softmax", [scores], axis=-1)
    elif mask.dtype == "bool":
        kept = c.node("Where", [mask, scores, c.constant(_LOWEST)])
        weights = c.node("Softmax", [kept], axis=-1)
        if not c["is_causal"]:
            weights = c.node("Where", [mask, weights, c.constant(0.0)])
    else:
        weights = c.node("Softmax", [c.node("Add", [scores, mask])], axis=-1)
        weights = c.node("Where", [c.node("IsNaN", [weights]), c.constant(0.0), weights])
    return c.node("MatMul", [weights, values])


def _scaled(c: Call, q: Value) -> str:
    scale, width = c["scale"], c.size(q, -1)
    if scale is None and isinstance(width, Value):
        return c.node("Div", [q, c.node("Sqrt", [c.cast(width, "float32")])])
    return c.node("Mul", [q, c.cast(1 / math.sqrt(width) if scale is None else scale, "float32")])


def _causal(c: Call, q: Value, k: Value) -> str:
    sizes = [c.size(t, -2) for t in (q, k)]
    if all(isinstance(s, int) for s in sizes):
        return c.constant(np.tril(np.ones(sizes, bool)), "bool")
    zero, one = c.constant(0, "int64"), c.constant(1, "int64")
    rows, columns = (c.node("Range", [zero, c.node("Squeeze", [c.vector([s])]), one]) for s in sizes)
    return c.node("GreaterOrEqual", [c.node("Unsqueeze", [rows, c.vector([1])]), columns])


def _heads(c: Call, value: Value, q: Value) -> str:
    """Each head of keys or values repeated for the queries that share it."""
    sizes, heads = c.sizes(value), c.size(q, -3)
    if isinstance(heads, int) and isinstance(sizes[-3], int):
        times: Any = heads // sizes[-3]
    else:
        times = Value(c.node("Div", [c.vector([heads]), c.vector([sizes[-3]])]), "int64", (1,), size=True)
    apart = c.node("Unsqueeze", [value, c.vector([-3])])
    copies = c.node("Expand", [apart, c.vector([1] * (len(sizes) - 2) + [times, 1, 1])])
    return c.reshape(copies, [*sizes[:-3], heads, *sizes[-2:]])


def _softmax(op_type: str) -> Rule:
    return lambda c: c.node(op_type, [c.cast(c["self"], c.dtype)], axis=c["dim"])


def _glu(c: Call) -> str:
    first, second = c.nodes("Split", [c["self"]], 2, axis=c["dim"], num_outputs=2)
    return c.node("Mul", [first, c.node("Sigmoid", [second])])


def _cat(c: Call) -> str:
    return c.node("Concat", [c.cast(t, c.dtype) for t in c["tensors"]], axis=c["dim"])


def _stack(c: Call) -> str:
    axis = c.vector([c["dim"]])
    return c.node(
        "Concat", [c.node("Unsqueeze", [c.cast(t, c.dtype), axis]) for t in c["tensors"]], axis=c["dim"]
    )


# ---- reductions ----


def _reduce(op_type: str) -> Rule:
    def rule(c: Call) -> str:
        x = c["self"]
        axes = c.axes(c.get("dim"), x)
        name = c.cast(x, c.dtype)
        if not axes:
            return c.node("Identity", [name])
        return c.node(op_type, [name, c.vector(axes)], keepdims=int(c.get("keepdim", False)))

    return rule


def _variance(root: bool) -> Rule:
    def rule(c: Call) -> str:
        x = c["self"]
        axes = c.axes(c.get("dim"), x)
        along = c.vector(axes)
        apart = c.node("Sub", [x, c.node("ReduceMean", [x, along], keepdims=1)])
        total = c.node("ReduceSumSquare", [apart, along], keepdims=int(c.get("keepdim", False)))
        correction = c["correction"] if "correction" in c.arguments else c["unbiased"]
        correction = 1.0 if correction is None else float(correction)
        count = c.count(x, axes)
        if isinstance(count, int):
            less = c.constant(max(count - correction, 0.0))
        else:
            less = c.node("Max", [c.node("Sub", [count, c.constant(correction)]), c.constant(0.0)])
        result = c.node("Div", [total, less])
        return c.node("Sqrt", [result]) if root else result

    return rule


def _arg(op_type: str) -> Rule:
    def rule(c: Call) -> str:
        x, dim = c["self"], c["dim"]
        if dim is not None:
            return c.node(op_type, [x], axis=dim, keepdims=int(c["keepdim"]))
        flat = c.node("Reshape", [x, c.vector([-1])])
        found = c.node(op_type, [flat], axis=0, keepdims=0)
        return c.reshape(found, [1] * c.rank(x)) if c["keepdim"] else found

    return rule


def _extreme(name: str) -> Rule:
    """max and min along a dimension: the values, and where they are."""

    def rule(c: Call) -> list[str]:
        keep = int(c["keepdim"])
        values = c.node(f"Reduce{name}", [c["self"], c.vector([c["dim"]])], keepdims=keep)
        return [values, c.node(f"Arg{name}", [c["self"]], axis=c["dim"], keepdims=keep)]

    return rule


def _cumsum(c: Call) -> str:
    return c.node("CumSum", [c.cast(c["self"], c.dtype), c.constant(c["dim"], "int64")])


def _topk(c: Call) -> list[str]:
    return c.nodes(
        "TopK", [c["self"], c.vector([c["k"]])], 2, axis=c["dim"], largest=int(c["largest"]), sorted=1
    )


def _norm(c: Call) -> str:
    order = float(c.get("ord", c.get("p", 2)) or 2)
    x = c["self"]
    axes, keep = c.axes(c.get("dim"), x), int(c.get("keepdim", False))
    if order in (1.0, 2.0):
        return c.node(f"ReduceL{order:.0f}", [x, c.vector(axes)], keepdims=keep)
    size = c.node("Abs", [x])
    if math.isinf(order):
        return c.node("ReduceMax" if order > 0 else "ReduceMin", [size, c.vector(axes)], keepdims=keep)
    powers = c.node("ReduceSum", [c.node("Pow", [size, c.constant(order)]), c.vector(axes)], keepdims=keep)
    return c.node("Pow", [powers, c.constant(1 / order)])


def _truth(op_type: str) -> Rule:
    """any and all, as the largest and the smallest of zeros and ones."""

    def rule(c: Call) -> str:
        x = c["self"]
        numbers = c.node("Cast", [c.cast(x, "bool")], to=TYPES["uint8"])
        reduced = c.node(
            op_type, [numbers, c.vector(c.axes(c.get("dim"), x))], keepdims=int(c.get("keepdim", False))
        )
        return c.node("Cast", [reduced], to=TYPES["bool"])

    return rule


def _overloads(name: str, rule: Rule, *overloads: str) -> dict[str, Any]:
    return {f"aten.{name}.{o}": rule for o in overloads}


RULES: dict[str, Rule] = {
    **_overloads("matmul", _matmul, "default"),
    **_overloads("mm", _matmul, "default"),
    **_overloads("bmm", _matmul, "default"),
    **_overloads("linear", _linear, "default"),
    **_overloads("einsum", _einsum, "default"),
    **_overloads("scaled_dot_product_attention", _sdpa, "default"),
    **_overloads("softmax", _softmax("Softmax"), "int"),
    **_overloads("_softmax", _softmax("Softmax"), "default"),
    **_overloads("log_softmax", _softmax("LogSoftmax"), "int"),
    **_overloads("glu", _glu, "default"),
    **_overloads("cat", _cat, "default"),
    **_overloads("stack", _stack, "default"),
    **_overloads("mean", _reduce("ReduceMean"), "dim", "default"),
    **_overloads("sum", _reduce("ReduceSum"), "dim_IntList", "default"),
    **_overloads("prod", _reduce("ReduceProd"), "dim_int", "default"),
    **_overloads("amax", _reduce("ReduceMax"), "default"),
    **_overloads("amin", _reduce("ReduceMin"), "default"),
    **_overloads("logsumexp", _reduce("ReduceLogSumExp"), "default"),
    **_overloads("max", _extreme("Max"), "dim"),
    **_overloads("min", _extreme("Min"), "dim"),
    **_overloads("max", _reduce("ReduceMax"), "default"),
    **_overloads("min", _reduce("ReduceMin"), "default"),
    **_overloads("var", _variance(False), "default", "dim", "correction"),
    **_overloads("std", _variance(True), "default", "dim", "correction"),
    **_overloads("argmax", _arg("ArgMax"), "default"),
    **_overloads("argmin", _arg("ArgMin"), "default"),
    **_overloads("cumsum", _cumsum, "default"),
    **_overloads("topk", _topk, "default"),
    **_overloads("linalg_vector_norm", _norm, "default"),
    **_overloads("norm", _norm, "ScalarOpt_dim", "Scalar"),
    **_overloads("any", _truth("ReduceMax"), "default", "dim", "dims"),
    **_overloads("all", _truth("ReduceMin"), "default", "dim", "dims"),
}
