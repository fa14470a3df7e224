"""One quantized model, many artifacts: written for every runtime, verified and measured there, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbit.data import as_batches
from fewbit.deploy import Artifact, export
from fewbit.errors import ArtifactError, DataError, FewbitError, TargetError
from fewbit.evaluation.agreement import brief
from fewbit.evaluation.metrics import Report, evaluate
from fewbit.model.simulate import QuantizedModel
from fewbit.tables import text_table
from fewbit.targets import get_target
from fewbit.versus import Opened


@dataclass
class Fleet:
    """What ``export_all`` wrote, by target; ``failed`` says why a target has nothing. ``str()`` is the table."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    failed: dict[str, FewbitError] = field(default_factory=dict)
    metric: str = "accuracy"

    def __getitem__(self, target: str) -> Artifact:
        if target in self.failed:
            raise self.failed[target]
        return self.artifacts[target]

    def to_json(self) -> dict[str, Any]:
        return {
            "artifacts": {name: a.to_json() for name, a in self.artifacts.items()},
            "reports": {name: r.to_json() for name, r in self.reports.items()},
            "failed": {name: str(error) for name, error in self.failed.items()},
        }

    def __str__(self) -> str:
        header = [
            "target",
            "bytes",
            "ms",
            "x float",
            "coverage",
            self.metric,
            "agreement with the simulation",
        ]
        rows = [self._row(name, artifact) for name, artifact in self.artifacts.items()]
        lines = [text_table(header, rows)] if rows else []
        lines += [f"{name}: not written: {error}" for name, error in self.failed.items()]
        lines += [f"{name}: {note}" for name, a in self.artifacts.items() for note in a.notes]
        return "\n".join(lines)

    def _row(self, name: str, artifact: Artifact) -> list[str]:
        times = artifact.latency
        quantized, floating = times.get("quantized"), times.get("float")
        ratio = f"{quantized.median_ms / floating.median_ms:.2f}" if quantized and floating else "-"
        check = artifact.verification
        report = self.reports.get(name)
        value = report.metrics.get(self.metric) if report else None
        return [
            name,
            f"{artifact.size:,}",
            f"{quantized.median_ms:.3g}" if quantized else "-",
            ratio,
            check.short_coverage() if check else "not verified",
            f"{100 * value:.2f} %" if isinstance(value, float) else "-",
            brief(report.agreement) if report and report.agreement else "-",
        ]


def export_all(
    model: QuantizedModel,
    folder: str | Path,
    targets: Sequence[str],
    *,
    test: object = None,
    metric: str = "accuracy",
    name: str = "model",
    verify: bool = True,
    time: bool = True,
) -> Fleet:
    """Write ``model`` for each target into ``folder`` (made if it is not there), as ``<name><suffix>``.

    ``test``: labelled data; then the metric is measured in each target's own runtime, and how far its answers agree
    with the quantized model in PyTorch. A target that fails is listed with its error; the others are kept. Raises
    ``TargetError`` for an unknown target and where every target fails, ``DataError`` for data of the wrong shape.
    """
    folder = Path(folder)
    files = _files(folder, name, targets)
    if test is not None:
        _check_test(model, test, len(files))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be made ({error.strerror or error})") from error
    fleet = Fleet(metric=metric)
    for target, path in files.items():
        try:
            fleet.artifacts[target] = export(model, path, target=target, verify=verify, time=time)
        except FewbitError as error:
            fleet.failed[target] = error
        except Exception as error:  # a runtime's own: the other targets go on
            text = str(error).splitlines()[0][:300] if str(error) else ""
            fleet.failed[target] = TargetError(f"{path}: {target} failed with {type(error).__name__}: {text}")
            fleet.failed[target].__cause__ = error
    for target, artifact in fleet.artifacts.items() if test is not None else ():
        try:
            fleet.reports[target] = evaluate(
                Opened(artifact.path, model.example), test, (metric,), baseline=model
            )
        except FewbitError as error:
            artifact.notes.append(f"not evaluated: {error}")
    if not fleet.artifacts:
        reasons = "\n".join(f"  {target}: {error}" for target, error in fleet.failed.items())
        raise TargetError(f"no target could be written:\n{reasons}")
    return fleet


def _check_test(model: QuantizedModel, test: object, runs: int) -> None:
    """Raise ``DataError`` before anything is written, not once for each target."""
    batches = as_batches(test, what="test", labels=True, like=model.example)
    if batches.one_shot:
        raise DataError(
            f"test data is a generator, which can be read once, and {runs} files are to be run on it: give arrays, "
            "a list of batches or a DataLoader instead"
        )
    batches.peek()


def _files(folder: Path, name: str, targets: Sequence[str]) -> dict[str, Path]:
    """A path for each target; two with one suffix are told apart by their name."""
    if isinstance(targets, str) or not targets:
        raise TargetError(f'targets: {targets!r} found; expected a list of names, such as ["onnx", "litert"]')
    suffixes = {target: get_target(target).SUFFIX for target in targets}
    taken: set[str] = set()
    files = {}
    for target, suffix in suffixes.items():
        files[target] = folder / (f"{name}.{target}{suffix}" if suffix in taken else f"{name}{suffix}")
        taken.add(suffix)
    return files
