"""What every topic of evaluation promises: light imports, and frozen, readable results in plain JSON."""

import dataclasses
import importlib
import json
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import fewbit.evaluation
from fewbit.evaluation.agreement import Agreement
from fewbit.evaluation.costs import LayerBops, LayerCost
from fewbit.evaluation.energy import Energy
from fewbit.evaluation.latency import Latency, Ratio
from fewbit.evaluation.layers import LayerError, LayerErrors
from fewbit.evaluation.measure import Candidate, Measurement
from fewbit.evaluation.memory import ActivationPeak, PeakMemory
from fewbit.evaluation.metrics import Report
from fewbit.evaluation.size import Sizes, TensorSize

TOPICS = sorted(each.name for each in pkgutil.iter_modules(fewbit.evaluation.__path__))
LATENCY = Latency(2.0, 1.0, 3.0, 1, (2.0,))
SIZES = Sizes((TensorSize("w", "float32", (2, 3), 24),), 24, 100)
ENERGY = Energy(1e-3, "estimated", "counts", assumptions=("one",))
COST = LayerCost("conv", "conv", 10, 5)
PEAK = PeakMemory(200, 100, "sampled")
CANDIDATE = Candidate(SIZES, LATENCY, PEAK, ENERGY, Ratio(0.5, 0.4, 0.6, 1))

RESULTS: list[Any] = [
    Agreement(0.5, 1.0, 0.1, float("inf")),
    ActivationPeak(1024, "conv"),
    CANDIDATE,
    COST,
    ENERGY,
    LATENCY,
    LayerBops("conv", 10, 4, 8),
    LayerErrors((LayerError("conv", "conv", float("inf"), 0.0, 0.0),)),
    Measurement(5, 10, 320, (COST,), ActivationPeak(1024, "conv"), {"model": CANDIDATE}),
    PEAK,
    Ratio(0.5, 0.4, 0.6, 1),
    Report(
        3,
        {"accuracy": 1.0, "mse": float("nan")},
        {"accuracy": 0.5, "mse": 0.1},
        Agreement(None, 0.0, 0.0, 1.0),
    ),
    SIZES,
]


def _results_in_the_package() -> set[str]:
    names = set()
    for topic in TOPICS:
        module = importlib.import_module(f"fewbit.evaluation.{topic}")
        for name, value in vars(module).items():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and dataclasses.is_dataclass(value) and hasattr(value, "to_json"):
                names.add(name)
    return names


def test_every_result_is_tried_here() -> None:
    assert _results_in_the_package() == {type(each).__name__ for each in RESULTS if hasattr(each, "to_json")}


@pytest.mark.parametrize("result", RESULTS, ids=lambda each: type(each).__name__)
def test_results_are_frozen_readable_and_plain_json(result: Any) -> None:
    json.dumps(result.to_json(), allow_nan=False)
    assert str(result).strip()
    field = dataclasses.fields(result)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, field, None)


def test_no_topic_imports_a_heavy_library() -> None:
    heavy = ("onnx", "onnxruntime", "sklearn", "torchmetrics", "psutil", "rich", "matplotlib")
    topics = ", ".join(f"fewbit.evaluation.{topic}" for topic in TOPICS)
    code = f"import sys, {topics}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
