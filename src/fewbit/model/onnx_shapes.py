"""ONNX operators that say, compute or change shapes; arithmetic of sizes is done on numbers, not on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.model import onnx_sizes
from fewbit.model.onnx_build import LARGEST, Constant, Function, Sizes, Value, tensor_of
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_functions import size_operand

Rule = Callable[[Call], Any]


def torch_dtype(c: Call, number: int) -> torch.dtype:
    """The torch type of an ONNX type; floats of any precision are float32."""
    import onnx

    kind = onnx.TensorProto.DataType.Name(number) if number in onnx.TensorProto.DataType.values() else "?"
    if kind in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"):
        return torch.float32
    known = {"BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8"}
    if kind not in known:
        raise c.error(f"the type {kind}: expected float32, an integer of 8 to 64 bits or bool")
    dtype: torch.dtype = getattr(torch, kind.lower())
    return dtype


# ---- shapes as values -------------------------------------------------------------------------------------


def _shape(c: Call) -> Any:
    if c.is_size(0):
        return Constant(np.array(c.shape(0), np.int64)[c.attr("start", 0) : c.attr("end")], "")
    return c.apply(onnx_sizes.shape_of, c.raw(0), start=c.attr("start", 0), end=c.attr("end"))


def _size(c: Call) -> Any:
    if c.is_size(0):
        return Constant(np.array(math.prod(c.shape(0)), np.int64), "")
    return c.apply(onnx_sizes.count_of, c.raw(0))


def _cast(c: Call) -> Any:
    dtype = torch_dtype(c, int(c.attr("to", 0)))
    if c.is_size(0):
        return c.apply(onnx_sizes.cast, c.raw(0), dtype=dtype)
    operand = c[0]
    if not isinstance(operand, Constant) and operand.example.dtype == dtype:
        return operand
    return c.apply(Tensor.to, operand, dtype=dtype)


def _constant(c: Call) -> Any:
    attrs = c.node.attrs
    for name, dtype in (("value", None), ("value_int", np.int64), ("value_ints", np.int64),
                        ("value_float", np.float32), ("value_floats", np.float32)):  # fmt: skip
        if name in attrs:
            return Constant(np.asarray(attrs[name], dtype), c.node.outputs[0])
    raise c.error("it holds no numbers: expected a tensor or numbers")


def _constant_of_shape(c: Call) -> Any:
    value = np.asarray(c.attr("value", np.zeros(1, np.float32))).reshape(-1)
    if value.size != 1:
        raise c.error(f"a value of {value.size} elements: expected one")
    shape = c.raw(0)
    if isinstance(shape, Constant):
        sizes = tuple(int(s) for s in shape.array.reshape(-1))
        _check_count(c, sizes)
        return Constant(np.full(sizes, value[0]), "")
    return _maybe_zero(c, c.apply(_filled, c.sizes(0), value=value[0].item(), dtype=tensor_of(value).dtype))


def _maybe_zero(c: Call, result: Value) -> Value:
    """Remembers tensors of zeros: recurrent layers start with them, and torch's need not be told."""
    function = c.builder.root.get_submodule(str(result.node.target))
    if isinstance(function, Function) and function.settings.get("value") == 0:
        c.builder.zeros.add(result.node)
    return result


def _check_count(c: Call, sizes: tuple[int, ...]) -> None:
    if any(s < 0 for s in sizes) or math.prod(sizes) > LARGEST:
        raise c.error(f"a tensor of shape {list(sizes)}, more than fewbit reads a model with")


def _filled(shape: Any, *, value: Any, dtype: torch.dtype) -> Tensor:
    sizes = onnx_sizes.listed(shape)
    return torch.zeros(sizes, dtype=dtype) if value == 0 else torch.full(sizes, value, dtype=dtype)


def _range(c: Call) -> Any:
    known = [c.known(i) for i in range(3)]
    if all(k is not None for k in known):
        start, limit, delta = (k.item() for k in known if k is not None)
        count = math.ceil((limit - start) / delta) if delta else LARGEST + 1
        _check_count(c, (max(0, count),))
        dtype = known[0].dtype  # type: ignore[union-attr]
        return Constant((start + np.arange(max(0, count)) * delta).astype(dtype), "")
    return c.apply(_counted, *(c.sizes(i) for i in range(3)))


def _counted(start: Any, limit: Any, delta: Any) -> Tensor:
    return torch.arange(*(onnx_sizes.listed(v)[0] for v in (start, limit, delta)))


# ---- changes of shape, for tensors and for vectors of sizes -----------------------------------------------


