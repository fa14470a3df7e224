"""Rewrites of a graph in standard form: one a file, with `PRESERVES`, `TOLERANCE`, `apply(gm, **settings)`.

`PRESERVES` says in one sentence what the pass keeps. `TOLERANCE` is how far the outputs may move, relative to
their largest magnitude, or None for a pass that moves them on purpose and checks its own promise. A pass with
`READS_DATA = True` takes calibration inputs as `apply(gm, *, batches=...)`: tuples of tensors, readable again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fewbit.errors import ModelError
from fewbit.model.graph import refresh
from fewbit.model.torch_proof import difference
from fewbit.registry import Registry

registry = Registry("fewbit.passes", "pass")


def pass_names() -> list[str]:
    """Names of all passes."""
    return registry.names()


def run(name: str, gm: fx.GraphModule, example: tuple[Tensor, ...], **settings: Any) -> list[str]:
    """Applies a pass to a graph, in place, and proves on the example that it preserved what it says.

    Args:
        name: a pass's name.
        gm: graph in standard form that the caller owns; its train or eval mode stays as it is.
        example: one tensor for each input of the graph; the outputs on it are compared in eval mode.
        settings: what the pass's `apply` takes besides the graph.

    Returns: what was done and what was not, a sentence for each layer.

    Raises:
        RecipeError: unknown pass.
        ModelError: a layer holds values that the pass cannot work with, or an output moved by more than
            `TOLERANCE`; then the graph is not fit for use.
    """
    module = registry.module(name)
    tolerance: float | None = module.TOLERANCE
    before = [] if tolerance is None else _outputs(gm, example)
    notes: list[str] = module.apply(gm, **settings)
    gm.graph.lint()
    gm.recompile()
    if tolerance is not None:
        _compare(name, before, _outputs(gm, example), tolerance, notes)
    refresh(gm, example)
    return notes


def _compare(name: str, before: list[Any], after: list[Any], tolerance: float, notes: list[str]) -> None:
    for index, (expected, actual) in enumerate(zip(before, after, strict=True)):
        error = difference(expected, actual)
        if not error <= tolerance:  # catches NaN too
            raise ModelError(
                f"pass {name!r} moved output {index} of the model by {error:.1e} (relative, on the example): "
                f"expected at most {tolerance:.0e}; leave the pass out for this model "
                f"(it did: {'; '.join(notes) or 'nothing'})"
            )


def _outputs(gm: fx.GraphModule, example: tuple[Tensor, ...]) -> list[Any]:
    """All outputs, flat, in eval mode; every module's mode is put back, and random numbers repeat."""
    modes = {module: module.training for module in gm.modules()}
    gm.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [leaf for leaf in tree_leaves(gm(*(t.clone() for t in example))) if leaf is not None]
    finally:
        for module, mode in modes.items():
            module.training = mode
