"""Latency of deployable files, interleaved in one process; the runtime follows from the suffix."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]


def _onnx(path: Path, x: np.ndarray, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)


def _openvino(path: Path, x: np.ndarray, threads: int) -> Call:
    import openvino

    # Without the hint OpenVINO may run in bfloat16, which is not the float that the others are.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda: request.infer([x])


def _executorch(path: Path, x: np.ndarray, threads: int) -> Call:
    import torch
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    module, tensor = portable_lib._load_for_executorch(str(path)), torch.from_numpy(x)
    return lambda: module.forward([tensor])


def _litert(path: Path, x: np.ndarray, threads: int) -> Call:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    (detail,) = interpreter.get_input_details()
    if tuple(detail["shape"]) != x.shape:
        interpreter.resize_tensor_input(detail["index"], x.shape)
    interpreter.allocate_tensors()
    scale, zero_point = detail["quantization"]
    if np.issubdtype(detail["dtype"], np.integer):
        limits = np.iinfo(detail["dtype"])
        x = np.clip(np.rint(x / scale) + zero_point, limits.min, limits.max)
    interpreter.set_tensor(detail["index"], x.astype(detail["dtype"]))
    run: Call = interpreter.invoke
    return run


LOADERS = {".onnx": _onnx, ".xml": _openvino, ".pte": _executorch, ".tflite": _litert}


def interleaved(files: dict[str, Path], x: np.ndarray, threads: int, seconds: float = 10.0) -> dict[str, Any]:
    """Times every file in turn, in rounds, for about `seconds` for all together.

    Returns by name: median, quartiles, minimum and all rounds in ms of one call; `ratio`, the median over
    rounds of this file's time divided by the first file's in the same round.
    """
    calls = {name: LOADERS[path.suffix](path, x, threads) for name, path in files.items()}
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        repeats[name] = max(1, min(200, int(0.03 / max(_timed(call, 1), 1e-6))))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    stop, first = time.perf_counter() + seconds, next(iter(calls))
    while time.perf_counter() < stop or len(rounds[first]) < 5:
        for name, call in calls.items():
            call()  # caches and the thread pool were another file's until now
            rounds[name].append(_timed(call, repeats[name]))
            time.sleep(0.02)  # the last file's workers spin for a while after their work
    return {name: _summary(times, rounds[first]) for name, times in rounds.items()}


def _timed(call: Call, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _summary(times: list[float], base: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {
        "median_ms": 1e3 * middle,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "min_ms": 1e3 * min(times),
        "ratio": statistics.median(t / b for t, b in zip(times, base, strict=True)),
        "times_ms": [round(1e3 * t, 5) for t in times],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="name=path; the first one is what ratios refer to")
    parser.add_argument("--input", type=Path, required=True, help="float32 .npy, used as it is")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    files = {name: Path(path) for name, path in (f.split("=", 1) for f in args.files)}
    x = np.load(args.input, allow_pickle=False)
    print(json.dumps(interleaved(files, x, args.threads, args.seconds)))


if __name__ == "__main__":
    main()
