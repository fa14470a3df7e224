"""What two models' answers are compared by: their floating outputs, and their predictions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fewbit.errors import DataError, ModelError


def outputs(answer: Any) -> list[Tensor]:
    """All floating tensors of a model's answer. Raises ModelError where there is none."""
    found = [x for x in tree_leaves(answer) if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise ModelError("the model gives no floating tensor: there is no output to compare")
    return found


def log_probabilities(output: Tensor, metric: str = "kl") -> Tensor:
    """Of the model's first output, classes last: logits, or probabilities that sum to one."""
    axis = -1 if output.dim() in (1, 2, 3) else 1
    output = output.movedim(axis, -1)
    if output.shape[-1] < 2:
        raise DataError(
            f"{metric} compares predictions, and the model's output of shape {tuple(output.shape)} has no classes: "
            'measure metrics=("sqnr",)'
        )
    values = output.detach()
    if bool((values >= 0).all()) and bool((values.sum(-1) - 1).abs().max() < 1e-3):
        output = output.clamp_min(1e-12).log()
    return F.log_softmax(output, -1)


def divergence(before: Tensor, after: Tensor) -> float:
    """From log probabilities to others of the same shape, in nats, summed over predictions."""
    return float((before.exp() * (before - after)).sum())
