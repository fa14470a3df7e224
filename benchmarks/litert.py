"""LiteRT files: MLPerf Tiny's ResNet-8 beside its own conversion, ResNet-20 beside ai-edge-quantizer's."""

import argparse
import hashlib
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import compare
import data
import models
import numpy as np
import table
import torch
from latency import LOADERS
from torch import Tensor

import fewbit
from fewbit.evaluation.latency import latency, ratio
from fewbit.gate import check_file
from fewbit.targets import get_target

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "percentile": {"observer": "percentile"},
    "mse, bias corrected": {"observer": "mse", "bias_correction": True},
}
LEAST_ACCURACY, CHECKED = 87.1, 200
PEERS = {"ai-edge-quantizer min-max": "minmax", "ai-edge-quantizer OCTAV": "octav"}
COLUMNS = [c for c in table.COLUMNS if "4 threads" not in c]
CHUNK = 200


@dataclass(frozen=True)
class Bench:
    """One network: its folder for files, its test images, how many of them the reference kernels answer."""

    folder: Path
    task: data.Task
    exact: int

    def accuracy(self, file: Path, exact: bool = False) -> float:
        """Per cent of the test images, in LiteRT; a file that was measured before is not run again."""
        inputs, labels = self.task.inputs, self.task.labels
        if exact:
            inputs, labels = inputs[: self.exact], labels[: self.exact]
        images = hashlib.sha256(inputs[:4].tobytes()).hexdigest()[:8]
        kept = self.folder / "accuracy" / f"{_digest(file)}-{images}-{len(inputs)}-{exact}.json"
        if not kept.exists():
            open_file = get_target("litert").open_exact if exact else get_target("litert").open
            run = open_file(file)
            answers = [run(piece)[0].argmax(1) for piece in torch.from_numpy(inputs).split(CHUNK)]
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(100 * float((torch.cat(answers).numpy() == labels).mean())))
        return float(json.loads(kept.read_text()))

    def row(self, name: str, file: Path, exact: bool = True, **more: Any) -> compare.Row:
        """A row of the table: size, and accuracy by LiteRT's own choice of kernels and by the reference ones."""
        row = {"name": name, "file": str(file), "bytes": file.stat().st_size, **more}
        row["accuracy"] = self.accuracy(file)
        if self.exact and exact:
            row["exact_accuracy"] = self.accuracy(file, exact=True)
        return row

    def made(
        self, name: str, model: Any, calibration: np.ndarray, file: Path, **settings: Any
    ) -> compare.Row:
        """fewbit's row: quantized, exported with int8 inputs and outputs, compared on CHECKED images."""
        started = time.perf_counter()
        quantized = fewbit.quantize(model, torch.from_numpy(calibration), target="litert", **settings)
        fewbit.export(quantized, file, io="int8", verify=False)  # what differs is counted here, not refused
        seconds = time.perf_counter() - started
        differing, total = differences(file, torch.from_numpy(self.task.inputs[:CHECKED]))
        return self.row(f"fewbit {name}", file, seconds=seconds, differing=differing, compared=total)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def differences(file: Path, inputs: Tensor) -> tuple[int, int]:
    """Integers of all layers and outputs that the reference kernels compute otherwise than `Reference`; of how many."""
    target = get_target("litert")
    described = target.describe(file)
    differing = total = 0
    for piece in inputs.split(50):
        found = check_file(target, file, described.program, described.codes, (piece,))
        differing += sum(layer.differing for layer in found.layers) + found.output_differing
        total += sum(layer.total for layer in found.layers) + found.output_total
    return differing, total


def add_latency(rows: list[compare.Row], one: np.ndarray, seconds: float) -> None:
    """Bare calls of the interpreter on one thread, in turn: the median call of each visit; ratios to the first row."""
    calls = {row["name"]: LOADERS[".tflite"](Path(row["file"]), one, 1) for row in rows if "file" in row}
    found = latency(calls, repeat=1000, seconds=seconds)
    base = found[rows[0]["name"]]
    for row in rows:
        if (timed := found.get(row["name"])) is not None:
            row["latency_t1"] = {
                "median_ms": timed.median_ms, "low_ms": timed.q1_ms, "high_ms": timed.q3_ms,
                "ratio": ratio(timed, base).median, "times_ms": timed.rounds,
            }  # fmt: skip


