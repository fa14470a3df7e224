"""Quality of a model on labelled data, streamed over batches: accuracy, F1, perplexity, ... and agreement."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbit.data import Batches, as_batches
from fewbit.errors import DataError, RecipeError
from fewbit.evaluation.agreement import Agreement, AgreementMeter, finite
from fewbit.evaluation.forward import Forward, Model, eval_mode, input_count
from fewbit.registry import nearest

IGNORED = -100  # the label that torch's losses skip, used for padding in sequences

Value = float | list[list[int]]


@dataclass(frozen=True)
class Settings:
    """How metrics count.

    `average` is over classes ("macro", "micro", "weighted"); an output of one number a sample means class
    1 above `threshold` (0 for logits, 0.5 for probabilities).
    """

    average: str = "macro"
    top_k: int = 5
    threshold: float = 0.0


@dataclass(frozen=True)
class Report:
    """Metrics of a model, those of its baseline on the same data, and how far the two agree."""

    samples: int
    metrics: dict[str, Value]
    baseline: dict[str, Value] | None = None
    agreement: Agreement | None = None
    settings: Settings = field(default_factory=Settings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite is None."""
        return {
            "samples": self.samples,
            "metrics": _plain(self.metrics),
            "baseline": None if self.baseline is None else _plain(self.baseline),
            "agreement": None if self.agreement is None else self.agreement.to_json(),
            "settings": vars(self.settings).copy(),
        }

    def __str__(self) -> str:
        lines = [f"{self.samples} samples"]
        for name, value in self.metrics.items():
            before = "" if self.baseline is None else f"   (baseline {_text(name, self.baseline[name])})"
            lines.append(f"{name:<16} {_text(name, value)}{before}")
        if self.agreement is not None:
            lines.append(f"{'agreement':<16} {self.agreement}")
        return "\n".join(lines)


def evaluate(
    model: Model,
    test: object,
    metrics: Sequence[str] = ("accuracy",),
    baseline: Model | None = None,
    *,
    batch_size: int = 64,
    settings: Settings | None = None,
    output: int | str | None = None,
    progress: Callable[[Iterable[Any], int | None], Iterable[Any]] | None = None,
) -> Report:
    """Measure a model's quality on `test`, in one pass and bounded memory.

    model, baseline: a module (run in eval mode on its own device, its modes restored) or any function from
        input tensors to outputs: scores [N, classes], [N, classes, ...] or [N, length, classes], or one
        number a sample.
    test: whatever `fewbit.data.as_batches` takes, with labels if there are metrics.
    metrics: accuracy, top_k, precision, recall, f1, confusion_matrix (rows: true class), mse, perplexity.
        A class that neither occurs nor is predicted does not count in an average. Labels of -100 are skipped.
    output: which output, for a model that gives several.
    progress: wraps the batches to show progress, called with them and their number if known.

    Raises RecipeError for an unknown metric or setting, DataError for unfit data, ModelError where a model
    fails.
    """
    settings = settings or Settings()
    _check(metrics, settings, baseline)
    runners = [Forward(model, "the model", output)]
    if baseline is not None:
        runners.append(Forward(baseline, "the baseline", output))
    batches = as_batches(
        test,
        what="test",
        batch_size=batch_size,
        labels=True if metrics else None,
        like=getattr(model, "example", None),
        n_inputs=input_count(model),
        dtype=runners[0].dtype,
    )
    with eval_mode(model), eval_mode(baseline if baseline is not None else model):
        return _run(runners, batches, metrics, settings, progress)


def _run(
    runners: list[Forward],
    batches: Batches,
    names: Sequence[str],
    settings: Settings,
    progress: Callable[[Iterable[Any], int | None], Iterable[Any]] | None,
) -> Report:
    scorers = [_Scorer(names, settings, runner.name) for runner in runners]
    meter = AgreementMeter()
    samples = 0
    for index, (inputs, target) in enumerate(progress(batches, batches.length) if progress else batches):
        outputs = [runner(inputs, index) for runner in runners]
        samples += len(inputs[0])
        for scorer, answer in zip(scorers, outputs, strict=True):
            if target is not None and names:
                scorer.update(answer, target, index)
        if len(outputs) == 2:
            meter.update(outputs[1], outputs[0], _class_axis(outputs[0], target))
    results = [scorer.compute() for scorer in scorers]
    pair = len(runners) == 2
    return Report(
        samples, results[0], results[1] if pair else None, meter.compute() if pair else None, settings
    )


