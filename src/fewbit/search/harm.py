"""What was measured of each layer in each format, or without a share of its channels: a table, JSON and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.charts import line_chart, save_chart
from fewbit.errors import ModelError, RecipeError
from fewbit.evaluation.agreement import finite
from fewbit.registry import nearest
from fewbit.tables import text_table

METRICS = {
    "sqnr": "signal-to-noise ratio of the network's output, dB; higher is better",
    "kl": "divergence of the network's predictions from the float ones, nats a prediction",
    "hessian": "mean trace of the loss's Hessian times the squared error of the weights",
    "fisher": "squared errors of the weights, each times its Fisher information",
    "loss": "rise of the loss on the labels",
    "accuracy": "fall of the accuracy on the labels, of 1",
}
FORMAT_METRICS = ("sqnr", "kl", "hessian", "fisher")
PRUNING_METRICS = ("sqnr", "kl", "loss", "accuracy")
_LINEAR = ("sqnr", "loss", "accuracy")  # the others are drawn on a logarithmic axis


def check_metrics(metrics: Sequence[str], known: Sequence[str]) -> None:
    """Raises RecipeError for metrics that are none of these."""
    if isinstance(metrics, str) or not metrics:
        raise RecipeError(f"metrics is {metrics!r}, expected some of {', '.join(known)}")
    for name in metrics:
        if name not in known:
            raise RecipeError(f"unknown metric {name!r}: {nearest(str(name), list(known))}")


@dataclass(frozen=True)
class LayerHarm:
    """One layer's weights in one format: how many they are, their relative squared error, and the metrics by name.

    Of pruned channels the format is the share that leaves, such as "25%", and the weights are those that leave.
    """

    layer: str
    format: str
    weights: int
    error: float
    metrics: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite ratio is None."""
        return {**vars(self), "metrics": {name: finite(value) for name, value in self.metrics.items()}}


@dataclass(frozen=True)
class Sensitivity:
    """Rows in the network's order, a layer's candidates one after the other. ``str()`` is the table."""

    rows: tuple[LayerHarm, ...]
    metrics: tuple[str, ...]
    samples: int
    traces: Mapping[str, float]  # of the Hessian of each layer's weights, where it was asked for

    def row(self, layer: str, candidate: str) -> LayerHarm:
        """Raises ``ModelError`` where that layer was not measured in that format."""
        for row in self.rows:
            if (row.layer, row.format) == (layer, candidate):
                return row
        raise ModelError(
            f"no layer {layer!r} in {candidate}: {nearest(layer, sorted({r.layer for r in self.rows}))}"
        )

    def worst(self, metric: str, candidate: str, count: int = 5) -> tuple[LayerHarm, ...]:
        """The layers that mind the format most, worst first."""
        rows = [row for row in self.rows if row.format == candidate]
        return tuple(sorted(rows, key=lambda r: r.metrics[metric], reverse=metric != "sqnr")[:count])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [row.to_json() for row in self.rows]
        return {
            "samples": self.samples,
            "metrics": list(self.metrics),
            "traces": dict(self.traces),
            "rows": rows,
        }

    def plot(self, path: str | Path, metric: str | None = None) -> Path:
        """Draw one metric (the first by default) over the layers, one line a format, as ``.svg``."""
        chosen = metric or self.metrics[0]
        if chosen not in self.metrics:
            raise RecipeError(f"metric {chosen!r} was not measured: {nearest(chosen, list(self.metrics))}")
        layers = list(dict.fromkeys(row.layer for row in self.rows))
        formats = dict.fromkeys(row.format for row in self.rows)
        found = {(row.layer, row.format): row.metrics[chosen] for row in self.rows}
        series = {name: [found.get((layer, name)) for layer in layers] for name in formats}
        title = f"{chosen}: {METRICS[chosen]}"
        return save_chart(line_chart(title, layers, series, log=chosen not in _LINEAR), path)

    def __str__(self) -> str:
        header = ["layer", "format", "error", *self.metrics, "weights"]
        rows = [
            [
                row.layer,
                row.format,
                f"{row.error:.2e}",
                *(_text(row, m) for m in self.metrics),
                f"{row.weights:,}",
            ]
            for row in self.rows
        ]
        return text_table(header, rows)


def _text(row: LayerHarm, metric: str) -> str:
    value = row.metrics[metric]
    return f"{value:.1f}" if metric == "sqnr" else f"{value:.2e}"
