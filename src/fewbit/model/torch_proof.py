"""Compares the graph that was read with the module it was read from, and finds the first layer that differs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fewbit.errors import ModelError
from fewbit.model.torch_export import Example

TOLERANCE = 1e-5


def prove(gm: fx.GraphModule, source: nn.Module, example: Example) -> None:
    """ModelError unless `gm` computes what `source` does (eval mode, relative error at most 1e-5)."""
    expected, actual = _outputs(source, example), _outputs(gm, example)
    worst = max((difference(e, a) for e, a in zip(expected, actual, strict=True)), default=0.0)
    if worst <= TOLERANCE:
        return
    raise ModelError(f"the graph of {type(source).__name__} differs from the module on the example by {worst:.1e} "
                     f"(relative; expected at most {TOLERANCE:.0e})")  # fmt: skip


def difference(expected: Any, actual: Any) -> float:
    """Largest absolute difference over the largest expected magnitude; infinite for another shape or type."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return 0.0 if expected == actual else float("inf")
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if expected.equal(actual) or not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(expected[~finite].nan_to_num(7.0), actual[~finite].nan_to_num(7.0)):
        return float("inf")
    error, scale = (expected - actual)[finite].abs().max(), expected[finite].abs().max()
    return float(error / scale) if scale > 0 else float(error)


def _outputs(module: nn.Module, example: Example) -> list[Any]:
    """All outputs, flat; random numbers, if the model draws any in eval mode, are the same on every call."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [leaf for leaf in tree_leaves(module(*(t.clone() for t in example))) if leaf is not None]