class _Metric(Protocol):
    def update(self, preds: Tensor, target: Tensor) -> None: ...

    def compute(self) -> Tensor: ...


class _Scorer:
    """The wanted metrics of one model; built at the first batch, which tells the number of classes."""

    def __init__(self, names: Sequence[str], settings: Settings, model: str) -> None:
        self.names = names
        self.model = model
        self.settings = settings
        self.metrics: dict[str, _Metric] = {}
        self.classes: int | None = None

    def update(self, output: Tensor, target: Tensor, batch: int) -> None:
        of_values = [name for name in self.names if name == "mse"]
        of_classes = [name for name in self.names if name != "mse"]
        if of_values:
            values, wanted = _values(output, target, batch, self.model)
            self._metric("mse", 0).update(values, wanted)
        if of_classes:
            scores, labels = _scores(output, target, batch, self.settings.threshold, self.model)
            self.classes = self.classes or scores.shape[1]
            if scores.shape[1] != self.classes:
                raise DataError(
                    f"{self.model} gives {scores.shape[1]} classes for batch {batch}, after {self.classes}"
                )
            if len(labels):
                for name in of_classes:
                    self._metric(name, self.classes).update(scores, labels)

    def _metric(self, name: str, classes: int) -> _Metric:
        if name not in self.metrics:
            self.metrics[name] = METRICS[name](classes, self.settings)
        return self.metrics[name]

    def compute(self) -> dict[str, Value]:
        missing = [name for name in self.names if name not in self.metrics]
        if missing and self.classes is not None:
            raise DataError(f"test data has no label other than {IGNORED}: {missing[0]} is undefined")
        computed = {name: self.metrics[name].compute() for name in self.names}
        return {name: x.tolist() if x.ndim else float(x) for name, x in computed.items()}


