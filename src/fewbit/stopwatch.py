"""Latency of float graphs in the runtime that they are meant for, timed in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.fx import GraphModule

from fewbit.errors import FewbitError
from fewbit.evaluation.latency import Latency, latency
from fewbit.model.lowering import lower
from fewbit.model.simulate import QuantizedModel
from fewbit.plan import Plan
from fewbit.targets import get_target

Name = TypeVar("Name", bound=Hashable)
TARGET = "onnx"
Progress = Callable[[Iterable[int], int], Iterable[int]]
RUNS_ON = "ONNX Runtime, 1 thread"


def timed(
    graphs: Mapping[Name, tuple[GraphModule, tuple[Tensor, ...]]],
    rounds: int = 9,
    *,
    skip: bool = False,
    progress: Progress | None = None,
) -> dict[Name, Latency]:
    """Milliseconds of one call of each graph on its inputs: ONNX Runtime, float32, one thread, in interleaved rounds.

    Each round visits all of them in a new order, for 20 ms each. Raises ``FewbitError`` for a graph that cannot be
    written; with ``skip`` such a graph is left out. ``progress`` wraps the rounds.
    """
    runtime = get_target(TARGET)
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[Name, Callable[[], object]] = {}
        for number, (name, (gm, inputs)) in enumerate(graphs.items()):
            file = Path(folder) / f"{number}{runtime.SUFFIX}"
            floating = QuantizedModel(gm, Plan(()), {}, frozenset(), inputs)
            try:
                runtime.write(runtime.prepare(lower(floating)), file, {})
                runs[name] = partial(runtime.open(file), *inputs)
            except FewbitError:
                if not skip:
                    raise
        # One thread: no workers that spin on after a visit, and nothing to wait for.
        return latency(runs, repeat=rounds, pause=0.0, progress=progress) if runs else {}