def compared(ours: compare.Row, theirs: compare.Row, what: str) -> list[Any]:
    """Bars on size and latency of our file against another one."""
    low, middle, high = compare.pair_ratio(ours, theirs, 1)
    tie = low <= 1.0 < high and middle > 1.0
    note = ", equal within what can be measured" if tie else ""
    size = f"{ours['bytes']:,} to {theirs['bytes']:,} bytes"
    return [
        table.bar(f"no larger than {what}", ours["bytes"] <= theirs["bytes"], size),
        table.bar(
            f"no slower than {what}, 1 thread",
            None if tie else middle <= 1.0,
            f"{middle:.3f} x ({low:.3f} to {high:.3f}){note}",
        ),
    ]


def by_recipe(bench: Bench, model: Any, draws: list[np.ndarray]) -> dict[str, list[compare.Row]]:
    """Our rows of each recipe, one for each draw of calibration images."""
    rows: dict[str, list[compare.Row]] = {}
    for recipe, settings in RECIPES.items():
        for seed, calibration in enumerate(draws):
            file = bench.folder / f"{recipe.split(',')[0]}-{seed}.tflite"
            name = recipe if seed == 0 else f"{recipe}, draw {seed}"
            rows.setdefault(recipe, []).append(bench.made(name, model, calibration, file, **settings))
            print(f"  {name}: {rows[recipe][-1]['accuracy']:.2f} %", flush=True)
    return rows


def resnet8(args: argparse.Namespace) -> dict[str, Any]:
    """Bar 1: the Keras file of MLPerf Tiny's image classification, beside the benchmark's own conversion."""
    source = data.skip_without_data() / "models"
    test, folder = 1000 if args.quick else None, data.BUILD / "resnet8"
    folder.mkdir(parents=True, exist_ok=True)
    task = data.task("pixels", calibration=512, test=test)
    bench = Bench(folder, task, len(task.inputs))
    model = fewbit.load(source / "mlperf-tiny-resnet8.h5")
    fewbit.export(model, folder / "float.tflite", verify=False, time=False)
    floating = bench.row("float .tflite of fewbit", folder / "float.tflite", exact=False)
    reference = bench.row("the benchmark's own conversion", source / "mlperf-tiny-resnet8-int8.tflite")
    draws = [data.pixels("train", 512, seed)[0] for seed in range(1 if args.quick else args.draws)]
    ours = by_recipe(bench, model, draws)
    rows = [floating, reference, *(rows[0] for rows in ours.values())]
    add_latency(rows, task.inputs[:1], args.seconds)
    title = (
        f"ResNet-8 of MLPerf Tiny, {len(task.inputs)} test images, int8 inputs and outputs; {compare.cpu()}"
    )
    table.show(title, rows, COLUMNS)
    bars = [accuracy_bar(ours, judged=not args.quick)]
    bars += compared(rows[2], reference, "the benchmark's own conversion")
    bars.append(exactness_bar(ours))
    wrapped = fewbit.benchmark([reference["file"], rows[2]["file"]], task.inputs[:1], rounds=20)
    print(f"through fewbit.benchmark, float tensors in and out:\n{wrapped}")
    return {"rows": rows, "ours": ours, "bars": bars}


def accuracy_bar(ours: dict[str, list[compare.Row]], judged: bool) -> Any:
    """Which recipes reach the bar: the median over the draws, by both kinds of kernels."""
    met = []
    for recipe, rows in ours.items():
        shown = []
        for kind in ("accuracy", "exact_accuracy"):
            found = [row[kind] for row in rows]
            shown.append(f"{median(found):.2f} ({', '.join(f'{a:.2f}' for a in found)})")
        reached = (
            min(median([row[k] for row in rows]) for k in ("accuracy", "exact_accuracy")) >= LEAST_ACCURACY
        )
        met += [recipe] * reached
        print(f"  {recipe}: {shown[0]} % with LiteRT's own kernels, {shown[1]} % with the reference kernels")
    text = f"a recipe with >= {LEAST_ACCURACY} % by either kind of kernels (median over draws)"
    return table.bar(text, bool(met) if judged else None, "; ".join(met) or "none")


