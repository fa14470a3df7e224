"""Training from the outside: a quantized, pruned or float model learns from data, from a teacher, or from both."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.data import as_batches
from fewbit.errors import ModelError, TrainingError
from fewbit.model.graph import in_eval_mode
from fewbit.model.readers import as_module
from fewbit.model.simulate import QuantizedModel
from fewbit.pipeline import quantize
from fewbit.plan import Recipe
from fewbit.targets import get_target
from fewbit.training.building import make_trainable
from fewbit.training.examples import Augment, examples
from fewbit.training.loop import MakeOptimizer, Settings, Trainer
from fewbit.training.model import TrainableModel, Training
from fewbit.training.objective import Distillation, LabelLoss, Objective, Penalty
from fewbit.training.processes import Processes, processes

_CALIBRATION = 512  # training samples that ranges begin with
FLOAT = "float"


def finetune(
    model: Any,
    train: object,
    *,
    epochs: int = 10,
    recipe: Recipe | str | Path | None = None,
    target: str = "onnx",
    training: Training | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    teacher: Any = FLOAT,
    distill: Distillation | str = "kd",
    loss: LabelLoss | None = None,
    calibration: object = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    batch_size: int = 128,
    augment: Augment | str | None = None,
    held_out: float | object = 0.0,
    patience: int | None = None,
    optimizer: str | MakeOptimizer | torch.optim.Optimizer = "adamw",
    lr: float | None = None,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    accumulate: int = 1,
    clip: float | None = None,
    dampen: float = 0.0,
    penalty: Penalty | None = None,
    precision: str = "float32",
    compile: bool = False,
    parallel: str = "ddp",
    workers: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
    **overrides: Any,
) -> Any:
    """Train a model, quantized or not, and give what it became: what was trained is exactly what is exported.

    ``model``: a quantized model, whose plan it keeps; a trainable one, which is trained in place; or a float one, which
    is quantized first if there is a ``recipe`` (or keywords that replace its values, such as ``weights="int4"``), and
    else trained as it is, as a copy. ``train``: inputs and labels, in the forms that ``quantize`` takes; arrays and
    data sets are shuffled. ``training``: estimators and gradients' format. ``stages``: keywords of earlier recipes,
    such as ``[{"weights": "int4"}]``, which are trained for first, in equal shares of the epochs.

    ``teacher``: a module or function whose outputs the model learns; by default the float model, if one was given; None
    for labels alone. ``distill``: a loss's name ("kd", "dkd", "mse") or a ``Distillation``. ``loss``: of outputs and
    labels, by default cross-entropy for class numbers and squared error for others. ``calibration``: what ranges begin
    with, by default 512 training samples. ``augment``: "images" (moved and mirrored at random) or a function of inputs
    and a generator. ``held_out``: a share of the training data, or data, watched after each epoch; with ``patience``,
    training stops after that many epochs without a smaller loss there, and the best epoch's state is what it gives.

    ``optimizer``: "adamw" (1e-3), "sgd" (0.01, Nesterov momentum 0.9), a function that makes one of parameter groups,
    or an optimizer of a trainable model's parameters. ``schedule``: "cosine", "linear" or "constant", after a short
    rise. ``accumulate``: batches for each step. ``clip``: the largest norm of gradients. ``dampen``: the weight of what
    keeps weights from oscillating between codes. ``penalty``: a function of the module in training whose value is added
    to the loss, such as `fewbit.group_lasso`. ``precision``: "bfloat16" or "float16" for autocast. ``compile``:
    torch.compile for the whole step. ``parallel``: "ddp" or "fsdp", where ``torchrun`` started several processes.

    ``folder``: keeps ``last.safetensors`` after each epoch, and metrics as JSON lines, CSV and, if it is installed, for
    TensorBoard. ``resume``: go on from there, with the same result as without an interruption.

    Returns a ``QuantizedModel``, with the epochs' metrics in ``.facts["training"]``; for a float model without a
    recipe, a float one of the same class. Raises ``TrainingError``, ``DataError``, ``ModelError``, ``RecipeError``.
    """
    peers = processes(parallel)
    like = (example,) if isinstance(example, Tensor) else example or _inputs_of(model)
    share = float(held_out) if isinstance(held_out, int | float) else 0.0
    data, aside = examples(
        train, like, batch_size=batch_size, labels=True if teacher is None else None, held_out=share, augment=augment,
        workers=workers, seed=seed, processes=peers,
    )  # fmt: skip
    if not isinstance(held_out, int | float):
        aside = as_batches(held_out, what="held-out", like=like, batch_size=batch_size)
    kept = None if folder is None else Path(folder)
    if kept is not None and peers.first:
        kept.mkdir(parents=True, exist_ok=True)
    peers.wait()
    settings = Settings(
        epochs, optimizer, lr, weight_decay, schedule, accumulate, clip, precision, compile, patience, kept, resume,
        seed, progress,
    )  # fmt: skip
    distillation = distill if isinstance(distill, Distillation) else Distillation(distill)

    def learn(student: nn.Module, taught: Any, settings: Settings) -> tuple[nn.Module, list[dict[str, Any]]]:
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        with in_eval_mode(taught.to(device)) if isinstance(taught, nn.Module) else nullcontext():
            objective = Objective(student, taught, distillation, loss, dampen, penalty)
            trainer = Trainer(objective, data, aside, settings, peers, device)
            records = trainer.run()
        return trainer.model, records

    if isinstance(model, TrainableModel | QuantizedModel):
        if recipe is not None or overrides or stages:
            raise ModelError(
                "the model has a plan already: leave out the recipe, or give the float model it came from"
            )
        if training is not None and isinstance(model, TrainableModel):
            raise ModelError(
                "the model has its estimators already: name them in quantize(..., trainable=...)"
            )
        student: nn.Module = model if isinstance(model, TrainableModel) else _as_trainable(model, training)
        taught = _teacher(teacher, None)
    else:
        source = as_module(model, like)
        wanted = recipe is not None or training is not None or bool(overrides or stages)
        taught = _teacher(teacher, copy.deepcopy(source) if wanted else None)
        student = copy.deepcopy(source)
        if wanted:
            ranges = _few(train, like, share, seed) if calibration is None else calibration
            common: dict[str, Any] = {
                "example": like, "recipe": recipe or "int8", "target": target, "trainable": training or Training(),
                "seed": seed, "progress": progress,
            }  # fmt: skip
            steps = [{**overrides, **stage} for stage in stages] + [overrides]
            shares = _shares(settings, len(steps))
            for number, values in enumerate(steps):
                student = quantize(student, ranges, **common, **values)
                if number < len(stages):
                    student, _ = learn(student, taught, shares[number])
                    assert isinstance(student, TrainableModel)
                    student = student.latent_model()
            settings = shares[-1]
    student, records = learn(student, taught, settings)
    if not isinstance(student, TrainableModel):
        return student
    student.facts["training"] = records
    return student.convert()


def distill(student: nn.Module, teacher: Any, train: object, **settings: Any) -> Any:
    """A float student that learned from a teacher; both give outputs of one shape. Keywords are those of ``finetune``.

    Labels in ``train`` count only as much as ``distill=Distillation(labels=...)`` says. With a ``recipe``, or keywords
    such as ``weights="int4"``, the student is quantized and learns in codes. Raises as ``finetune`` does.
    """
    if teacher is None or isinstance(teacher, str):
        raise TrainingError(f"teacher is {teacher!r:.40}, expected a module or a function")
    return finetune(student, train, teacher=teacher, **settings)


def _as_trainable(model: QuantizedModel, training: Training | None) -> TrainableModel:
    runtime = get_target(model.target)
    return make_trainable(model, training=training or Training(), portable=runtime.portable_bounds)


def _teacher(asked: Any, source: nn.Module | None) -> Any:
    """Who teaches; by default the float model, where there is one."""
    if asked is None or callable(asked):
        return asked
    if asked == FLOAT:
        return source
    raise TrainingError(f"teacher is {asked!r:.40}, expected a module, a function, None or 'float'")


def _shares(settings: Settings, count: int) -> list[Settings]:
    """The epochs divided among stages, the last has the rest; each with a folder of its own."""
    if count == 1:
        return [settings]
    each = settings.epochs // count
    if not each:
        raise TrainingError(f"{settings.epochs} epochs for {count} stages: each needs at least one")
    folders = [
        None if settings.folder is None else settings.folder / f"stage{i + 1}" for i in range(count - 1)
    ]
    for folder in folders:
        if folder is not None:
            folder.mkdir(exist_ok=True)
    early = [replace(settings, epochs=each, folder=folder) for folder in folders]
    return [*early, replace(settings, epochs=settings.epochs - each * (count - 1))]


def _few(
    train: object, like: tuple[Tensor, ...] | None, held_out: float, seed: int
) -> list[tuple[Tensor, ...]]:
    """Training samples to estimate ranges from, the same in every process, none of those held out."""
    data, _ = examples(
        train,
        like,
        batch_size=64,
        labels=None,
        held_out=held_out,
        augment=None,
        workers=0,
        seed=seed,
        processes=Processes(),
    )
    found, count = [], 0
    for inputs, _ in data.epoch(0):
        found.append(inputs)
        count += len(inputs[0])
        if count >= _CALIBRATION:
            break
    return found


def _inputs_of(model: Any) -> tuple[Tensor, ...] | None:
    """Examples of a model's inputs, where it carries some."""
    if isinstance(model, QuantizedModel | TrainableModel):
        return model.example
    return model.meta.get("example") if isinstance(model, GraphModule) else None
