"""Several steps in one call: prune, train, share weights, quantize, in the order that a recipe states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewbit.data import as_batches
from fewbit.errors import DataError, RecipeError
from fewbit.finetuning import FLOAT, finetune
from fewbit.model.readers import as_module
from fewbit.normalise import standard
from fewbit.pipeline import quantize
from fewbit.plan import Recipe, Step, Steps
from fewbit.registry import nearest
from fewbit.slimming import prune
from fewbit.storage import load, save

_FUNCTIONS: dict[str, Callable[..., Any]] = {"prune": prune, "finetune": finetune, "quantize": quantize}
# What the call says for all steps, or what has no place in a file.
_OURS = {"model", "example", "train", "data", "calibration", "held_out", "teacher", "augment", "folder", "resume",
         "progress", "seed", "loss", "overrides", "rewind", "trainable", "training", "stages"}  # fmt: skip
_SEEN = 1024  # training samples, for criteria, for fitting weights and for calibration


def compress(
    model: Any,
    train: object,
    *,
    recipe: Steps | str | Path = "deep-compression",
    teacher: Any = FLOAT,
    augment: Any = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """A model made small in several steps, those of a recipe, in their order.

    ``train``: inputs and labels as for ``fewbit.finetune``; arrays, tensors or a file, read many times; the first 1,024
    are what criteria and calibration see. ``recipe``: a preset's name, a TOML file, or ``Steps``. ``teacher``: what
    the model learns from in every training; by default ``model`` itself, None for labels alone. ``augment``: as for
    ``finetune``, in every training. ``folder``: each step's result is kept there, and what training keeps; with
    ``resume`` the same call goes on after an interruption.

    Gives the last step's model: a float graph, or a ``QuantizedModel``. ``fewbit.save(result, "model.fewbit")`` codes
    it. Raises ``RecipeError`` for a step that cannot be, before anything is done, and what the steps raise.
    """
    steps = recipe if isinstance(recipe, Steps) else Steps.load(recipe)
    for number, step in enumerate(steps.steps, 1):
        _check(step, f"recipe {steps.name!r}, step {number}")
    if resume and folder is None:
        raise RecipeError("resume=True needs folder=..., where the interrupted steps were kept")
    examples = (example,) if isinstance(example, Tensor) else example
    source = as_module(model, examples)
    taught = source if isinstance(teacher, str) and teacher == FLOAT else teacher
    common = {"teacher": taught, "augment": augment, "seed": seed, "progress": progress}
    some = _some(train, examples)
    seen = [(*inputs, *([] if labels is None else [labels])) for inputs, labels in some]
    runner = _Runner(train, seen, common, resume)
    current: Any = standard(source, examples or some[0][0])
    for number, step in enumerate(steps.steps, 1):
        own = None if folder is None else Path(folder) / f"{number}-{step.do}"
        done = None if own is None else own / "model"
        if resume and done is not None and done.exists():
            current = load(done)
            continue
        if own is not None:
            own.mkdir(parents=True, exist_ok=True)
        current = getattr(runner, step.do)(current, own, **step.values)
        if done is not None:
            save(current, done)
    return current


@dataclass(frozen=True)
class _Runner:
    """The steps as functions of the model, the step's own folder, and its values."""

    train: object
    some: list[tuple[Tensor, ...]]
    common: dict[str, Any]
    resume: bool

    def prune(
        self, model: Any, folder: Path | None, epochs: int = 0, training: Any = None, **values: Any
    ) -> Any:
        """With ``epochs`` the model is trained after each part, which keeps its state in a folder of its own."""
        parts = 0

        def learn(network: nn.Module) -> nn.Module:
            nonlocal parts
            parts += 1
            own = None if folder is None else folder / f"part{parts}"
            trained: nn.Module = self.finetune(network, own, epochs=epochs, **(training or {}))
            return trained

        common = {key: self.common[key] for key in ("seed", "progress")}
        return prune(model, data=self.some, train=learn if epochs else None, **common, **values)

    def finetune(self, model: Any, folder: Path | None, **values: Any) -> Any:
        resume = self.resume and folder is not None
        return finetune(model, self.train, folder=folder, resume=resume, **{**self.common, **values})

    def quantize(self, model: Any, folder: Path | None, **values: Any) -> Any:
        return quantize(
            model, self.some, seed=self.common["seed"], progress=self.common["progress"], **values
        )


def _check(step: Step, where: str) -> None:
    """That a step's keywords exist; their values are checked by the functions."""
    known = set(inspect.signature(_FUNCTIONS[step.do]).parameters) - _OURS
    known |= {"epochs", "training"} if step.do == "prune" else set(inspect.signature(Recipe).parameters)
    _known(step.values, known, f"{where}: {step.do}")
    training = step.values.get("training", {})
    if not isinstance(training, Mapping):
        raise RecipeError(f"{where}: training is {training!r:.40}, expected keywords of finetune")
    trains = set(inspect.signature(finetune).parameters) - _OURS - {"recipe", "epochs"}
    _known(training, trains, f"{where}: training")


def _known(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise RecipeError(f"{where} has no {key!r}: {nearest(key, sorted(known))}")


def _some(
    train: object, examples: tuple[Tensor, ...] | None
) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
    """The first training samples, with their labels if there are any."""
    batches = as_batches(train, what="training", like=examples, batch_size=128)
    if batches.one_shot:
        raise DataError("compress reads the training data many times: give arrays, a data set or a file")
    found: list[tuple[tuple[Tensor, ...], Tensor | None]] = []
    for inputs, labels in batches:
        found.append((inputs, labels))
        if sum(len(each[0][0]) for each in found) >= _SEEN:
            break
    return found
