"""Runs peers beside us on one network: files, accuracy, coverage, interleaved latency, a JSON of it all."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import coverage
import data
import float_onnx
import models
import numpy as np

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = data.ROOT / ".venv-peers" / "bin" / "python"
Row = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A script under peers/, the options it is called with, and what the table calls it."""

    label: str
    script: str
    options: tuple[str, ...] = ()


PEERS = {
    "ort": Peer("ORT static U8S8", "ort_static"),
    "ort-reduce": Peer("ORT static U8S8, reduce_range", "ort_static", ("reduce_range",)),
    "ort-u8u8": Peer("ORT static U8U8", "ort_static", ("u8u8",)),
    "ort-s8s8": Peer("ORT static S8S8 (its default)", "ort_static", ("s8s8",)),
    "ort-dynamic": Peer("ORT dynamic", "ort_dynamic"),
    "ort-dynamic-linear": Peer("ORT dynamic, linear only", "ort_dynamic", ("linear",)),
    "aimet": Peer("AIMET -> ONNX", "aimet"),
    "aimet-int4": Peer("AIMET int4 weights -> ONNX", "aimet", ("int4",)),
    "torchao": Peer("torchao PT2E x86 -> ONNX", "torchao_pt2e"),
    "nncf": Peer("NNCF -> ONNX", "nncf_onnx"),
    "modelopt": Peer("ModelOpt (torch) -> ONNX", "modelopt_torch"),
    "modelopt-onnx": Peer("ModelOpt (onnx)", "modelopt_onnx"),
    "openvino": Peer("NNCF -> OpenVINO", "nncf_openvino"),
    "xnnpack": Peer("ExecuTorch XNNPACK", "xnnpack"),
    "brevitas-gptq": Peer("Brevitas GPTQ", "brevitas_cnn", ("gptq",)),
    "brevitas-learned": Peer("Brevitas learned rounding", "brevitas_cnn", ("learned",)),
    "aimet-seqmse": Peer("AIMET SeqMSE", "aimet_few_bits", ("seqmse",)),
    "nncf-few-bits": Peer("NNCF, its NPU target", "nncf_few_bits"),
    "aimet-adaround": Peer("AIMET AdaRound", "aimet_few_bits", ("adaround",)),
}


