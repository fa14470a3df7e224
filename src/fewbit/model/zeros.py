"""Which weights of a model are sparse, and how their zeros are held while it trains.

A graph's ``meta["sparse"]`` names them. Their zeros are the mask: there is no other copy of it that could be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.errors import ModelError, RecipeError

SPARSE = "sparse"


def sparse_names(model: nn.Module) -> list[str]:
    """Names of the sparse weights, in a graph or in a quantized or trainable model."""
    graph: Any = model if isinstance(model, GraphModule) else getattr(model, "network", None)
    return list(getattr(graph, "meta", {}).get(SPARSE, ()))


def sparse_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The sparse weights by name; of a trainable model the latent ones. What is no parameter any more is left out."""
    graph: Any = model if isinstance(model, GraphModule) else getattr(model, "network", model)
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    found = {}
    for name in sparse_names(model):
        layer, _, last = name.rpartition(".")
        parameter = parameters.get(name, parameters.get(f"{layer}.layer.{last}"))
        if parameter is not None:
            found[name] = parameter
    return found


@contextmanager
def hold_zeros(model: nn.Module) -> Iterator[None]:
    """While this is entered, the zeros of a model's sparse weights get no gradient: every optimizer leaves them zero.

    For training loops of one's own; ``fewbit.finetune`` does it itself. The optimizer has to be new, since a momentum
    from before would go on moving them. Raises ModelError for a model that has no weights known to be sparse.
    """
    if not sparse_names(model):
        raise ModelError(
            f"a {type(model).__name__} with no weights known to be sparse: give the graph that fewbit.prune(..., "
            "sparsity=...), finetune or load gave, not a module that its weights were copied to"
        )
    parameters = {id(p): p for p in sparse_parameters(model).values() if p.requires_grad}
    handles = [p.register_hook(partial(_without, p.detach() == 0)) for p in parameters.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_zeros(name: str, weight: Tensor, coded: Tensor, format: str) -> None:
    """Raise RecipeError where zeros of a sparse weight were coded as something else; both in one shape."""
    moved = int(((weight == 0) & (coded != 0)).sum())
    if moved:
        raise RecipeError(
            f"{name}: {moved:,} of its {weight.numel():,} numbers were pruned, and {format} makes them other than "
            "zero: use a format that has a zero (int2, ternary, codebook1), or 'float' by a rule"
        )


def _without(zeros: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(zeros, 0.0)
