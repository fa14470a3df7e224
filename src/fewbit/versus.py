"""Artifacts side by side, ours and anyone's: size, latency timed in turn, accuracy and agreement in their runtimes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.data import as_batches
from fewbit.deploy import target_of
from fewbit.errors import ArtifactError, DataError, FewbitError, TargetError
from fewbit.evaluation.agreement import brief
from fewbit.evaluation.latency import Latency, latency, ratio
from fewbit.evaluation.metrics import Report, evaluate
from fewbit.tables import text_table
from fewbit.targets import Runner, get_target


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
        agreement = brief(report.agreement) if report and report.agreement and name != first else "-"
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
    samples in one timed call. Raises ``ArtifactError`` for files that cannot be opened, ``TargetError`` for a file that
    does not take the data, and ``DataError`` for data that cannot be read.
    """
    if not files:
        raise ArtifactError("no files to compare: name at least one")
    if data is None:
        raise DataError("the files are run on data: give a few inputs, such as an .npz or .npy file")
    paths = {str(f): Path(f) for f in files}
    names = list(paths)
    targets = {name: get_target(target_of(path)) for name, path in paths.items()}
    opened = {name: Opened(path) for name, path in paths.items()}
    inputs = _few(data, batch, bool(metrics))
    times = latency({name: partial(run, *inputs) for name, run in opened.items()}, repeat=rounds)
    result = Versus(
        names,
        {name: targets[name].runtime() for name in names},
        {name: size_of(path) for name, path in paths.items()},
        times,
        metrics=tuple(metrics),
    )
    if metrics:
        for name in names:
            result.reports[name] = evaluate(opened[name], data, metrics, baseline=opened[names[0]])
    return result


class Opened:
    """A file ready to run. Whatever its runtime raises becomes an error that names the file.

    ``example``: what the model was read with; it tells ``evaluate`` how many inputs there are, and of which types.
    """

    def __init__(self, path: Path, example: tuple[Tensor, ...] | None = None) -> None:
        self.path, self.example = path, example
        try:
            self.run: Runner = get_target(target_of(path)).open(path)
        except FewbitError:
            raise
        except Exception as error:
            raise ArtifactError(f"{path}: cannot be opened ({_first_line(error)})") from error

    def __call__(self, *inputs: Tensor) -> Tensor:
        try:
            return self.run(*inputs)[0]
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise TargetError(
                f"{self.path}: does not run on inputs of shape {shapes}: {_first_line(error)}"
            ) from error


def size_of(path: Path) -> int:
    """Bytes of an artifact, with the files beside it that belong to it: an OpenVINO model is two."""
    companions = (
        [path.with_suffix(".bin")] if path.suffix == ".xml" else [path.with_name(f"{path.name}.data")]
    )
    return sum(p.stat().st_size for p in [path, *companions] if p.is_file())


def _few(data: object, batch: int, labels: bool) -> tuple[Tensor, ...]:
    """The first inputs. A generator could not be read again, once for each file."""
    batches = as_batches(data, what="benchmark", labels=labels, batch_size=batch)
    if batches.one_shot:
        raise DataError(
            "benchmark data is a generator, which can be read once: give arrays or a list of batches"
        )
    inputs = tuple(x[:batch] for x in batches.peek()[0])
    if len(inputs[0]) < batch:
        raise DataError(f"benchmark data has {len(inputs[0])} samples in its first batch; expected {batch}")
    return inputs


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
