"""Matrix products, attention and normalization layers, in terms of what LiteRT has an operator for."""

import math

import torch
from torch import Tensor

from fewbit.targets._litert.expand import Call, Expand, Value
from fewbit.targets._litert.floats_fallback import decomposed

_LOWEST = float(torch.finfo(torch.float32).min)
_EPSILON = 2.0**-23  # torch's default for RMSNorm: that of float32


def _matmul(c: Call) -> Value:
    return product(c, c.tensor(c.args[0], c.dtype), c.tensor(c.args[1], c.dtype))


def product(c: Call, a: Value, b: Value, turned: bool = False) -> Value:
    """The product of two stacks of matrices (vectors too); ``turned``: of the second one's transpose."""
    if a.rank == 1 or b.rank == 1:
        return _vectors(c, a, b, turned)
    if b.rank == 2 and b.name in c.expansion.constants:
        weight = c.expansion.constants[b.name]
        return linear(c, a, weight if turned else weight.t().contiguous())
    return c("einsum.default", "...ij,...kj->...ik" if turned else "...ij,...jk->...ik", [a, b])


def linear(
    c: Call, x: Value, weight: Tensor, bias: Tensor | None = None, source: str | None = None,
    rows: Tensor | None = None,
) -> Value:  # fmt: skip
    """x W^T + b by a linear layer. ``source``: the parameter of the operation that the weight is, with its codes;
    ``rows``: the order in which its rows are wanted."""
    count, columns = weight.shape
    config = {"in_features": columns, "out_features": count, "bias": bias is not None}
    parts = {"weight": weight} if source is None else c.coded(source, rows)
    if bias is not None:
        parts["bias"] = bias
    return c.module("Linear", x, config, parts, (*x.shape[:-1], count), source)


def _vectors(c: Call, a: Value, b: Value, turned: bool) -> Value:
    first = c("unsqueeze.default", a, 0) if a.rank == 1 else a
    second = c("unsqueeze.default", b, 0 if turned else 1) if b.rank == 1 else b
    result = product(c, first, second, turned)
    gone = [result.rank - 2] * (a.rank == 1) + [result.rank - 1] * (b.rank == 1)
    return c("squeeze.dims", result, gone)


def _linear(c: Call) -> Value:
    result = product(c, c["input"], c["weight"], turned=True)
    return c("add.Tensor", result, c["bias"]) if c.get("bias") is not None else result


def _bmm_bias(c: Call) -> Value:
    """beta * input + alpha * a @ b"""
    result = product(c, c["batch1"] if "batch1" in c.arguments else c["mat1"],
                     c["batch2"] if "batch2" in c.arguments else c["mat2"])  # fmt: skip
    if c["alpha"] != 1:
        result = c("mul.Tensor", result, c["alpha"])
    bias = c["self"] if c["beta"] == 1 else c("mul.Tensor", c["self"], c["beta"])
    return c("add.Tensor", result, bias)


def _einsum(c: Call) -> Value | None:
    """Of two tensors: axes are brought to batch, rows and columns, for one matrix product."""
    tensors = c["tensors"]
    inputs, _, output = str(c["equation"]).replace(" ", "").partition("->")
    names = inputs.split(",")
    letters = "".join(names) + output
    if len(tensors) != 2 or not letters.isalpha() or any(len(set(n)) != len(n) for n in (*names, output)):
        if c["equation"] in ("...ij,...kj->...ik", "...ij,...jk->...ik"):
            return None
        return decomposed(c)
    return _contracted(c, list(tensors), names, output)


