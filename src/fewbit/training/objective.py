"""What training minimises: the loss on labels, on a teacher's outputs and features; and what can be wrong there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.errors import DataError, ModelError, TrainingError
from fewbit.model.graph import in_eval_mode
from fewbit.training.features import Tapped
from fewbit.training.losses import feature_loss, logits_loss
from fewbit.training.model import TrainableModel

IGNORED = -100  # the label of positions that do not count, as in torch and Hugging Face

LabelLoss = Callable[[Any, Tensor], Tensor]
Penalty = Callable[[nn.Module], Tensor]  # of the module in training


@dataclass(frozen=True)
class Distillation:
    """How a student learns from a teacher.

    ``loss``: on outputs ("kd", "dkd", "mse"), None for features alone. ``temperature``: low-bit students collapse at
    high ones. ``labels``: the weight of the loss on labels beside it. ``features``: pairs of layers, or names that
    both have; of blocks or layers. ``feature_loss``: "attention" or "hint"; ``feature_weight``: its weight.
    """

    loss: str | None = "kd"
    temperature: float = 1.0
    labels: float = 0.0
    features: Sequence[str] | Mapping[str, str] = ()
    feature_loss: str = "attention"
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss is not None:
            logits_loss(self.loss)
        if not self.temperature > 0:
            raise TrainingError(f"temperature is {self.temperature}, expected a positive number")
        if self.loss is None and not self.features:
            raise TrainingError("a distillation without a loss on outputs needs features=... to learn from")

    def pairs(self) -> list[tuple[str, str]]:
        """Layers of the student and of the teacher."""
        if isinstance(self.features, Mapping):
            return list(self.features.items())
        return [(name, name) for name in self.features]


class Student(nn.Module):
    """The network with the losses on its features, as one module, so that processes can share it.

    Called with the teacher's features and the inputs: the output and the features' loss, None without any.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.tapped = Tapped(model, names)
        self.losses = nn.ModuleList()

    def forward(self, taught: list[Tensor], *inputs: Any) -> tuple[Any, Tensor | None]:
        output, features = self.tapped(*inputs)
        if not taught:
            return output, None
        terms = [loss(f, t) for loss, f, t in zip(self.losses, features, taught, strict=True)]
        return output, torch.stack(terms).sum()


class Objective:
    """The loss of a batch: ``student`` learns from ``teacher`` (None without), from labels, or from both."""

    def __init__(
        self,
        model: nn.Module,
        teacher: Any,
        distillation: Distillation,
        label_loss: LabelLoss | None,
        dampen: float,
        penalty: Penalty | None = None,
    ) -> None:
        self.model = model
        self.distillation = distillation
        self.label_loss = label_loss
        self.dampen = dampen
        self.penalty = penalty
        pairs = distillation.pairs() if teacher is not None else []
        self.student = Student(model, [own for own, _ in pairs])
        self.teacher = teacher
        if pairs:
            if not isinstance(teacher, nn.Module):
                raise TrainingError("features=... needs a teacher that is a module, found a function")
            self.teacher = Tapped(teacher, [other for _, other in pairs])
        self._tapped = bool(pairs)

    def prepare(self, inputs: tuple[Tensor, ...]) -> None:
        """Make the losses on features, which depend on their shapes. Raises RecipeError where these do not fit."""
        if not self._tapped:
            return
        with torch.no_grad():
            with in_eval_mode(self.model):
                _, own = self.student.tapped(*inputs)
            _, others = self.teacher(*inputs)
        name = self.distillation.feature_loss
        self.student.losses.extend(
            feature_loss(name, tuple(f.shape), tuple(t.shape)) for f, t in zip(own, others, strict=True)
        )
        self.student.losses.to(inputs[0].device)

    def __call__(
        self, wrapped: nn.Module, inputs: tuple[Tensor, ...], labels: Tensor | None, index: int
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the student's logits (detached). ``wrapped``: ``student``, maybe shared among processes."""
        taught, features = None, []
        if self.teacher is not None:
            with torch.no_grad():
                answer = self.teacher(*inputs)
            if self._tapped:
                answer, features = answer
            taught = logits(answer, "the teacher").float()
        output, of_features = wrapped(features, *inputs)
        found = logits(output, "the model")
        found = found.float() if found.is_floating_point() else found
        terms = []
        share = self.distillation.labels if taught is not None else 1.0
        if share:
            terms.append(share * self._labelled(output, found, labels, index))
        if taught is not None and self.distillation.loss is not None:
            if taught.shape != found.shape:
                raise ModelError(
                    f"the teacher gives outputs of shape {tuple(taught.shape)} and the model {tuple(found.shape)}: "
                    "they must agree, since one learns the other's; give a teacher for the same classes"
                )
            own, theirs, kept = _counted(found, taught, labels)
            loss = logits_loss(self.distillation.loss)
            terms.append(loss(own, theirs, kept, self.distillation.temperature))
        if of_features is not None:
            terms.append(self.distillation.feature_weight * of_features)
        if self.dampen and isinstance(self.model, TrainableModel):
            terms.append(self.dampen * self.model.dampening())
        if self.penalty is not None and self.model.training:
            terms.append(self.penalty(self.model))
        return torch.stack([term.reshape(()) for term in terms]).sum(), found.detach()

    def _labelled(self, output: Any, found: Tensor, labels: Tensor | None, index: int) -> Tensor:
        if labels is None:
            raise DataError(
                f"training data: batch {index} has no labels, and the loss needs them: give (x, y), or a teacher"
            )
        if self.label_loss is not None:
            return self.label_loss(output, labels)
        return label_loss(found, labels, index)


def label_loss(found: Tensor, labels: Tensor, index: int) -> Tensor:
    """Cross-entropy for class numbers, squared error for other numbers. Raises DataError where they do not fit."""
    if labels.is_floating_point():
        if labels.shape != found.shape:
            raise DataError(
                f"training data: batch {index} has labels of shape {tuple(labels.shape)} for outputs of shape "
                f"{tuple(found.shape)}"
            )
        return F.mse_loss(found, labels)
    if labels.shape != found.shape[:-1]:
        raise DataError(
            f"training data: batch {index} has labels of shape {tuple(labels.shape)}, expected class numbers of shape "
            f"{tuple(found.shape[:-1])} for outputs of shape {tuple(found.shape)}"
        )
    classes = found.shape[-1]
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise DataError(
            f"training data: batch {index} has label {int(labels[place])} at {place}, and the model has {classes} "
            f"classes, 0 to {classes - 1}: mend the labels, or the model's last layer"
        )
    return F.cross_entropy(found.reshape(-1, classes), labels.reshape(-1).long(), ignore_index=IGNORED)


def logits(output: Any, name: str) -> Tensor:
    """The one tensor to learn: the output itself, its ``logits``, or the first of several."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{name} gives a {type(output).__name__}, expected a tensor, or several with 'logits'"
        )
    return output


def _counted(found: Tensor, taught: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Only the positions that count: those whose label is not ``IGNORED`` (padding of token sequences)."""
    if labels is None or labels.is_floating_point() or labels.shape != found.shape[:-1]:
        return found, taught, None
    counts = labels != IGNORED
    if bool(counts.all()):
        return found, taught, labels
    return found[counts], taught[counts], labels[counts]
