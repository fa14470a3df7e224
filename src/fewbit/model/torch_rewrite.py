"""The operators without parameters, as tables: what vanishes, and which few canonical forms the rest take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fewbit.model.torch_build import Constant, sizes
from fewbit.model.torch_convert import Bound, Converter

aten = torch.ops.aten
Rewrite = Callable[[Converter, fx.Node, Bound], Any]
END = 2**62  # slices without an end say 2**63 - 1

DROPPED: frozenset[Any] = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def _val(old: Any) -> Any:
    return old.meta["val"]


def _rename(target: Any) -> Rewrite:
    """The same arguments under another name."""
    return lambda c, node, a: c.emit(target, c.arg(node.args), node, c.arg(node.kwargs))


def _identity(c: Converter, node: fx.Node, a: Bound) -> Any:
    """Nothing, if neither dtype nor shape changes."""
    before, after = _val(node.args[0]), _val(node)
    if before.dtype == after.dtype and same_shape(before, after):
        return c.get(node.args[0])
    return None


def same_shape(first: Any, second: Any) -> bool:
    """Equal sizes, symbolic ones as expressions."""
    return [str(s) for s in sizes(first)] == [str(s) for s in sizes(second)]


def _cast(c: Converter, node: fx.Node, a: Bound) -> Any:
    same = _identity(c, node, a)
    return same if same is not None else c.emit(aten.to.dtype, (c.arg(node.args[0]), _val(node).dtype), node)


def _size(c: Converter, node: fx.Node, a: Bound) -> Any:
    """A size: the number where it is one, else the size of the input that it comes from."""
    value = sizes(_val(node.args[0]))[node.args[1]]  # type: ignore[index]
    return Constant(value, None, None, node, False) if isinstance(value, int) else c.size(value, node)


def _reshape(c: Converter, node: fx.Node, a: Bound) -> Any:
    same = _identity(c, node, a)
    return same if same is not None else c.reshaped(c.arg(node.args[0]), node)


def _flatten(c: Converter, node: fx.Node, a: Bound) -> Any:
    same = _identity(c, node, a)
    return same if same is not None else c.emit(
        aten.flatten.using_ints, (c.arg(a["self"]), a["start_dim"], a["end_dim"]), node)  # fmt: skip


def _squeeze(c: Converter, node: fx.Node, a: Bound) -> Any:
    shape = sizes(_val(a["self"]))
    wanted = a.get("dim", range(len(shape)))
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    dims = [d for d in wanted if isinstance(shape[d], int) and shape[d] == 1]
    return c.emit(aten.squeeze.dims, (c.arg(a["self"]), dims), node) if dims else c.get(a["self"])


def _swap(first: int, second: int) -> Rewrite:
    return lambda c, node, a: c.emit(aten.transpose.int, (c.arg(node.args[0]), first, second), node)


def _reverse(c: Converter, node: fx.Node, a: Bound) -> Any:
    return c.emit(aten.permute.default, (c.arg(node.args[0]), list(range(_val(node).dim()))[::-1]), node)


def _movedim(c: Converter, node: fx.Node, a: Bound) -> Any:
    rank = _val(node).dim()
    pairs = [[d] if isinstance(d, int) else list(d) for d in (a["source"], a["destination"])]
    moves = {to % rank: source % rank for source, to in zip(*pairs, strict=True)}
    rest = iter(d for d in range(rank) if d not in moves.values())
    order = [moves[d] if d in moves else next(rest) for d in range(rank)]
    return c.emit(aten.permute.default, (c.arg(node.args[0]), order), node)


def _slice(c: Converter, node: fx.Node, a: Bound) -> Any:
    start, end, step = a["start"] or 0, a["end"], a["step"]
    if (
        isinstance(start, int)
        and start == 0
        and step == 1
        and (end is None or (isinstance(end, int) and end > END))
    ):
        return c.get(a["self"])
    return c.emit(
        aten.slice.Tensor,
        c.arg((a["self"], a["dim"], start, END * 2 - 1 if end is None else end, step)),
        node,
    )


def _narrow(c: Converter, node: fx.Node, a: Bound) -> Any:
    if not (isinstance(a["start"], int) and isinstance(a["length"], int)):
        return None
    return c.emit(
        aten.slice.Tensor, (c.arg(a["self"]), a["dim"], a["start"], a["start"] + a["length"], 1), node
    )


def _split(c: Converter, node: fx.Node, a: Bound) -> Any:
    """split, chunk, tensor_split: split_with_sizes where the sizes are numbers."""
    dim = a["dim"]
    lengths = [sizes(part)[dim] for part in _val(node)]
    if not all(isinstance(length, int) for length in lengths):
        return None
    return c.emit(aten.split_with_sizes.default, (c.arg(node.args[0]), lengths, dim), node)


def _unbind(c: Converter, node: fx.Node, a: Bound) -> Any:
    x = c.arg(a["self"])
    return [c.emit(aten.select.int, (x, a["dim"], i), node, final=False) for i in range(len(_val(node)))]


def _stack(c: Converter, node: fx.Node, a: Bound) -> Any:
    dim = a["dim"] % _val(node).dim()
    parts = [c.emit(aten.unsqueeze.default, (c.arg(t), dim), node, final=False) for t in a["tensors"]]
    return c.emit(aten.cat.default, (parts, dim), node)


def _cat(c: Converter, node: fx.Node, a: Bound) -> Any:
    parts = [t for t in a["tensors"] if sizes(_val(t)) != [0]]  # torch allows an empty list to start from
    return c.emit(aten.cat.default, (c.arg(parts), a["dim"]), node) if len(parts) > 1 else c.get(parts[0])


def _hstack(axis: int) -> Rewrite:
    def build(c: Converter, node: fx.Node, a: Bound) -> Any:
        if any(_val(t).dim() <= axis for t in a["tensors"]):
            return None
        return c.emit(aten.cat.default, (c.arg(a["tensors"]), axis), node)

    return build


def _expand(c: Converter, node: fx.Node, a: Bound) -> Any:
    """Sizes that stay are -1, so that only a really repeated dimension needs a size."""
    same = _identity(c, node, a)
    if same is not None:
        return same
    before, after = sizes(_val(node.args[0])), sizes(_val(node))
    before = [None] * (len(after) - len(before)) + before
    shape = [
        -1 if str(b) == str(s) else s if isinstance(s, int) else c.size(s, node)
        for b, s in zip(before, after, strict=True)
    ]
    return None if None in shape else c.emit(aten.expand.default, (c.arg(node.args[0]), shape), node)


def _clamp(c: Converter, node: fx.Node, a: Bound) -> Any:
    """relu, relu6 or hardtanh where the bounds are theirs."""
    lo, hi = (a.get(k, a.get(f"{k}_val")) for k in ("min", "max"))
    if any(isinstance(bound, fx.Node) for bound in (lo, hi)):
        return None
    x = c.arg(a["self"])
    if lo == 0 and hi is None:
        return c.emit(aten.relu.default, (x,), node)
    if lo == 0 and hi == 6:
        return c.emit(aten.relu6.default, (x,), node)
    if lo is not None and hi is not None:
        return c.emit(aten.hardtanh.default, (x, lo, hi), node)
    return c.emit(aten.clamp.default, (x, lo, hi), node)


def _threshold(c: Converter, node: fx.Node, a: Bound) -> Any:
    return c.emit(aten.relu.default, (c.arg(a["self"]),), node) if a["threshold"] == a["value"] == 0 else None


def _binary(target: Any, commutes: bool) -> Rewrite:
    def build(c: Converter, node: fx.Node, a: Bound) -> Any:
        first, second = (c.number(a[k]) for k in ("self", "other"))
        if isinstance(first, int | float):
            if not commutes:
                return None
            first, second = second, first
        alpha = a.get("alpha", 1)
        return c.emit(target, (first, second), node, {"alpha": alpha} if alpha != 1 else None)

    return build


def _rsub(c: Converter, node: fx.Node, a: Bound) -> Any:
    """number - x as x * -1 + number: two operators that keep x's codes, up to the scale."""
    if a["alpha"] != 1 or isinstance(a["other"], fx.Node):
        return None
    negative = c.emit(aten.mul.Tensor, (c.arg(a["self"]), -1), node, final=False)
    return c.emit(aten.add.Tensor, (negative, a["other"]), node)


