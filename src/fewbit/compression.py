"""Several steps in one call: prune, train, share weights, quantize, in the order that a recipe states."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.data import as_batches
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.finetuning import FLOAT, finetune
from fewbit.model.readers import as_module
from fewbit.model.simulate import QuantizedModel
from fewbit.normalise import standard
from fewbit.pipeline import quantize
from fewbit.plan import Recipe, Step, Steps
from fewbit.registry import nearest
from fewbit.slimming import prune, settings
from fewbit.storage import load, save
from fewbit.training.model import TrainableModel

_FUNCTIONS: dict[str, Callable[..., Any]] = {"prune": prune, "finetune": finetune, "quantize": quantize}
# What the call says for all steps, or what has no place in a file.
_OURS = {"model", "example", "train", "data", "calibration", "held_out", "teacher", "augment", "folder", "resume",
         "progress", "seed", "loss", "overrides", "rewind", "trainable", "training", "stages"}  # fmt: skip
_IDENTITY = "made-from.txt"
_SEEN = 1024  # training samples, for criteria, for fitting weights and for calibration


def compress(
    model: Any,
    train: object,
    *,
    recipe: Steps | Mapping[str, Any] | str | Path = "deep-compression",
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
    are what criteria and calibration see. ``recipe``: a preset's name, a TOML file or what it holds. ``teacher``: what
    the model learns from in every training; by default ``model`` itself, None for labels alone. ``augment``: as for
    ``finetune``, in every training. ``folder``: each step's result is kept there, and what training keeps; with
    ``resume`` the same call goes on after an interruption; what steps before it reported is not kept.

    Gives the last step's model: a float graph, or a ``QuantizedModel``. ``fewbit.save(result, "model.fewbit")`` codes
    it. Raises ``RecipeError`` for a step that cannot be, before anything is done, and what the steps raise.
    """
    steps = Steps.from_dict("recipe", recipe) if isinstance(recipe, Mapping) else recipe
    steps = steps if isinstance(steps, Steps) else Steps.load(steps)
    for number, step in enumerate(steps.steps, 1):
        _check(step, f"recipe {steps.name!r}, step {number}")
    if resume and folder is None:
        raise RecipeError("resume=True needs folder=..., where the interrupted steps were kept")
    examples = (example,) if isinstance(example, Tensor) else example
    if isinstance(model, QuantizedModel | TrainableModel):
        raise ModelError("the model is quantized already: give the float model that it came from")
    source = as_module(model, examples)
    taught = source if isinstance(teacher, str) and teacher == FLOAT else teacher
    common = {"teacher": taught, "augment": augment, "seed": seed, "progress": progress}
    some = _some(train, examples)
    seen = [(*inputs, *([] if labels is None else [labels])) for inputs, labels in some]
    runner = _Runner(train, seen, common, resume)
    current: Any = standard(source, examples or some[0][0])
    identity = _digest(current, some[0][0], seed)
    for number, step in enumerate(steps.steps, 1):
        identity = hashlib.sha256(f"{identity}{step}".encode()).hexdigest()
        own = None if folder is None else Path(folder) / f"{number}-{step.do}"
        done = None if own is None else own / "model"
        if resume and own is not None and done is not None and done.exists():
            if not (own / _IDENTITY).is_file() or (own / _IDENTITY).read_text() != identity:
                raise RecipeError(
                    f"{own}: kept for another model, seed, data or recipe up to this step: give another folder=, or "
                    "resume=False to begin again"
                )
            current = load(done)
            continue
        if own is not None:
            own.mkdir(parents=True, exist_ok=True)
        current = getattr(runner, step.do)(current, own, **step.values)
        if own is not None and done is not None:
            save(current, done)
            (own / _IDENTITY).write_text(identity)
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


def _placeholder(model: nn.Module) -> nn.Module:
    """Stands for the training that a step will do."""
    return model


def _check(step: Step, where: str) -> None:
    """That a step's keywords exist; their values are checked by the functions."""
    known = set(inspect.signature(_FUNCTIONS[step.do]).parameters) - _OURS
    known |= {"epochs", "training"} if step.do == "prune" else set(inspect.signature(Recipe).parameters)
    _known(step.values, known, f"{where}: {step.do}")
    training = step.values.get("training", {})
    if not isinstance(training, Mapping):
        raise RecipeError(f"{where}: training is {training!r:.40}, expected keywords of finetune")
    if training and not step.values.get("epochs"):
        raise RecipeError(f"{where}: training without epochs: say how many follow each part")
    if step.do == "prune":
        values = {
            key: value for key, value in step.values.items() if key in inspect.signature(settings).parameters
        }
        try:
            settings(train=_placeholder if step.values.get("epochs") else None, **values)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
    trains = set(inspect.signature(finetune).parameters) - _OURS - {"recipe", "epochs"}
    _known(training, trains, f"{where}: training")


def _digest(gm: GraphModule, inputs: tuple[Tensor, ...], seed: int) -> str:
    """Of what the steps begin with."""
    found = hashlib.sha256(str(seed).encode())
    for name, tensor in [*gm.state_dict().items(), *((str(i), x) for i, x in enumerate(inputs))]:
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


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
