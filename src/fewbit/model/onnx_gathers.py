"""ONNX operators that pick, place or pad numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.model import onnx_sizes
from fewbit.model.onnx_build import Constant, Sizes, Value
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_functions import number

Rule = Callable[[Call], Any]


def _gather(c: Call) -> Any:
    data, indices = c.raw(0), c.raw(1)
    axis = c.axis(int(c.attr("axis", 0)), c.rank(0))
    if c.is_size(0) and isinstance(indices, Constant):
        return c.apply(_picked_sizes, data, index=indices.array)
    if isinstance(indices, Constant):
        return _gather_fixed(c, indices.array, axis)
    table = isinstance(data, Constant) and data.array.ndim == 2 and data.array.dtype.kind == "f" and axis == 0
    if table and isinstance(data, Constant) and not c.is_size(1):
        rows, width = data.array.shape
        return c.layer(nn.Embedding, [c[1]], {"weight": data}, num_embeddings=rows, embedding_dim=width)
    return c.apply(_picked, c[0], c[1], axis=axis)


def _picked_sizes(x: Any, *, index: np.ndarray) -> Any:
    return x[index] if index.ndim else onnx_sizes.scalar(x[int(index)])


def _gather_fixed(c: Call, index: np.ndarray, axis: int) -> Any:
    size = c.shape(0)[axis]
    if index.size and (index.min() < -size or index.max() >= size):
        raise c.error(f"indices {int(index.min())} to {int(index.max())} along an axis of {size}")
    if index.ndim == 0:
        return c.apply(torch.select, c[0], dim=axis, index=int(index))
    flat = np.where(index < 0, index + size, index).reshape(-1).astype(np.int64)
    if index.ndim == 1 and (flat.size and (np.diff(flat) == 1).all()):
        return c.apply(_narrowed, c[0], axis=axis, start=int(flat[0]), end=int(flat[-1]) + 1)
    picked = c.apply(torch.index_select, c[0], axis, Constant(flat, f"{c.node.name}.index"), suffix="index")
    if index.ndim == 1:
        return picked
    return c.apply(torch.unflatten, picked, dim=axis, sizes=tuple(index.shape))


def _narrowed(x: Tensor, *, axis: int, start: int, end: int) -> Tensor:
    return x[(*[slice(None)] * axis, slice(start, end))]


def _picked(x: Tensor, index: Tensor, *, axis: int) -> Tensor:
    places: list[Any] = [*[slice(None)] * axis, index.long()]
    return x[tuple(places)]


def _gather_elements(c: Call) -> Any:
    axis = c.axis(int(c.attr("axis", 0)), c.rank(0))
    return c.apply(_along, c[0], c[1], axis=axis)


def _along(x: Tensor, index: Tensor, *, axis: int) -> Tensor:
    index = index.long()
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


def _gather_nd(c: Call) -> Any:
    if c.attr("batch_dims", 0):
        raise c.error("batch_dims: expected none")
    return c.apply(_at_places, c[0], c[1])


def _at_places(x: Tensor, places: Tensor) -> Tensor:
    return x[tuple(places.long().unbind(-1))]


def _scatter_nd(c: Call) -> Any:
    if c.attr("reduction", "none") != "none":
        raise c.error(f"reduction {c.attr('reduction')!r}: expected none")
    return c.apply(_written, c[0], c[1], c[2])


def _written(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    return x.index_put(tuple(places.long().unbind(-1)), values)


# ---- padding ----------------------------------------------------------------------------------------------


def _pad(c: Call) -> Any:
    rank, mode = c.rank(0), str(c.attr("mode", "constant"))
    pads: Any
    if c.version < 11:
        pads = Sizes(onnx_sizes.sizes(c.attr("pads", [])))
        fill: Any = float(c.attr("value", 0.0))
    else:
        pads = c.sizes(1)
        fill = number(c[2]) if c.has(2) else 0.0
    axes = list(range(rank))
    if c.has(3):
        axes = [c.axis(int(a), rank) for a in c.fixed(3, "axes").reshape(-1)]
    if not isinstance(fill, int | float):
        raise c.error("its value is computed at run time: expected a constant")
    names = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in names:
        raise c.error(f"mode {mode!r}: expected constant, reflect, edge or wrap")
    return c.apply(_padded, c[0], pads, axes=axes, mode=names[mode], value=fill)


def _padded(x: Tensor, pads: Any, *, axes: list[int], mode: str, value: float) -> Tensor:
    sides = onnx_sizes.listed(pads)
    count = len(sides) // 2
    by_axis = dict(zip(axes, zip(sides[:count], sides[count:], strict=True), strict=True))
    flat = [side for axis in reversed(range(x.dim())) for side in by_axis.get(axis, (0, 0))]
    while len(flat) > 2 and flat[-1] == 0 and flat[-2] == 0:
        flat = flat[:-2]
    if mode == "constant":
        return F.pad(x, flat, value=value)
    if any(side < 0 for side in flat) or len(flat) > 2 * (x.dim() - 1) or x.dim() not in (3, 4, 5):
        return _padded_by_index(x, by_axis, mode)
    kept = {3: 2, 4: 4, 5: 6}[x.dim()]
    if len(flat) > kept or x.dtype != torch.float32:
        return _padded_by_index(x, by_axis, mode)
    return F.pad(x, flat + [0] * (kept - len(flat)), mode=mode)


def _padded_by_index(x: Tensor, by_axis: dict[int, tuple[Any, Any]], mode: str) -> Tensor:
    """Any padding but with a constant, axis by axis, by picking the places whose numbers are repeated."""
    for axis, (before, after) in by_axis.items():
        if (before, after) == (0, 0):
            continue
        size = x.shape[axis]
        places = torch.arange(-before, size + after)
        if mode == "replicate":
            places = places.clamp(0, size - 1)
        elif mode == "circular":
            places = places % size
        else:
            places = (places % max(2 * size - 2, 1)) if size > 1 else places * 0
            places = torch.where(places >= size, 2 * size - 2 - places, places)
        x = torch.index_select(x, axis, places)
    return x


# ---- blocks -----------------------------------------------------------------------------------------------


def _depth_to_space(c: Call) -> Any:
    block = int(c.attr("blocksize", 0))
    if c.rank(0) != 4 or block < 1 or c.shape(0)[1] % (block * block):
        raise c.error(f"blocksize {block} of shape {list(c.shape(0))}")
    if c.attr("mode", "DCR") == "CRD":
        return c.apply(F.pixel_shuffle, c[0], upscale_factor=block)
    return c.apply(_blocks_apart, c[0], block=block)


def _blocks_apart(x: Tensor, *, block: int) -> Tensor:
    n, channels, height, width = x.shape
    apart = x.reshape(n, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return apart.reshape(n, channels // block**2, height * block, width * block)


def _space_to_depth(c: Call) -> Any:
    block = int(c.attr("blocksize", 0))
    if c.rank(0) != 4 or block < 1 or any(s % block for s in c.shape(0)[2:]):
        raise c.error(f"blocksize {block} of shape {list(c.shape(0))}")
    return c.apply(_blocks_together, c[0], block=block)


def _blocks_together(x: Tensor, *, block: int) -> Tensor:
    n, channels, height, width = x.shape
    apart = x.reshape(n, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return apart.reshape(n, channels * block**2, height // block, width // block)


def _trilu(c: Call) -> Any:
    diagonal = int(c.fixed(1, "diagonal").item()) if c.has(1) else 0
    return c.apply(torch.triu if c.attr("upper", 1) else torch.tril, c[0], diagonal=diagonal)


def _one_hot(c: Call) -> Any:
    depth, values = int(c.fixed(1, "depth").item()), c.fixed(2, "values").reshape(-1)
    if int(c.attr("axis", -1)) not in (-1, c.rank(0)) or not isinstance(c.raw(0), Value):
        raise c.error(f"axis {c.attr('axis')}: expected the last one")
    off, on = values.tolist()
    dtype = torch.float32 if values.dtype.kind == "f" else torch.from_numpy(values).dtype
    return c.apply(_hot, c[0], depth=depth, off=off, on=on, dtype=dtype)


def _hot(x: Tensor, *, depth: int, off: float, on: float, dtype: torch.dtype) -> Tensor:
    places = torch.where(x < 0, x + depth, x).unsqueeze(-1) == torch.arange(depth)
    return places.to(dtype) * (on - off) + off


RULES: dict[str, Rule] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _trilu,
    "OneHot": _one_hot,
}