class _Perplexity:
    """exp of the mean negative log-likelihood; by log-softmax, since a softmax would underflow first."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total += float(torch.nn.functional.cross_entropy(preds, target, reduction="none").double().sum())
        self.count += len(target)

    def compute(self) -> Tensor:
        return torch.tensor(self.total / self.count, dtype=torch.float64).exp()


def _classification(name: str) -> Callable[[int, Settings], _Metric]:
    def make(classes: int, settings: Settings) -> _Metric:
        import torchmetrics.classification as library

        return getattr(library, f"Multiclass{name}")(classes, average=settings.average)

    return make


def _accuracy(classes: int, settings: Settings, top_k: int = 1) -> _Metric:
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(classes, top_k=top_k, average="micro")


def _top_k(classes: int, settings: Settings) -> _Metric:
    return _accuracy(classes, settings, min(settings.top_k, classes))


def _confusion_matrix(classes: int, settings: Settings) -> _Metric:
    from torchmetrics.classification import MulticlassConfusionMatrix

    return MulticlassConfusionMatrix(classes)


def _mse(classes: int, settings: Settings) -> _Metric:
    from torchmetrics.regression import MeanSquaredError

    return MeanSquaredError().set_dtype(torch.float64)


METRICS: dict[str, Callable[[int, Settings], _Metric]] = {
    "accuracy": _accuracy,
    "top_k": _top_k,
    "precision": _classification("Precision"),
    "recall": _classification("Recall"),
    "f1": _classification("F1Score"),
    "confusion_matrix": _confusion_matrix,
    "mse": _mse,
    "perplexity": lambda classes, settings: _Perplexity(),
}


def _check(metrics: Sequence[str], settings: Settings, baseline: Model | None) -> None:
    if isinstance(metrics, str):
        raise RecipeError(f"metrics is the text {metrics!r}, expected a list: metrics=[{metrics!r}]")
    for name in metrics:
        if name not in METRICS:
            raise RecipeError(f"unknown metric {name!r}: {nearest(str(name), list(METRICS))}")
    if not metrics and baseline is None:
        raise RecipeError("there is nothing to evaluate: name metrics or give a baseline")
    if settings.average not in ("macro", "micro", "weighted"):
        raise RecipeError(f"unknown average {settings.average!r}: available: macro, micro, weighted")
    if settings.top_k < 1:
        raise RecipeError(f"top_k is {settings.top_k}, expected at least 1")


def _class_axis(output: Tensor, target: Tensor | None) -> int | None:
    """The dimension that runs over classes: of sequences the last, of images the second; or None."""
    if output.ndim < 2 or output.shape[1:].numel() == 1:
        return None
    last, second = output.ndim - 1, 1
    if target is not None and target.shape == output.shape[:1] + output.shape[2:]:
        # A square output [N, L, L] fits both ways; then the usual one of its rank is meant.
        return last if output.ndim == 3 and target.shape == output.shape[:-1] else second
    if target is not None and target.shape == output.shape[:-1]:
        return last
    return last if output.ndim <= 3 else second


def _scores(
    output: Tensor, target: Tensor, batch: int, threshold: float, model: str
) -> tuple[Tensor, Tensor]:
    """Scores [M, classes] and labels [M] of one batch, skipped labels left out; raises DataError."""
    where = f"test data: batch {batch} has labels of shape {tuple(target.shape)}"
    if target.is_floating_point():
        raise DataError(f"{where} and dtype {str(target.dtype)[6:]}, expected integers: class numbers from 0")
    axis = _class_axis(output, target)
    if axis is None:
        # One number a sample: two classes, told apart by a threshold.
        score = output.reshape(-1).float() - threshold
        scores = torch.stack([-score, score], dim=1)
        expected: tuple[int, ...] = (len(output),)
        fits = target.numel() == len(score)
    else:
        moved = output.movedim(axis, -1)
        scores = moved.reshape(-1, moved.shape[-1]).float()
        expected = tuple(moved.shape[:-1])
        fits = tuple(target.shape) == expected or (
            target.numel() == len(scores) and target.shape[1:].numel() == 1
        )
    if not fits:
        hint = (
            ": one-hot labels must become class numbers, y.argmax(1)" if target.shape == output.shape else ""
        )
        raise DataError(
            f"{where}, but {model}'s output of shape {tuple(output.shape)} needs {expected}{hint}"
        )
    labels = target.reshape(-1).long()
    wrong = ((labels < 0) | (labels >= scores.shape[1])) & (labels != IGNORED)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise DataError(
            f"test data: batch {batch} has the label {int(labels[at])} at position {at}, but {model} gives "
            f"{scores.shape[1]} classes (0..{scores.shape[1] - 1})"
        )
    kept = labels != IGNORED
    return scores[kept], labels[kept]


def _values(output: Tensor, target: Tensor, batch: int, model: str) -> tuple[Tensor, Tensor]:
    """Outputs and wanted values of one shape, float64; raises DataError."""
    if output.shape != target.shape and output.squeeze(-1).shape != target.shape:
        raise DataError(
            f"test data: batch {batch} has targets of shape {tuple(target.shape)}, but {model}'s output "
            f"has shape {tuple(output.shape)}: the mean squared error needs one target for each output"
        )
    return output.reshape(target.shape).double(), target.double()


def _plain(metrics: dict[str, Value]) -> dict[str, Any]:
    return {name: finite(value) if isinstance(value, float) else value for name, value in metrics.items()}


def _text(name: str, value: Value) -> str:
    if isinstance(value, list):
        width = max((len(str(each)) for row in value for each in row), default=1)
        return "".join("\n  " + " ".join(f"{each:>{width}}" for each in row) for row in value)
    if name in ("mse", "perplexity") or math.isnan(value):
        return f"{value:.6g}"
    return f"{100 * value:.2f} %"