def _contracted(c: Call, tensors: list[Value], names: list[str], output: str) -> Value:
    for i in range(2):  # what only one tensor has and the result has not is summed first
        alone = [a for a, n in enumerate(names[i]) if n not in names[1 - i] and n not in output]
        if alone:
            tensors[i] = c("sum.dim_IntList", tensors[i], alone, False)
            names[i] = "".join(n for a, n in enumerate(names[i]) if a not in alone)
    size = {
        n: s for t, letters in zip(tensors, names, strict=True) for n, s in zip(letters, t.shape, strict=True)
    }
    both = [n for n in names[0] if n in names[1]]
    batch, inner = [n for n in both if n in output], [n for n in both if n not in output]
    rows, columns = ([n for n in names[i] if n not in both] for i in range(2))
    left = _arranged(c, tensors[0], names[0], batch, rows, inner, size)
    right = _arranged(c, tensors[1], names[1], batch, columns, inner, size)
    result = product(c, left, right, turned=True)
    order = [*batch, *rows, *columns]
    result = c.reshape(result, [size[n] for n in order])
    axes = [order.index(n) for n in output]
    return result if axes == sorted(axes) else c("permute.default", result, axes)


def _arranged(
    c: Call, x: Value, names: str, batch: list[str], kept: list[str], inner: list[str], size: dict[str, int]
) -> Value:
    """[batch ..., kept, inner]"""
    axes = [names.index(n) for n in (*batch, *kept, *inner)]
    if axes != sorted(axes):
        x = c("permute.default", x, axes)
    sizes = [math.prod(size[n] for n in part) for part in (kept, inner)]
    return c.reshape(x, [*(size[n] for n in batch), *sizes]) if len(kept) != 1 or len(inner) != 1 else x