@dataclass(frozen=True)
class Bench:
    """One network with its data, laid out in a folder for processes to share."""

    name: str
    folder: Path
    task: data.Task
    float_file: Path
    weights: Path

    @classmethod
    def prepare(
        cls, name: str, *, calibration: int = 512, test: int | None = None, seed: int = 0, into: str = ""
    ) -> "Bench":
        """Writes float.onnx, weights and the arrays into build/benchmarks/<into or name>. Raises data.NoData."""
        folder = data.BUILD / (into or name)
        task = data.task(models.CASES[name].data, calibration=calibration, test=test, seed=seed)
        file, weights = float_onnx.cached(name, task.inputs, folder)
        np.save(folder / "calibration.npy", task.calibration)
        np.save(folder / "inputs.npy", task.inputs)
        np.save(folder / "one.npy", task.inputs[:1])
        return cls(name, folder, task, file, weights)

    def accuracy(self, outputs: np.ndarray) -> float | None:
        """Per cent of the test inputs answered with their label; None without labels."""
        if self.task.labels is None:
            return None
        return 100 * float((outputs.argmax(1) == self.task.labels).mean())

    def float_row(self) -> Row:
        """The float ONNX file in ONNX Runtime: what every other row is compared with."""
        outputs = run_onnx(self.float_file, self.task.inputs)
        np.save(self.folder / "float_outputs.npy", outputs)
        return {
            "name": "float ONNX", "file": str(self.float_file), "bytes": self.float_file.stat().st_size,
            "accuracy": self.accuracy(outputs), "agreement": 100.0,
        }  # fmt: skip

    def row(self, label: str, file: Path, outputs: np.ndarray, **more: Any) -> Row:
        """A row of the table for a deployable file and what its runtime answered on the test inputs."""
        wanted = np.load(self.folder / "float_outputs.npy", allow_pickle=False)
        row: Row = {"name": label, "file": str(file), "bytes": file.stat().st_size, **more}
        row["accuracy"] = self.accuracy(outputs)
        row["agreement"] = 100 * float((outputs.argmax(1) == wanted.argmax(1)).mean())
        row["float_sqnr_db"] = sqnr(wanted, outputs)
        if file.suffix == ".onnx":
            covered = coverage.read(file)
            row |= {"coverage": str(covered), "covered": covered.complete, "operators": covered.operators}
        return row

    def peer_row(self, key: str, threads: int = 2, limit: float = 900) -> Row:
        """Runs one peer in its own process and environment; a failure becomes a row that says so."""
        label, out = PEERS[key].label, self.folder / key
        result = self.ask(key, out, threads=threads, limit=limit)
        if "error" in result:
            return {"name": label, **result}
        more = {k: result[k] for k in ("simulation_sqnr_db", "seconds", "versions", "notes") if k in result}
        row = self.row(label, Path(result["file"]), np.load(out / "outputs.npy", allow_pickle=False), **more)
        return row | {"bytes": result["bytes"]}

    def ask(
        self, key: str, out: Path, more: Sequence[str] = (), *, threads: int = 2, limit: float = 900
    ) -> dict[str, Any]:
        """The result.json of one peer run in its own process, with `more` arguments; {"error": why} if it failed.

        What the peer answered on the test inputs lies in outputs.npy of the folder `out`.
        """
        peer = PEERS[key]
        command = [
            PEERS_PYTHON, HERE / "peers" / f"{peer.script}.py", "--model", self.name, "--out", out,
            "--float", self.float_file, "--weights", self.weights, "--inputs", self.folder / "inputs.npy",
            "--calibration", self.folder / "calibration.npy", *(f"--option={name}" for name in peer.options),
            *more,
        ]  # fmt: skip
        if not PEERS_PYTHON.exists():
            return {"error": "no .venv-peers; see peers-requirements.txt"}
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(
                [str(part) for part in command],
                capture_output=True,
                text=True,
                timeout=limit,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {limit:.0f} s"}
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return {"error": (lines or [f"exit code {done.returncode}"])[-1][:300]}
        result: dict[str, Any] = json.loads((out / "result.json").read_text())
        return result

    def add_latency(self, rows: Sequence[Row], threads: int, seconds: float = 15.0) -> None:
        """Times the rows' files beside each other in one process and writes the figures into the rows.

        Ratios refer to the first row, except where another runtime has its own float file beside its result.
        """
        timed = {row["name"]: row["file"] for row in rows if "file" in row}
        own_float = {}
        for name, file in list(timed.items()):
            beside = Path(file).with_name("float" + Path(file).suffix)
            if Path(file).suffix != ".onnx" and beside.exists():
                own_float[name] = f"{name}, its float"
                timed[own_float[name]] = str(beside)
        found = time_files(timed, self.folder / "one.npy", threads, seconds)
        for row in rows:
            if row["name"] in found:
                row[f"latency_t{threads}"] = found[row["name"]]
            if row["name"] in own_float:
                row[f"own_float_t{threads}"] = found[own_float[row["name"]]]


def pair_ratio(row: Row, base: Row, threads: int) -> tuple[float, float, float]:
    """One row's time divided by another's in the same round: the median over rounds and its 95 % interval.

    The interval is between order statistics (binomial, no assumption on the distribution): low, median, high.
    """
    one, other = row[f"latency_t{threads}"]["times_ms"], base[f"latency_t{threads}"]["times_ms"]
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    reach = 0.98 * len(ratios) ** 0.5
    low, high = max(0, int(len(ratios) / 2 - reach)), min(len(ratios) - 1, int(len(ratios) / 2 + reach))
    return ratios[low], median(ratios), ratios[high]


def time_files(files: dict[str, str], one: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Runs latency.py in the peers' environment, which has all runtimes; else in ours, on ONNX files."""
    python = PEERS_PYTHON if PEERS_PYTHON.exists() else Path(sys.executable)
    if python != PEERS_PYTHON:
        files = {name: file for name, file in files.items() if file.endswith(".onnx")}
    command = [python, HERE / "latency.py", "--input", one, f"--threads={threads}", f"--seconds={seconds}"]
    command += [f"{name}={file}" for name, file in files.items()]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"latency.py failed: {done.stderr.strip().splitlines()[-1:]}")
    timed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return timed


def run_onnx(file: Path, inputs: np.ndarray, threads: int = 2, count: int = 64) -> np.ndarray:
    """First output of a file with one input in ONNX Runtime, all optimizations on."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    pieces = [inputs[start : start + count] for start in range(0, len(inputs), count)]
    return np.concatenate([session.run(None, {name: piece})[0] for piece in pieces])


def sqnr(wanted: np.ndarray, found: np.ndarray) -> float | None:
    """Signal-to-noise ratio of `found` against `wanted` in dB; None where they are equal."""
    error = float(((wanted.astype(np.float64) - found) ** 2).sum())
    return 10 * float(np.log10(float((wanted.astype(np.float64) ** 2).sum()) / error)) if error else None


def cpu() -> str:
    """The processor's name and whether it has the dot-product instructions that U8.S8 kernels want."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    vnni = any(flag in fields.get("flags", "").split() for flag in ("avx512_vnni", "avx_vnni"))
    return f"{fields.get('model name', platform.machine()).strip()}, {'VNNI' if vnni else 'no VNNI'}"


def environment() -> dict[str, Any]:
    """What figures depend on: processor, cores, Python, packages, load of the machine, time."""
    packages = {}
    for name in ("fewbit", "torch", "onnxruntime", "onnx"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "cpu": cpu(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": packages, "time": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def save(name: str, result: Any) -> Path:
    """Writes build/benchmarks/<name>.json with the environment."""
    data.BUILD.mkdir(parents=True, exist_ok=True)
    file = data.BUILD / f"{name}.json"
    file.write_text(json.dumps({"environment": environment(), "result": result}, indent=1, default=str))
    return file
