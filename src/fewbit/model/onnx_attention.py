"""ONNX's Attention as products and a softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbit.model.onnx_call import Call

Rule = Callable[[Call], Any]


def _attention(c: Call) -> Any:
    if any(c.has(i) for i in (4, 5, 6)) or any(c.uses(o) for o in c.node.outputs[1:]):
        raise c.error("it keeps keys and values of earlier calls: expected none")
    if c.attr("softcap", 0.0) or c.attr("qk_matmul_output_mode", 0):
        raise c.error("softcap or qk_matmul_output_mode: expected neither")
    rank = c.rank(0)
    heads = int(c.attr("q_num_heads", 0)), int(c.attr("kv_num_heads", 0))
    if rank not in (3, 4) or (rank == 3 and not all(heads)):
        raise c.error(
            f"queries of {rank} dimensions with {heads} heads: expected 4, or 3 and the numbers of heads"
        )
    mask = [c[3]] if c.has(3) else []
    scale = c.attr("scale")
    return c.apply(
        _attended, c[0], c[1], c[2], *mask, heads=heads if rank == 3 else None,
        scale=None if scale is None else float(scale), causal=bool(c.attr("is_causal", 0)),
    )  # fmt: skip


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *,
    heads: tuple[int, int] | None, scale: float | None, causal: bool,
) -> Tensor:  # fmt: skip
    if heads is not None:
        q, k, v = (
            t.unflatten(-1, (n, -1)).transpose(1, 2)
            for t, n in zip((q, k, v), (heads[0], *heads[1:] * 2), strict=True)
        )
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        scores = torch.where(seen, scores, torch.tensor(-torch.inf))
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, torch.tensor(-torch.inf))
    elif mask is not None:
        scores = scores + mask
    mixed = torch.matmul(torch.softmax(scores, -1), v)
    return mixed if heads is None else mixed.transpose(1, 2).flatten(2)


RULES: dict[str, Rule] = {"Attention": _attention}