def exactness_bar(ours: dict[str, list[compare.Row]]) -> Any:
    """No integer of any of our files differs."""
    every = [row for rows in ours.values() for row in rows]
    differing, total = (sum(row[key] for row in every) for key in ("differing", "compared"))
    found = f"{differing:,} of {total:,}, {CHECKED} images, {len(every)} files"
    return table.bar("0 integers differ from the reference, reference kernels", differing == 0, found)


def resnet20(args: argparse.Namespace) -> dict[str, Any]:
    """Bar 4: our file and ai-edge-quantizer's, made of the same float file with the same calibration images."""
    data.skip_without_data()
    folder = data.BUILD / "resnet20-litert"
    folder.mkdir(parents=True, exist_ok=True)
    model = models.build("resnet20")
    draws = [
        data.task("cifar10", calibration=512, test=1000 if args.quick else None, seed=seed)
        for seed in range(1 if args.quick else args.draws)
    ]
    bench = Bench(folder, data.Task(draws[0].calibration, draws[0].inputs, draws[0].labels), 0)
    np.save(folder / "inputs.npy", bench.task.inputs[:8])
    example = torch.from_numpy(bench.task.inputs[:4])
    fewbit.export(model, folder / "float.tflite", example=example, verify=False, time=False)
    floating = bench.row("float .tflite of fewbit", folder / "float.tflite")
    ours = by_recipe(bench, model, [draw.calibration for draw in draws])
    theirs = {
        name: [peer_row(bench, name, option, seed, d.calibration) for seed, d in enumerate(draws)]
        for name, option in PEERS.items()
    }
    rows = [floating, *(found[0] for found in (ours | theirs).values())]
    add_latency(rows, bench.task.inputs[:1], args.seconds)
    table.show(f"ResNet-20, {len(bench.task.inputs)} test images, int8 inputs and outputs", rows, COLUMNS)
    bars = peer_bars(ours["default"], theirs, judged=not args.quick)
    bars.append(exactness_bar(ours))
    return {"rows": rows, "ours": ours, "theirs": theirs, "bars": bars}


def peer_row(bench: Bench, name: str, option: str, seed: int, calibration: np.ndarray) -> compare.Row:
    """ai-edge-quantizer in its own environment; a failure becomes a row that says so."""
    out = bench.folder / f"{option}-{seed}"
    if not compare.PEERS_PYTHON.exists():
        return {"name": name, "error": "no .venv-peers; see peers-requirements.txt"}
    np.save(bench.folder / "calibration.npy", calibration)
    command = [
        compare.PEERS_PYTHON, compare.HERE / "peers" / "ai_edge.py", "--model=resnet20", f"--option={option}",
        "--float", bench.folder / "float.tflite", "--calibration", bench.folder / "calibration.npy",
        "--inputs", bench.folder / "inputs.npy", "--out", out,
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        return {"name": name, "error": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]}
    result = json.loads((out / "result.json").read_text())
    return bench.row(
        name if seed == 0 else f"{name}, draw {seed}", Path(result["file"]), seconds=result["seconds"]
    )


def peer_bars(ours: list[compare.Row], theirs: dict[str, list[compare.Row]], judged: bool) -> list[Any]:
    """Our default recipe against the best of the peer's that ran."""
    ran = {name: rows for name, rows in theirs.items() if not any("error" in row for row in rows)}
    if not ran:
        return [
            table.bar(
                "no larger, slower or less accurate than ai-edge-quantizer", None, "the peer did not run"
            )
        ]
    best = max(ran, key=lambda name: median(row["accuracy"] for row in ran[name]))
    found = [[row["accuracy"] for row in rows] for rows in (ours, ran[best])]
    shown = " to ".join(f"{median(a):.2f} % ({', '.join(f'{x:.2f}' for x in a)})" for a in found)
    met = median(found[0]) >= median(found[1]) if judged else None
    bars = [table.bar(f"no less accurate than {best}, median over draws", met, shown)]
    return bars + compared(ours[0], ran[best][0], best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["resnet8", "resnet20"])
    parser.add_argument("--draws", type=int, default=3, help="draws of calibration images")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="measuring time of each table's latencies"
    )
    parser.add_argument("--quick", action="store_true", help="1,000 test images, one draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {"resnet8": resnet8, "resnet20": resnet20}
    result = {name: part(args) for name, part in parts.items() if args.only in (None, name)}
    print(f"written to {compare.save('litert', result)}")
    if any(bar["met"] is False for part in result.values() for bar in part["bars"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