def _reshape(c: Call) -> Any:
    keep = not c.attr("allowzero", 0)
    if c.is_size(0):
        return c.apply(
            lambda x, shape: x.reshape([int(s) for s in onnx_sizes.listed(shape)]), c.raw(0), c.sizes(1)
        )
    shape = c.sizes(1)
    if isinstance(shape, Sizes) and shape.values.size and c.keeps_batch(0):
        wanted = onnx_sizes.listed(shape.values)
        if wanted[0] == c.shape(0)[0] and (keep or 0 not in wanted):  # the batch size, which may become free
            keep, shape = True, Sizes(onnx_sizes.sizes([0, *wanted[1:]]))
    return c.apply(_reshaped, c[0], shape, zero_keeps=keep)


def _reshaped(x: Tensor, shape: Any, *, zero_keeps: bool) -> Tensor:
    wanted = [
        x.shape[i] if zero_keeps and isinstance(s, int) and s == 0 else s
        for i, s in enumerate(onnx_sizes.listed(shape))
    ]
    return x.reshape(wanted)


def _flatten(c: Call) -> Any:
    rank = c.rank(0)
    axis = int(c.attr("axis", 1))
    if not -rank <= axis <= rank:
        raise c.error(f"axis {axis} of a tensor of {rank} dimensions")
    axis = axis + rank if axis < 0 else axis
    if axis == 1 and rank > 1:
        return c.apply(torch.flatten, c[0], start_dim=1)
    return c.apply(_two_sided, c[0], axis=axis)


def _two_sided(x: Tensor, *, axis: int) -> Tensor:
    rows, columns = math.prod(x.shape[:axis]), math.prod(x.shape[axis:])
    return x.reshape(rows, columns)


def _squeeze(c: Call) -> Any:
    axes = c.axes(1)
    if c.is_size(0):
        return c.apply(lambda x: onnx_sizes.scalar(onnx_sizes.listed(x)[0]) if x.size == 1 else x, c.raw(0))
    rank = c.rank(0)
    dims = (
        [i for i, s in enumerate(c.shape(0)) if s == 1] if axes is None else [c.axis(a, rank) for a in axes]
    )
    if any(c.shape(0)[d] != 1 for d in dims):
        raise c.error(f"axes {dims} of shape {list(c.shape(0))}: expected sizes of 1")
    return c.apply(torch.squeeze, c[0], dim=tuple(dims))


def _unsqueeze(c: Call) -> Any:
    axes = c.axes(1)
    if axes is None:
        raise c.error("its axes are missing")
    if c.is_size(0):
        return c.apply(lambda x: x.reshape(1) if not x.ndim else x.reshape(1, -1), c.raw(0))
    rank = c.rank(0) + len(axes)
    return c.apply(_with_axes, c[0], axes=sorted(c.axis(a, rank) for a in axes))