def _baddbmm(c: Converter, node: fx.Node, a: Bound) -> Any:
    if a["alpha"] != 1 or a["beta"] != 1:
        return None
    product = c.emit(aten.matmul.default, c.arg((node.args[1], node.args[2])), node, final=False)
    return c.emit(aten.add.Tensor, (product, c.arg(a["self"])), node)


def _softmax(target: Any) -> Rewrite:
    def build(c: Converter, node: fx.Node, a: Bound) -> Any:
        if a["dtype"] not in (None, _val(a["self"]).dtype):
            return None
        return c.emit(target, (c.arg(a["self"]), a["dim"]), node)

    return build


def _pad(c: Converter, node: fx.Node, a: Bound) -> Any:
    mode, value = a.get("mode", "constant"), a["value"]
    value = {} if mode != "constant" else {"value": 0.0 if value is None else float(value)}
    return c.emit(aten.pad.default, (c.arg(a["self"]), c.arg(a["pad"]), mode), node, value)


REWRITES: dict[Any, Rewrite] = {
    **dict.fromkeys([aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
                     aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default,
                     aten.resolve_conj.default, aten.resolve_neg.default], _identity),
    **dict.fromkeys([aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other,
                     aten._to_copy.default, aten.type_as.default], _cast),
    aten.sym_size.int: _size,
    **dict.fromkeys([aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int,
                     aten.view_as.default, aten.reshape_as.default], _reshape),
    aten.flatten.using_ints: _flatten,
    **dict.fromkeys([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims], _squeeze),
    aten.t.default: _swap(0, 1),
    aten.mT.default: _swap(-2, -1),
    aten.numpy_T.default: _reverse,
    aten.swapaxes.default: _rename(aten.transpose.int),
    aten.swapdims.default: _rename(aten.transpose.int),
    aten.movedim.int: _movedim,
    aten.movedim.intlist: _movedim,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    **dict.fromkeys([aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
                     aten.tensor_split.sections, aten.tensor_split.indices], _split),
    aten.unbind.int: _unbind,
    aten.stack.default: _stack,
    **dict.fromkeys([aten.cat.default, aten.concat.default, aten.concatenate.default], _cat),
    aten.hstack.default: _hstack(1),
    aten.vstack.default: _hstack(0),
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    **dict.fromkeys([aten.clamp.default, aten.clip.default, aten.hardtanh.default], _clamp),
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.threshold.default: _threshold,
    aten.add.Tensor: _binary(aten.add.Tensor, True),
    aten.add.Scalar: _binary(aten.add.Tensor, True),
    aten.sub.Tensor: _binary(aten.sub.Tensor, False),
    aten.sub.Scalar: _binary(aten.sub.Tensor, False),
    aten.mul.Tensor: _binary(aten.mul.Tensor, True),
    aten.mul.Scalar: _binary(aten.mul.Tensor, True),
    aten.multiply.Tensor: _binary(aten.mul.Tensor, True),
    aten.div.Tensor: _binary(aten.div.Tensor, False),
    aten.div.Scalar: _binary(aten.div.Tensor, False),
    aten.true_divide.Tensor: _binary(aten.div.Tensor, False),
    aten.rsub.Scalar: _rsub,
    aten.baddbmm.default: _baddbmm,
    aten.bmm.default: _rename(aten.matmul.default),
    aten.mm.default: _rename(aten.matmul.default),
    aten.softmax.int: _softmax(aten.softmax.int),
    aten.log_softmax.int: _softmax(aten.log_softmax.int),
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.absolute.default: _rename(aten.abs.default),
    aten.negative.default: _rename(aten.neg.default),
}  # fmt: skip
