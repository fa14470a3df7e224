"""What pruning did: channels, work, bytes and time before and after, as a table, JSON and a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbit.charts import line_chart, save_chart
from fewbit.evaluation.size import Sizes
from fewbit.stopwatch import RUNS_ON
from fewbit.tables import text_table


@dataclass(frozen=True)
class Kept:
    """A group of channels: how many it had and has, and why all had to stay where they had to."""

    layer: str
    before: int
    after: int
    reason: str | None


@dataclass(frozen=True)
class Timed:
    """Milliseconds of the whole model and of the smaller one on one thread of ONNX Runtime, at this batch size."""

    before_ms: float
    after_ms: float
    batch: int

    def __str__(self) -> str:
        ratio = self.before_ms / self.after_ms
        return (
            f"latency {self.before_ms:.3g} -> {self.after_ms:.3g} ms ({ratio:.2f} x faster; {RUNS_ON}, "
            f"batch {self.batch})"
        )


@dataclass(frozen=True)
class Pruning:
    """What pruning did; in ``model.meta["pruning"]``. Multiply-accumulates are of one sample.

    ``sizes_before`` and ``sizes``: bytes by tensor, buffers included. ``latency``: where the budget was one.
    """

    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    groups: tuple[Kept, ...]
    sizes_before: Sizes
    sizes: Sizes
    latency: Timed | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; bytes by tensor name, as pairs of before and after."""
        before = {each.name: each.nbytes for each in self.sizes_before.tensors}
        after = {each.name: each.nbytes for each in self.sizes.tensors}
        return {
            "macs": [self.macs_before, self.macs],
            "parameters": [self.parameters_before, self.parameters],
            "bytes": [self.sizes_before.total, self.sizes.total],
            "latency": None if self.latency is None else asdict(self.latency),
            "groups": [asdict(each) for each in self.groups],
            "tensors": {name: [count, after.get(name, 0)] for name, count in before.items()},
        }

    def plot(self, path: str | Path) -> Path:
        """Draw how many channels each layer had and has, as ``.svg``."""
        series = {
            "before": [float(each.before) for each in self.groups],
            "after": [float(each.after) for each in self.groups],
        }
        layers = [each.layer for each in self.groups]
        return save_chart(line_chart("channels of each layer", layers, series, low=0.0), path)

    def __str__(self) -> str:
        lines = [
            f"MACs {self.macs_before:,} -> {self.macs:,} ({self.macs_before / self.macs:.2f} x fewer), "
            f"parameters {self.parameters_before:,} -> {self.parameters:,}, "
            f"bytes {self.sizes_before.total:,} -> {self.sizes.total:,}"
        ]
        lines += [] if self.latency is None else [str(self.latency)]
        rows = [[g.layer, str(g.before), str(g.after), g.reason or ""] for g in self.groups]
        return "\n".join([*lines, text_table(["channels of", "before", "after", "all stay because"], rows)])


@dataclass(frozen=True)
class Zeros:
    """A weight: how many numbers it has and how many are not zero, and why it was left dense where it was."""

    weight: str
    numbers: int
    nonzero: int
    reason: str | None


@dataclass(frozen=True)
class Sparsity:
    """What pruning of single weights did; in ``model.meta["sparsity"]``."""

    structure: str
    weights: tuple[Zeros, ...]

    @property
    def share(self) -> float:
        """Of zeros, among the numbers of all weights that were not left dense."""
        pruned = [each for each in self.weights if each.reason is None]
        return 1 - sum(each.nonzero for each in pruned) / max(sum(each.numbers for each in pruned), 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        weights = [asdict(each) for each in self.weights]
        return {"structure": self.structure, "share": self.share, "weights": weights}

    def plot(self, path: str | Path) -> Path:
        """Draw the share of each weight that is not zero, as ``.svg``."""
        shares = [each.nonzero / each.numbers for each in self.weights]
        names = [each.weight for each in self.weights]
        return save_chart(
            line_chart("share of each weight that is not zero", names, {"after": shares}, low=0.0), path
        )

    def __str__(self) -> str:
        head = (
            f"{self.structure}: {self.share:.2%} of the weights are zero. The file can be smaller for it (save to "
            "*.fewbit); it is faster only in a runtime with kernels for such zeros"
        )
        rows = [
            [each.weight, f"{each.numbers:,}", f"{each.nonzero:,}", each.reason or ""]
            for each in self.weights
        ]
        return f"{head}\n{text_table(['weight', 'numbers', 'not zero', 'dense because'], rows)}"
