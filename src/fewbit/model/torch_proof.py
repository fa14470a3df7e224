"""Compares the graph that was read with the module it was read from, and finds the first layer that
differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fewbit.errors import ModelError
from fewbit.model.torch_export import Example, first_line, quiet, without_fast_path

TOLERANCE = 1e-5


def prove(gm: fx.GraphModule, source: nn.Module, example: Example, what: str = "the example") -> None:
    """ModelError unless `gm` computes what `source` does: eval mode, relative error at most 1e-5."""
    expected = _outputs(source, example)
    try:
        actual = _outputs(gm, example)
    except Exception as error:
        raise ModelError(
            f"the graph of {type(source).__name__} does not run on {what} ({first_line(error)}): "
            "expected the "
            "module's own outputs; fix the sizes that the model depends on with dynamic_shapes"
        ) from error
    worst = max((difference(e, a) for e, a in zip(expected, actual, strict=True)), default=0.0)
    if worst > TOLERANCE:
        raise ModelError(
            f"the graph of {type(source).__name__} differs from the module on {what} by {worst:.1e} "
            "(relative; "
            f"expected at most {TOLERANCE:.0e}), first at {_first_difference(gm, source, example)}"
        )


def must_run(source: nn.Module, example: Example) -> None:
    """ModelError, in the module's own words, unless it runs on the example."""
    try:
        _outputs(source, example)
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in example)
        raise ModelError(
            f"{type(source).__name__} does not run on the example of shape {shapes} "
            f"({first_line(error)}): expected "
            "what its forward takes; give one tensor for each input, with the batch first"
        ) from error


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
    odd, even = expected[~finite], actual[~finite]
    if not torch.equal(odd.isnan(), even.isnan()) or not torch.equal(odd.nan_to_num(), even.nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    error, scale = (expected - actual)[finite].abs().max(), expected[finite].abs().max()
    return float("inf") if error.isnan() else float(error / scale) if scale > 0 else float(error)


def _outputs(module: nn.Module, example: Example) -> list[Any]:
    """All outputs, flat; random numbers, if the model draws any in eval mode, are the same on every call."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        buffers_kept(module),
        quiet(),
        without_fast_path(),
    ):
        torch.manual_seed(0)
        return [leaf for leaf in tree_leaves(module(*(t.clone() for t in example))) if leaf is not None]


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers that forward writes to get their values back."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _first_difference(gm: fx.GraphModule, source: nn.Module, example: Example) -> str:
    """Name of the first layer whose output differs, by running both and looking at every layer they share."""
    names = list(dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "call_module"))
    known = {name for name, _ in source.named_modules()}
    names = [name for name in names if name in known]
    expected, actual = (_record(module, names, example) for module in (source, gm))
    for name in names:
        for e, a in zip(expected[name], actual[name], strict=False):
            if difference(e, a) > TOLERANCE:
                return f"layer {name!r}"
    return "an operator between layers (no layer's own output differs)"


def _record(module: nn.Module, names: list[str], example: Example) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, output: Any) -> None:
        seen[name] += [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    hooks = [
        module.get_submodule(name).register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        _outputs(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
