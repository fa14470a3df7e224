"""Artifacts side by side, ours and anyone's: size, latency timed in turn, accuracy and agreement in their runtimes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.data import as_batches
from fewbit.deploy import target_of
from fewbit.errors import ArtifactError, DataError
from fewbit.evaluation.latency import Latency, latency, ratio
from fewbit.evaluation.metrics import Report, evaluate
from fewbit.tables import text_table
from fewbit.targets import get_target


@dataclass
class Versus:
    """What was measured, by file; ratios are to the first one. ``str()`` is the table."""

    files: list[str]
    runtimes: dict[str, str]
    sizes: dict[str, int]
    times: dict[str, Latency]
    reports: dict[str, Report] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            name: {
                "runtime": self.runtimes[name],
                "bytes": self.sizes[name],
                "latency": self.times[name].to_json(),
                "ratio": ratio(self.times[name], self.times[self.files[0]]).to_json(),
                "report": self.reports[name].to_json() if name in self.reports else None,
            }
            for name in self.files
        }

    def __str__(self) -> str:
        header = [
            "file",
            "bytes",
            "ms",
            "quartiles",
            "x first",
            *self.metrics,
            "agreement with the first",
            "runtime",
        ]
        return text_table(header, [self._row(name) for name in self.files])

    def _row(self, name: str) -> list[str]:
        first, time = self.files[0], self.times[name]
        report = self.reports.get(name)
        values = [report.metrics[m] if report else None for m in self.metrics]
        shown = [f"{v:.4g}" if isinstance(v, float) else "-" for v in values]
        agreement = str(report.agreement) if report and report.agreement and name != first else "-"
        times = "1" if name == first else str(ratio(time, self.times[first]))
        return [
            name, f"{self.sizes[name]:,}", f"{time.median_ms:.3g}", f"{time.q1_ms:.3g} to {time.q3_ms:.3g}", times,
            *shown, agreement, self.runtimes[name],
        ]  # fmt: skip


def benchmark(
    files: Sequence[str | Path],
    data: object = None,
    *,
    metrics: Sequence[str] = (),
    batch: int = 1,
    rounds: int = 30,
) -> Versus:
    """Measure artifacts of any runtime on the same inputs, each on one thread, timed in turn.

    ``data``: inputs, or inputs and labels where there are metrics; anything that ``fewbit.evaluate`` takes. ``batch``:
    samples in one timed call. Raises ``ArtifactError`` for files that cannot be opened and ``DataError`` for inputs
    that they do not take.
    """
    if not files:
        raise ArtifactError("no files to compare: name at least one")
    paths = {str(f): Path(f) for f in files}
    targets = {name: get_target(target_of(path)) for name, path in paths.items()}
    opened = {name: targets[name].open(path) for name, path in paths.items()}
    if data is None:
        raise DataError("the files are run on data: give a few inputs, such as an .npz or .npy file")
    inputs = _few(data, batch, bool(metrics))
    calls = {name: partial(run, *inputs) for name, run in opened.items()}
    times = latency(calls, repeat=rounds)
    names = list(paths)
    result = Versus(
        names,
        {name: targets[name].runtime() for name in names},
        {name: size_of(path) for name, path in paths.items()},
        times,
        metrics=tuple(metrics),
    )
    if metrics:
        answers = {name: partial(_first, run) for name, run in opened.items()}
        for name in names:
            result.reports[name] = evaluate(answers[name], data, metrics, baseline=answers[names[0]])
    return result


def size_of(path: Path) -> int:
    """Bytes of an artifact, with the files that belong to it (an OpenVINO model is two)."""
    companions = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    return sum(p.stat().st_size for p in [path, *companions] if p.is_file())


def _few(data: object, batch: int, labels: bool) -> tuple[Tensor, ...]:
    inputs = as_batches(data, what="benchmark", like=None, labels=labels, batch_size=batch).peek()[0]
    return tuple(torch.as_tensor(x)[:batch] for x in inputs)


def _first(run: Any, *inputs: Tensor) -> Tensor:
    answer: Tensor = run(*inputs)[0]
    return answer
