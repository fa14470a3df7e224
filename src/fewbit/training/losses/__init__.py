"""What a student learns from its teacher: one loss a file, on logits (`loss`) or on features (`Loss`, a module).

A file on logits has `loss(student, teacher, labels, temperature)`; tensors [..., classes], float32; labels [...] or
None; a scalar comes back. A file on features has `Loss(student_shape, teacher_shape)`, called with two tensors.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fewbit.errors import RecipeError
from fewbit.registry import Registry

registry = Registry("fewbit.training.losses", "distillation loss")

LogitsLoss = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


def loss_names(features: bool) -> list[str]:
    """Names of the losses on features, or of those on logits."""
    attribute = "Loss" if features else "loss"
    return [name for name in registry.names() if hasattr(registry.module(name), attribute)]


def logits_loss(name: str) -> LogitsLoss:
    """The loss of that name. Raises RecipeError for an unknown one, or one on features."""
    found: LogitsLoss | None = getattr(registry.module(name), "loss", None)
    if found is None:
        raise RecipeError(
            f"distillation loss {name!r} compares features, not outputs: name layers with features=..., or use "
            f"one of: {', '.join(loss_names(False))}"
        )
    return found


def feature_loss(name: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """A loss for features of these shapes. Raises RecipeError for an unknown name, or one on logits."""
    found: Any = getattr(registry.module(name), "Loss", None)
    if found is None:
        raise RecipeError(
            f"distillation loss {name!r} compares outputs, not features: use one of: {', '.join(loss_names(True))}"
        )
    made: nn.Module = found(student, teacher)
    return made