def _with_axes(x: Tensor, *, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


def _concat(c: Call) -> Any:
    indices = range(len(c.operands))
    if c.is_size(*indices):
        return c.apply(lambda *parts: np.concatenate(parts), *(size_operand(c, i) for i in indices))
    if len(indices) == 1:
        return c.raw(0)
    axis = c.axis(int(c.attr("axis", 1)), c.rank(0))
    return c.apply(_joined, *(c[i] for i in indices), axis=axis)


def _joined(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def _split(c: Call) -> Any:
    count = len(c.node.outputs)
    axis = c.axis(int(c.attr("axis", 0)), c.rank(0))
    given = c.attr("split")
    if given is None and c.has(1):
        given = c.fixed(1, "sizes").reshape(-1).tolist()
    if given is None:
        whole = c.shape(0)[axis]
        largest = -(-whole // count)
        given = [largest] * (count - 1) + [whole - largest * (count - 1)]
    if len(given) != count or any(g < 0 for g in given):
        raise c.error(f"split {list(given)} into {count} outputs")
    if c.is_size(0):
        return c.apply_many(lambda x, ends: np.split(x, ends), count, c.raw(0), ends=np.cumsum(given)[:-1])
    return c.apply_many(torch.split, count, c[0], split_size_or_sections=list(given), dim=axis)


def _slice(c: Call) -> Any:
    if c.version < 10:
        starts, ends = (Sizes(onnx_sizes.sizes(c.attr(n, []))) for n in ("starts", "ends"))
        axes = c.attr("axes")
        steps: Any = None
    else:
        starts, ends = c.sizes(1), c.sizes(2)
        axes = c.fixed(3, "axes").reshape(-1).tolist() if c.has(3) else None
        steps = [int(s) for s in c.fixed(4, "steps").reshape(-1)] if c.has(4) else None
    count = len(starts.values) if isinstance(starts, Sizes) else len(starts.example)
    rank = c.rank(0)
    axes = [c.axis(int(a), rank) for a in (range(count) if axes is None else axes)]
    steps = steps or [1] * count
    if len(axes) != count or len(steps) != count or 0 in steps:
        raise c.error(f"axes {axes} and steps {steps} for {count} starts")
    if c.is_size(0):
        return c.apply(_sliced_sizes, c.raw(0), starts, ends, steps=steps)
    return c.apply(_sliced, c[0], starts, ends, axes=axes, steps=steps)


def _sliced_sizes(x: Any, starts: Any, ends: Any, *, steps: list[int]) -> Any:
    for start, end, step in zip(onnx_sizes.listed(starts), onnx_sizes.listed(ends), steps, strict=True):
        x = x[int(start) : (None if step < 0 and int(end) < -len(x) else int(end)) : step]
    return x


def _sliced(x: Tensor, starts: Any, ends: Any, *, axes: list[int], steps: list[int]) -> Tensor:
    bounds = zip(axes, onnx_sizes.listed(starts), onnx_sizes.listed(ends), steps, strict=True)
    for axis, start, end, step in bounds:
        x = _backwards(x, axis, start, end, step) if step < 0 else _forwards(x, axis, start, end, step)
    return x


def _forwards(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    index = [slice(None)] * x.dim()
    endless = isinstance(end, int) and end >= 2**31 - 1
    index[axis] = slice(start, None if endless else end, step)
    return x[tuple(index)]


def _backwards(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    """Numbers in reverse order: torch has no negative steps, so the flipped tensor is sliced."""
    size = x.shape[axis]
    start, end = (v + size if isinstance(v, int) and -size <= v < 0 else v for v in (start, end))
    first = 0 if isinstance(start, int) and start >= size else size - 1 - start
    last = None if isinstance(end, int) and end < 0 else size - 1 - end
    return _forwards(x.flip(axis), axis, first, 2**62 if last is None else last, -step)


def _transpose(c: Call) -> Any:
    rank = c.rank(0)
    if c.is_size(0):
        return c.raw(0)
    order = c.attr("perm") or list(range(rank))[::-1]
    if sorted(order) != list(range(rank)):
        raise c.error(f"perm {list(order)} of a tensor of {rank} dimensions")
    return c.apply(torch.permute, c[0], dims=tuple(order))


def _expand(c: Call) -> Any:
    if c.is_size(0):
        return c.apply(
            lambda x, shape: np.broadcast_to(
                x, np.broadcast_shapes(x.shape, tuple(onnx_sizes.listed(shape)))
            ),
            c.raw(0),
            c.sizes(1),
        )
    shape = c.sizes(1)
    values = c.known(0)
    if values is not None and isinstance(shape, Value) and values.size and (values == values.flat[0]).all():
        dtype = tensor_of(values.reshape(-1)[:1]).dtype
        settings: dict[str, Any] = {"own": values.shape, "value": values.flat[0].item(), "dtype": dtype}
        return _maybe_zero(c, c.apply(_filled_over, shape, **settings))
    return c.apply(_expanded, c[0], shape)


def _filled_over(shape: Any, *, own: tuple[int, ...], value: Any, dtype: torch.dtype) -> Tensor:
    """An expanded constant of equal numbers, such as the initial state of a recurrent layer."""
    wanted = onnx_sizes.listed(shape)
    depth = max(len(wanted), len(own))
    wanted, sizes = [1] * (depth - len(wanted)) + wanted, [1] * (depth - len(own)) + list(own)
    sizes = [o if isinstance(w, int) and w == 1 else w for o, w in zip(sizes, wanted, strict=True)]
    return _filled(onnx_sizes.sizes(sizes), value=value, dtype=dtype)


def _expanded(x: Tensor, shape: Any) -> Tensor:
    """Broadcasting both ways: a size of 1 keeps the tensor's own."""
    wanted = onnx_sizes.listed(shape)
    wanted = [1] * (x.dim() - len(wanted)) + wanted
    own = [1] * (len(wanted) - x.dim()) + list(x.shape)
    return x.expand([o if isinstance(w, int) and w == 1 else w for o, w in zip(own, wanted, strict=True)])


def _tile(c: Call) -> Any:
    if c.is_size(0):
        return c.apply(
            lambda x, repeats: np.tile(x, [int(r) for r in onnx_sizes.listed(repeats)]), c.raw(0), c.sizes(1)
        )
    return c.apply(lambda x, repeats: x.repeat(onnx_sizes.listed(repeats)), c[0], c.sizes(1))


def _identity(c: Call) -> Any:
    return c.raw(0)


RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Cast": _cast,
    "CastLike": lambda c: c.apply(lambda x, y: x.to(y.dtype), c[0], c[1]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Identity": _identity,
}
