"""What a model and its artifacts cost, all at once: bytes, operations, latency, memory and energy."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import ArtifactError, ModelError
from fewbit.evaluation.costs import Bits, LayerCost, activation_bits, bits_of, bops, macs
from fewbit.evaluation.energy import RAPL, Energy, energy
from fewbit.evaluation.forward import eval_mode
from fewbit.evaluation.latency import Latency, Ratio, latency, ratio
from fewbit.evaluation.memory import ActivationPeak, PeakMemory, activation_peak_bytes, peak_memory
from fewbit.evaluation.size import Sizes, size_by_tensor

MODEL = "model"


@dataclass(frozen=True)
class Artifact:
    """A file made from the model, and how to run it: `run` takes the example's tensors.

    `bits` (layer -> weight and activation bits) is for an energy estimate; None = those of the measured
    model, {} = float.
    """

    path: str | Path
    run: Callable[..., object]
    bits: Bits | None = None


@dataclass(frozen=True)
class Candidate:
    """Costs of one way to run the model. `times_model` is its latency as a multiple of the module's."""

    size: Sizes
    latency: Latency
    memory: PeakMemory
    energy: Energy
    times_model: Ratio | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: None if part is None else part.to_json() for name, part in vars(self).items()}


@dataclass(frozen=True)
class Measurement:
    """Costs of a model (`layers` for one sample, `activations` an estimate) and of each candidate."""

    params: int
    macs: int
    bops: int
    layers: tuple[LayerCost, ...]
    activations: ActivationPeak
    candidates: dict[str, Candidate]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "params": self.params,
            "macs": self.macs,
            "bops": self.bops,
            "layers": [each.to_json() for each in self.layers],
            "activations": self.activations.to_json(),
            "candidates": {name: each.to_json() for name, each in self.candidates.items()},
        }

    def __str__(self) -> str:
        lines = [
            f"{self.params:,} parameters, {self.macs:,} MACs, {self.bops:,} BOPs a sample",
            f"activations {self.activations}",
        ]
        for name, each in self.candidates.items():
            beside = "" if each.times_model is None else f", {each.times_model} the module's"
            stored = each.size.total if each.size.file is None else each.size.file
            lines += [
                f"{name}",
                f"  size     {stored:,} bytes",
                f"  latency  {each.latency}{beside}",
                f"  memory   {each.memory}",
                f"  energy   {each.energy}",
            ]
        return "\n".join(lines)


def measure(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    artifacts: Mapping[str, Artifact] | None = None,
    repeat: int = 20,
    seconds: float | None = 10.0,
    energy_seconds: float = 1.0,
    pause: float = 0.05,
    rapl: Path = RAPL,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Measurement:
    """Measure a module, and beside it the files made from it.

    model: an nn.Module (read by fewbit to count operations), a graph in standard form or a quantized model.
    example: the inputs to run it on, on the model's device; batch size as it is to be measured.
    artifacts: by name, files and how to run them; timed in turn with the module (called "model").
    repeat, seconds, pause: as in `latency`. energy_seconds: how long each candidate runs if energy can
    be measured.

    Raises ModelError where the model cannot be read or fails, ArtifactError for a file that cannot be.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    files = dict(artifacts or {})
    if MODEL in files:
        raise ArtifactError(
            f"an artifact is called {MODEL!r}, which is the module's own name: choose another"
        )
    graph = graph_of(model, inputs)
    layers = tuple(macs(graph))
    own = bits_of(model)
    with eval_mode(model):
        runs: dict[str, Callable[[], object]] = {MODEL: _closure(model, inputs)}
        runs |= {name: _bind(file.run, inputs) for name, file in files.items()}
        for name, run in runs.items():
            _try(name, run)
        times = latency(runs, repeat=repeat, seconds=seconds, pause=pause, clock=clock, sleep=sleep)
        candidates = {}
        for name, run in runs.items():
            file = files.get(name)
            bits = own if file is None or file.bits is None else file.bits
            candidates[name] = Candidate(
                size_by_tensor(model if file is None else file.path),
                times[name],
                peak_memory(run),
                energy(run, layers, bits, seconds=energy_seconds, root=rapl, clock=clock),
                None if file is None else ratio(times[name], times[MODEL]),
            )
    return Measurement(
        params=sum(each.params for each in layers),
        macs=sum(each.macs for each in layers),
        bops=sum(each.bops for each in bops(layers, own)),
        layers=layers,
        activations=activation_peak_bytes(graph, activation_bits(model)),
        candidates=candidates,
    )


def graph_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The model's graph in standard form with the sizes of `inputs`: its own, or else read from it."""
    from fewbit.model.graph import refresh
    from fewbit.model.readers.torch import read

    inner = getattr(model, "graph", None)
    gm = inner if isinstance(inner, fx.GraphModule) else model
    if not isinstance(gm, fx.GraphModule):
        return read(model, inputs)
    sizes = [node.meta.get("shape") for node in gm.graph.nodes if node.op == "placeholder"]
    if sizes == [tuple(each.shape) for each in inputs]:
        return gm
    gm = copy.deepcopy(gm)
    refresh(gm, inputs)
    return gm


def _closure(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(*inputs)

    return run


def _bind(run: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: run(*inputs)


def _try(name: str, run: Callable[[], object]) -> None:
    try:
        run()
    except Exception as error:
        kind = ModelError if name == MODEL else ArtifactError
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise kind(f"{name} failed on the example: {detail}") from error
