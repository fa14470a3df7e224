"""How much a model needs each single weight: one criterion a file, with a function `scores`.

A file says in `NEEDS` what it has to see on data ("inputs", "hessian", "gradients", "training"), and in `PER_OUTPUT`
that only the weights of one output are to be compared with each other; else scores are compared across layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.registry import Registry

registry = Registry("fewbit.pruning.saliency", "criterion of weights")


@dataclass(frozen=True)
class Weight:
    """A layer's weight [outputs, inputs, ...] and what was seen on data; None where the criterion needs none.

    Attributes:
        value: the weight.
        inputs: float64 [groups, I], the mean square of what each of an output's I weights multiplies.
        hessian: float64 [groups, I, I], the mean product of what two of them multiply.
        outputs: float64 [outputs], the mean over samples of the squared gradients of the loss at the outputs' sums,
            summed over places.
        squares: in the weight's shape, the mean over batches of the loss's squared gradient.
        before: the weight before it was trained last.
        generator: for what is drawn.
    """

    value: Tensor
    generator: torch.Generator
    inputs: Tensor | None = None
    hessian: Tensor | None = None
    outputs: Tensor | None = None
    squares: Tensor | None = None
    before: Tensor | None = None

    def rows(self, seen: Tensor) -> Tensor:
        """The weight by groups of outputs: float64 [groups, outputs / groups, I]; ``seen``: [groups, I, ...]."""
        return self.value.detach().double().reshape(len(seen), -1, seen.shape[1])

    def importance(self) -> float:
        """How much a squared error of a sum costs, the mean over outputs: each alone is seen in too few samples."""
        return 1.0 if self.outputs is None else float(self.outputs.mean())

    def inverse(self, damping: float) -> Tensor:
        """The inverse of the Hessian with a share of its mean diagonal added: float64 [groups, I, I]."""
        assert self.hessian is not None
        h = self.hessian.double()
        mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        return torch.linalg.inv(h + torch.diag_embed((damping * mean)[:, None].expand(-1, h.shape[1])))


def saliency_names() -> list[str]:
    """Names of all criteria for single weights."""
    return registry.names()


def needs(name: str) -> frozenset[str]:
    """What a criterion has to see. RecipeError for an unknown name."""
    return frozenset(getattr(registry.module(name), "NEEDS", ()))


def per_output(name: str) -> bool:
    """Whether a criterion compares the weights of one output with each other only."""
    return bool(getattr(registry.module(name), "PER_OUTPUT", False))


def saliency(name: str, weight: Weight) -> Tensor:
    """How much each number of a weight is needed: float64 in its shape. RecipeError for an unknown name."""
    found: Tensor = registry.module(name).scores(weight)
    return found.double().reshape(weight.value.shape)
