"""How a peer is asked and answers: arguments in, arrays and a result.json out, one process for each."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass(frozen=True)
class Request:
    """What to quantize: a float ONNX file, and the same network as a named module with its weights.

    `bits` of weights and activations, the first and last layer's always 8; `iterations` of a peer that learns, None
    for its default. Only peers of few_bits.py look at these and at `seed`.
    """

    model: str
    float_onnx: Path
    weights: Path | None
    calibration: np.ndarray
    inputs: np.ndarray
    out: Path
    options: frozenset[str]
    bits: tuple[int, int] = (8, 8)
    seed: int = 0
    iterations: int | None = None

    def module(self) -> Any:
        """The float torch module in eval mode."""
        import models

        return models.build(self.model, self.weights)


@dataclass
class Answer:
    """What a peer made: the deployable file, its runtime, that runtime's outputs, the simulation's if any.

    Without a file the runtime is the peer's own simulation.
    """

    file: Path | None
    runtime: str
    outputs: np.ndarray
    simulated: np.ndarray | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--model", required=True, help="a name of benchmarks/models, such as resnet20")
    parser.add_argument("--float", required=True, type=Path, help="the network as a float ONNX file")
    parser.add_argument("--weights", type=Path, help="the network's weights as safetensors")
    parser.add_argument("--calibration", required=True, type=Path, help="float32 .npy, [n, ...]")
    parser.add_argument("--inputs", required=True, type=Path, help="float32 .npy to run the result on")
    parser.add_argument("--labels", type=Path, help="int64 .npy; prints the accuracy on --inputs")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for the file, outputs.npy and result.json"
    )
    parser.add_argument("--bits", type=int, nargs=2, default=(8, 8), help="of weights and of activations")
    parser.add_argument("--seed", type=int, default=0, help="of the peer's random choices")
    parser.add_argument("--iterations", type=int, help="of a peer that learns")
    parser.add_argument("--option", action="append", default=[], help="a variant that the peer knows")
    return parser.parse_args()


def serve(peer: Callable[[Request], Answer], packages: list[str]) -> None:
    """Reads the request from the command line, runs the peer, writes its answer, prints one JSON line."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    request = Request(
        args.model, args.float, args.weights, np.load(args.calibration, allow_pickle=False),
        np.load(args.inputs, allow_pickle=False), args.out, frozenset(args.option),
        tuple(args.bits), args.seed, args.iterations,
    )  # fmt: skip
    started = time.perf_counter()
    answer = peer(request)
    result: dict[str, Any] = {
        "runtime": answer.runtime,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: version(name) for name in packages},
        "notes": answer.notes,
    }
    if answer.file is not None:
        result |= {"file": str(answer.file), "bytes": size(answer.file)}
    np.save(args.out / "outputs.npy", answer.outputs)
    if answer.simulated is not None:
        np.save(args.out / "simulated.npy", answer.simulated)
        result["simulation_sqnr_db"] = sqnr(answer.simulated, answer.outputs)
    if args.labels is not None:
        labels = np.load(args.labels, allow_pickle=False)
        result["accuracy"] = 100 * float((answer.outputs.argmax(1) == labels).mean())
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def size(file: Path) -> int:
    """Bytes of a deployable file with what lies beside it: .bin of OpenVINO, .data of ONNX."""
    companions = [file.with_suffix(".bin"), file.with_name(file.name + ".data")]
    return sum(f.stat().st_size for f in [file, *companions] if f.exists())


def sqnr(simulated: np.ndarray, deployed: np.ndarray) -> float | None:
    """Signal-to-noise ratio in dB of deployed against simulated outputs; None where they are equal."""
    power = float((simulated.astype(np.float64) ** 2).sum())
    error = float(((simulated.astype(np.float64) - deployed) ** 2).sum())
    return round(10 * float(np.log10(power / error)), 1) if error > 0 else None


def batches(inputs: np.ndarray, count: int = 64) -> list[np.ndarray]:
    """The inputs in pieces of `count`."""
    return [inputs[start : start + count] for start in range(0, len(inputs), count)]


def run_module(module: Any, inputs: np.ndarray, count: int = 64) -> np.ndarray:
    """A torch module's outputs, float32."""
    import torch

    with torch.no_grad():
        return np.concatenate([module(torch.from_numpy(b)).numpy() for b in batches(inputs, count)])


def run_onnx(file: Path, inputs: np.ndarray, count: int = 64) -> np.ndarray:
    """The ONNX file's first output in ONNX Runtime with all optimizations, on a model with one input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: b})[0] for b in batches(inputs, count)])