def _sdpa(c: Call) -> Value:
    """softmax(q k^T * scale + mask) v. Rows that a mask leaves nothing of are zero, as torch has them."""
    q, k, v = c["query"], c["key"], c["value"]
    if c["enable_gqa"]:
        k, v = (_heads(c, t, q) for t in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if c["scale"] is None else float(c["scale"])
    scores = product(c, c("mul.Tensor", q, scale), k, turned=True)
    mask = c["attn_mask"]
    if c["is_causal"]:
        kept = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        mask = c.constant(torch.where(kept, 0.0, _LOWEST))
        weights = c("softmax.int", c("add.Tensor", scores, mask), -1)
    elif mask is None:
        weights = c("softmax.int", scores, -1)
    elif mask.dtype == torch.bool:
        weights = c("softmax.int", c("where.self", mask, scores, c.constant(_LOWEST)), -1)
        weights = c("where.self", mask, weights, c.constant(0.0))
    else:  # the mask's minus infinity would make NaN of a whole row
        shifted = c("clamp_min.default", c("add.Tensor", scores, mask), _LOWEST)
        seen = c("to.dtype", c("gt.Scalar", shifted, _LOWEST), torch.float32)
        weights = c("mul.Tensor", c("softmax.int", shifted, -1), seen)
    return product(c, weights, v)


def _heads(c: Call, value: Value, q: Value) -> Value:
    """Each head of keys or values repeated for the queries that share it."""
    times, rank = q.shape[-3] // value.shape[-3], value.rank
    heads = [c("slice.Tensor", value, rank - 3, i, i + 1, 1) for i in range(value.shape[-3])]
    return c("cat.default", [h for h in heads for _ in range(times)], rank - 3)


# ---- normalization --------------------------------------------------------------------------------------------------


def normalized(c: Call, x: Value, axes: list[int], eps: float) -> Value:
    """(x - mean) / sqrt(variance + eps) over some axes."""
    apart = c("sub.Tensor", x, c("mean.dim", x, axes, True))
    variance = c("mean.dim", c("square.default", apart), axes, True)
    return c("mul.Tensor", apart, c("rsqrt.default", c("add.Tensor", variance, eps)))


def _affine(c: Call, x: Value, shape: tuple[int, ...]) -> Value:
    if "weight" in c.constants:
        x = c("mul.Tensor", x, c.constant(c.parameter("weight", shape)))
    return c("add.Tensor", x, c.constant(c.parameter("bias", shape))) if "bias" in c.constants else x


def _layer_norm(c: Call) -> Value:
    shape = tuple(c["normalized_shape"])
    axes = list(range(c.x.rank - len(shape), c.x.rank))
    return _affine(c, normalized(c, c.x, axes, c["eps"]), shape)


def _group_norm(c: Call) -> Value:
    n, channels, *spatial = c.x.shape
    groups, rest = c["num_groups"], channels // c["num_groups"] * math.prod(spatial)
    apart = c.reshape(c.x, [n, groups, rest])
    back = c.reshape(normalized(c, apart, [2], c["eps"]), list(c.x.shape))
    return _affine(c, back, (channels, *[1] * len(spatial)))


def _instance_norm(c: Call) -> Value:
    rank = int(c.op.attrs["type"][-2]) + 2
    shape = (c["num_features"], *[1] * (rank - 2))
    if "running_mean" in c.constants:
        return _scaled(c, shape)
    axes = list(range(c.x.rank - rank + 2, c.x.rank))
    return _affine(c, normalized(c, c.x, axes, c["eps"]), shape)


def _batch_norm(c: Call) -> Value:
    if "running_mean" not in c.constants:
        raise c.error("a batch norm without running statistics; use track_running_stats=True")
    return _scaled(c, (c["num_features"], *[1] * (c.x.rank - 2)))


def _scaled(c: Call, shape: tuple[int, ...]) -> Value:
    scale, shift = batch_norm_scale(c.constants, c["eps"])
    scaled = c("mul.Tensor", c.x, c.constant(scale.reshape(shape)))
    return c("add.Tensor", scaled, c.constant(shift.reshape(shape)))


def batch_norm_scale(constants: dict[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """A batch norm as a factor and a term for each channel, computed in float64."""
    mean, variance = constants["running_mean"].double(), constants["running_var"].double()
    factor = 1 / torch.sqrt(variance + eps)
    if "weight" in constants:
        factor = factor * constants["weight"].double()
    term = -mean * factor
    if "bias" in constants:
        term = term + constants["bias"].double()
    return factor.float(), term.float()


def _rms_norm(c: Call) -> Value:
    shape = tuple(c["normalized_shape"])
    axes = list(range(c.x.rank - len(shape), c.x.rank))
    eps = _EPSILON if c.get("eps") is None else c["eps"]
    mean = c("mean.dim", c("square.default", c.x), axes, True)
    return _affine(c, c("mul.Tensor", c.x, c("rsqrt.default", c("add.Tensor", mean, eps))), shape)


def _prelu_layer(c: Call) -> Value:
    slope = c.parameter("weight")
    return _prelu_by(c, c.x, c.constant(slope.reshape(-1, *[1] * max(c.x.rank - 2, 0))))


def _prelu(c: Call) -> Value:
    weight: Value = c["weight"]
    if c.x.rank > 2 and weight.shape != (1,):
        weight = c("reshape.default", weight, [-1, *[1] * (c.x.rank - 2)])
    return _prelu_by(c, c.x, weight)


def _prelu_by(c: Call, x: Value, slope: Value) -> Value:
    below = c("mul.Tensor", c("clamp_max.default", x, 0.0), slope)
    return c("add.Tensor", c("relu.default", x), below)


PRODUCTS: dict[str, Expand] = {
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.linear.default": _linear,
    "aten.addmm.default": _bmm_bias,
    "aten.baddbmm.default": _bmm_bias,
    "aten.einsum.default": _einsum,
    "aten.scaled_dot_product_attention.default": _sdpa,
    "aten.prelu.default": _prelu,
    "module.LayerNorm": _layer_norm,
    "module.GroupNorm": _group_norm,
    "module.RMSNorm": _rms_norm,
    "module.PReLU": _prelu_layer,
    **{f"module.InstanceNorm{n}d": _instance_norm for n in (1, 2, 3)},
    **{f"module.BatchNorm{n}d": _batch_norm for n in (1, 2, 3)},
}
