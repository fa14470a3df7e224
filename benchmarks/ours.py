"""fewbit's own rows: quantized, exported through its gate, run, compared with its simulation."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare
import models
import numpy as np
import torch

import fewbit


@dataclass
class Made:
    """A quantized model, its verified file and the row of the table."""

    model: Any
    file: Path
    row: compare.Row


def make(bench: compare.Bench, label: str, *, batch: int = 64, **settings: Any) -> Made:
    """Quantizes with `settings` (those of fewbit.quantize), exports, and measures on the bench's test inputs.

    Raises fewbit.FewbitError, VerificationError of the gate included: a file that is wrong gives no row.
    """
    module = models.build(bench.name, bench.weights)
    file = bench.folder / f"{re.sub('[^a-z0-9]+', '-', label.lower())}.onnx"
    started = time.perf_counter()
    quantized = fewbit.quantize(module, torch.from_numpy(bench.task.calibration), **settings)
    artifact = fewbit.export(quantized, file, time=False)
    seconds = time.perf_counter() - started
    outputs = compare.run_onnx(file, bench.task.inputs, count=batch)
    simulated = simulate(quantized, bench.task.inputs, batch)
    row = bench.row(
        label, file, outputs, seconds=seconds, simulation_sqnr_db=compare.sqnr(simulated, outputs),
        simulation_exact=bool((simulated == outputs).all()), gate=artifact.to_json()["verification"],
        settings={name: str(value) for name, value in settings.items()},
    )  # fmt: skip
    return Made(quantized, file, row)


def attempt(bench: compare.Bench, label: str, **settings: Any) -> compare.Row:
    """As `make`, but an error of fewbit becomes a row that says so."""
    try:
        return make(bench, label, **settings).row
    except fewbit.FewbitError as error:
        return {"name": label, "error": f"{type(error).__name__}: {error}"}


def simulate(model: torch.nn.Module, inputs: np.ndarray, batch: int = 64) -> np.ndarray:
    """Outputs of the fake-quantized simulation, float32."""
    with torch.inference_mode():
        return np.concatenate([model(piece).numpy() for piece in torch.from_numpy(inputs).split(batch)])
