"""Training from the outside: a quantized, pruned or float model learns from data, from a teacher, or from both."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.data import as_batches
from fewbit.errors import ModelError, TrainingError
from fewbit.model.readers import as_module
from fewbit.model.simulate import QuantizedModel
from fewbit.pipeline import quantize
from fewbit.plan import Recipe
from fewbit.training.examples import Augment, examples
from fewbit.training.loop import MakeOptimizer, Settings, Trainer
from fewbit.training.model import TrainableModel, Training, make_trainable
from fewbit.training.objective import Distillation, LabelLoss, Objective
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
    else trained as it is, as a copy. ``train``: inputs and labels, in the forms that ``quantize`` takes; arrays and data
    sets are shuffled. ``training``: estimators and gradients' format. ``stages``: keywords of earlier recipes, such as
    ``[{"weights": "int4"}]``, which are trained for first, in equal shares of the epochs.

    ``teacher``: a module or function whose outputs the model learns; by default the float model, if one was given; None
    for labels alone. ``distill``: a loss's name ("kd", "dkd", "mse") or a ``Distillation``. ``loss``: of outputs and
    labels, by default cross-entropy for class numbers and squared error for others. ``calibration``: what ranges begin
    with, by default 512 training samples. ``augment``: "images" (moved and mirrored at random) or a function of inputs
    and a generator. ``held_out``: a share of the training data, or data, watched after each epoch; with ``patience``,
    training stops after that many epochs without a smaller loss there, and the best epoch's state is what it gives.

    ``optimizer``: "adamw" (1e-3), "sgd" (0.01, Nesterov momentum 0.9), a function that makes one of parameter groups,
    or an optimizer of a trainable model's parameters. ``schedule``: "cosine", "linear" or "constant", after a short
    rise. ``accumulate``: batches for each step. ``clip``: the largest norm of gradients. ``dampen``: the weight of what
    keeps weights from oscillating between codes. ``precision``: "bfloat16" or "float16" for autocast. ``compile``:
    torch.compile for the whole step. ``parallel``: "ddp" or "fsdp", where ``torchrun`` started several processes.

    ``folder``: keeps ``last.safetensors`` after each epoch, and metrics as JSON lines, CSV and, if it is installed, for
    TensorBoard. ``resume``: go on from there, with the same result as without an interruption.

    Returns a ``QuantizedModel``, with the epochs' metrics in ``.facts["training"]``; for a float model without a
    recipe, a float one of the same class. Raises ``TrainingError``, ``DataError``, ``ModelError``, ``RecipeError``.
    """
    peers = processes(parallel)
    wanted = recipe is not None or bool(overrides)
    examples_ = (example,) if isinstance(example, Tensor) else example
    like = examples_ or _inputs_of(model)
    needs_labels = None if teacher is not None else True
    share = held_out if isinstance(held_out, int | float) else 0.0
    data, aside = examples(
        train, like, batch_size=batch_size, labels=needs_labels, held_out=float(share), augment=augment,
        workers=workers, seed=seed, processes=peers,
    )  # fmt: skip
    if aside is None and not isinstance(held_out, int | float):
        aside = as_batches(held_out, what="held-out", like=like, batch_size=batch_size)
    kept = None if folder is None else Path(folder)
    if kept is not None and peers.first:
        kept.mkdir(parents=True, exist_ok=True)
    peers.wait()
    settings = Settings(
        epochs, optimizer, lr, weight_decay, schedule, accumulate, clip, precision, compile, patience, kept, resume, seed,
        progress,
    )  # fmt: skip
    settings.check()
    distillation = distill if isinstance(distill, Distillation) else Distillation(distill)

    student, teacher = _student(
        model, wanted, recipe or "int8", target, training, calibration, examples_, train, seed, progress, teacher, like,
        overrides,
    )  # fmt: skip
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    with _resting(teacher, device) as taught:
        trainer = Trainer(
            Objective(student, taught, distillation, loss, dampen), data, aside, settings, peers, device
        )
        records = trainer.run()
    student = trainer.model
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


def _student(
    model: Any,
    wanted: bool,
    recipe: Recipe | str | Path,
    target: str,
    training: Training | None,
    calibration: object,
    example: tuple[Tensor, ...] | None,
    train: object,
    seed: int,
    progress: bool,
    teacher: Any,
    like: tuple[Tensor, ...] | None,
    overrides: dict[str, Any],
) -> tuple[nn.Module, Any]:
    """The module to train, and its teacher."""
    given = isinstance(teacher, str)
    if given and teacher != FLOAT:
        raise TrainingError(f"teacher is {teacher!r:.40}, expected a module, a function, None or 'float'")
    if isinstance(model, TrainableModel | QuantizedModel):
        if wanted:
            raise ModelError("the model has a plan already: leave out the recipe, or give the float model it came from")
        if isinstance(model, QuantizedModel):
            model = make_trainable(model, training=training or Training())
        return model, None if given else teacher
    if not wanted:
        student = copy.deepcopy(as_module(model, example))
        return student, None if given else teacher
    source = as_module(model, example)
    if calibration is None:
        calibration = _few(train, like, seed)
    student = quantize(
        source, calibration, example=example, recipe=recipe, target=target, trainable=training or Training(), seed=seed,
        progress=progress, **overrides,
    )  # fmt: skip
    return student, copy.deepcopy(source) if given else teacher


def _few(train: object, like: tuple[Tensor, ...] | None, seed: int) -> list[tuple[Tensor, ...]]:
    """Training samples to estimate ranges from, the same in every process."""
    data, _ = examples(
        train, like, batch_size=64, labels=None, held_out=0.0, augment=None, workers=0, seed=seed, processes=Processes()
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


@contextmanager
def _resting(teacher: Any, device: torch.device) -> Iterator[Any]:
    """The teacher in eval mode, on the device, and as it was afterwards."""
    if teacher is None or not isinstance(teacher, nn.Module):
        if teacher is not None and not callable(teacher):
            raise TrainingError(f"teacher is a {type(teacher).__name__}, expected a module or a function")
        yield teacher
        return
    modes = {part: part.training for part in teacher.modules()}
    try:
        yield teacher.eval()
    finally:
        for part, mode in modes.items():
            part.training = mode


