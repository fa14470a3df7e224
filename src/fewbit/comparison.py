"""A model beside a smaller one made from it: work, bytes, latency in two runtimes, and metrics on labelled data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import stopwatch
from fewbit.data import as_batches
from fewbit.errors import DataError
from fewbit.evaluation.costs import macs
from fewbit.evaluation.latency import Latency, latency, ratio
from fewbit.evaluation.measure import graph_of
from fewbit.evaluation.metrics import Report, evaluate
from fewbit.evaluation.size import Sizes, size_by_tensor
from fewbit.model.graph import in_eval_mode
from fewbit.model.readers import as_module
from fewbit.tables import text_table

Pair = tuple[Latency, Latency]


@dataclass(frozen=True)
class Comparison:
    """Pairs are before and after; ``macs`` are of one sample, ``times`` by runtime. ``str()`` is the table."""

    macs: tuple[int, int]
    parameters: tuple[int, int]
    sizes: tuple[Sizes, Sizes]
    batch: int
    times: dict[str, Pair] = field(default_factory=dict)
    report: Report | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "macs": list(self.macs),
            "parameters": list(self.parameters),
            "bytes": [each.total for each in self.sizes],
            "tensors": [each.to_json()["tensors"] for each in self.sizes],
            "batch": self.batch,
            "latency": {
                name: {"before": a.to_json(), "after": b.to_json(), "ratio": ratio(b, a).to_json()}
                for name, (a, b) in self.times.items()
            },
            "report": None if self.report is None else self.report.to_json(),
        }

    def __str__(self) -> str:
        counts = {
            "MACs a sample": self.macs,
            "parameters": self.parameters,
            "bytes": tuple(each.total for each in self.sizes),
        }
        rows = [[name, f"{a:,}", f"{b:,}", f"{b / a:.3f} x" if a else ""] for name, (a, b) in counts.items()]
        for name, (before, after) in self.times.items():
            what = f"ms, batch {self.batch}, {name}"
            rows.append(
                [what, f"{before.median_ms:.3g}", f"{after.median_ms:.3g}", str(ratio(after, before))]
            )
        if self.report is not None and self.report.baseline is not None:
            for name, value in self.report.metrics.items():
                rows.append([name, _text(self.report.baseline[name]), _text(value), ""])
        table = text_table(["", "before", "after", "after / before"], rows)
        agreement = self.report and self.report.agreement
        return f"{table}\nagreement: {agreement}" if agreement else table


def compare(
    model: Any,
    smaller: Any,
    example: Tensor | tuple[Tensor, ...] | None = None,
    *,
    test: object = None,
    metrics: Sequence[str] = ("accuracy",),
    times: bool = True,
    rounds: int = 15,
) -> Comparison:
    """Measure a float model and what was pruned from it, side by side.

    ``example``: one input, or a tuple of them, with the batch size to be timed; by default the first sample of
    ``test``. ``test``: inputs and labels; without them there are no metrics. ``times``: latency in PyTorch, on the
    threads that it is set to, and in ONNX Runtime, on one; both models in turn, in so many rounds. Raises
    ``DataError``, ``ModelError``, ``RecipeError``.
    """
    pair = as_module(model, example), as_module(smaller, example)
    if example is None:
        if test is None:
            raise DataError("compare runs both models: give an example input, or test=(inputs, labels)")
        first = as_batches(test, what="test", like=getattr(pair[1], "meta", {}).get("example")).peek()[0]
        inputs = tuple(x[:1] for x in first)
    else:
        inputs = (example,) if isinstance(example, Tensor) else example
    with in_eval_mode(pair[0]), in_eval_mode(pair[1]):
        graphs = tuple(graph_of(each, inputs) for each in pair)
        costs = [macs(each) for each in graphs]
        found: dict[str, Pair] = {}
        if times:
            whole = stopwatch.timed({n: (gm.eval(), inputs) for n, gm in enumerate(graphs)}, rounds)
            found[stopwatch.RUNS_ON] = whole[0], whole[1]
            called = latency({n: _called(each, inputs) for n, each in enumerate(pair)}, repeat=rounds)
            threads = torch.get_num_threads()
            found[f"PyTorch, {threads} thread{'s' if threads > 1 else ''}"] = called[0], called[1]
    return Comparison(
        (sum(each.macs for each in costs[0]), sum(each.macs for each in costs[1])),
        (_parameters(pair[0]), _parameters(pair[1])),
        (size_by_tensor(pair[0]), size_by_tensor(pair[1])),
        len(inputs[0]),
        found,
        None if test is None else evaluate(pair[1], test, metrics, baseline=pair[0]),
    )


def _called(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return partial(torch.inference_mode()(model), *inputs)


def _parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
