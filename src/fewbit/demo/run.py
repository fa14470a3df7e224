"""The demonstration: a small network quantized, exported, verified and measured on digits that it has not seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.demo.network import load
from fewbit.deploy import Artifact, export, runner
from fewbit.evaluation.metrics import Report, evaluate
from fewbit.model.lowering import lower
from fewbit.model.reference import Reference
from fewbit.pipeline import quantize

METRICS = ("accuracy", "precision", "recall", "f1")


@dataclass
class Demonstration:
    """What the demo measured: every figure comes from running the written files."""

    artifact: Artifact
    float_size: int
    floating: Report
    quantized: Report
    differing: int
    outputs: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "artifact": self.artifact.to_json(),
            "float_size": self.float_size,
            "float": self.floating.to_json(),
            "int8": self.quantized.to_json(),
            "outputs_differing_from_reference": self.differing,
            "outputs": self.outputs,
        }


def run(folder: Path) -> Demonstration:
    """Quantize the shipped digits network; write ``digits.onnx`` and ``digits.int8.onnx`` to ``folder``; compare."""
    folder.mkdir(parents=True, exist_ok=True)
    network, data = load()
    quantized = quantize(network, data.calibration_images)
    floating = export(network, folder / "digits.onnx", example=torch.from_numpy(data.test_images[:16]))
    artifact = export(quantized, folder / "digits.int8.onnx")
    test = (data.test_images, data.test_labels)
    runs = {name: runner(path) for name, path in (("float", floating.path), ("int8", artifact.path))}
    float_report = evaluate(runs["float"], test, METRICS)
    int8_report = evaluate(runs["int8"], test, METRICS, baseline=runs["float"])
    expected = Reference(lower(quantized))(torch.from_numpy(data.test_images))
    actual = runs["int8"](torch.from_numpy(data.test_images))
    differing = int((expected != actual).sum())
    return Demonstration(artifact, floating.size, float_report, int8_report, differing, actual.numel())
