"""Random Keras and ONNX models: read, compared with the source, quantized, exported to ONNX and LiteRT, verified."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare
import data
import table
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fewbit
from fewbit.model.torch_proof import difference
from fewbit.targets import get_target

sys.path.insert(0, str(data.ROOT / "tests"))

FOLDER = data.BUILD / "readers"
RESULTS = FOLDER / "results.jsonl"
SOURCES = ["keras", "onnx"]
STEPS = ["read", "equal", "quantized", "onnx", "litert"]
TOLERANCE = 1e-5
NOISE = (
    0.25  # rounding of integers that the simulation does in floats adds up to less, a wrong operation to more
)
LIMIT = 300  # seconds for one model
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model's file, its parts, inputs by (count, variant), the source's own answers, the batch that it insists on."""

    path: Path
    parts: list[str]
    inputs: Callable[..., tuple[Tensor, ...]]
    answers: Callable[[tuple[Tensor, ...]], list[Tensor]]
    batch: int | None = None

    def some(self, count: int, variant: int = 0) -> tuple[Tensor, ...]:
        """Inputs, as many as the model takes at once."""
        return self.inputs(self.batch or count, variant)


def keras_case(seed: int) -> Case:
    """Every second one is an .h5 file, where Keras itself can read that back."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    from random_keras import draw

    from fewbit.model.keras_model import outputs_of

    drawn = draw(seed)
    path = FOLDER / f"model{['.keras', '.h5'][seed % 2]}"
    drawn.model.save(path)
    try:
        keras.models.load_model(path, compile=False)
    except Exception:  # whatever Keras says of its own file
        path = path.with_suffix(".keras")
        drawn.model.save(path)
    return Case(path, drawn.parts, drawn.inputs, lambda inputs: outputs_of(drawn.model, inputs))


def onnx_case(seed: int) -> Case:
    """Any opset; some insist on a batch of one or three."""
    from onnx_made import answers, saved
    from random_onnx import draw

    drawn = draw(seed)
    path = saved(drawn.model, FOLDER)

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [torch.from_numpy(a) for a in answers(path, inputs)]

    return Case(path, drawn.parts, drawn.inputs, run, drawn.batch)


CASES = {"keras": keras_case, "onnx": onnx_case}


def examine(source: str, seed: int) -> Row:
    """One model through all steps; the first that fails is named, with the first line of its error."""
    row: Row = {"source": source, "seed": seed, "done": []}
    step = "drawn"
    try:
        case = CASES[source](seed)
        row["parts"], step = case.parts, "read"
        model = fewbit.load(case.path, example=case.some(2))
        row["done"].append(step)
        step, unseen = "equal", case.some(3, 7)
        with torch.no_grad():
            pairs = zip(case.answers(unseen), tree_leaves(model(*unseen)), strict=True)
            row["difference"] = max(difference(expected, actual) for expected, actual in pairs)
        if row["difference"] > TOLERANCE:
            raise ValueError(f"differs from the source by {row['difference']:.1e}")
        row["done"].append(step)
        step, batches = "quantized", [case.some(16, 100 + index) for index in range(4)]
        quantized = fewbit.quantize(model, batches, example=case.some(4), progress=False)
        row["done"].append(step)
    except Exception as error:
        return row | {"failures": {step: reason(error)}}
    return row | {"failures": exported(row, quantized, case.some(8, 9))}


def exported(row: Row, quantized: Any, unseen: tuple[Tensor, ...]) -> dict[str, str]:
    """Why a target failed; each is written through the gate and verified again on inputs of its own."""
    failures = {}
    for target, suffix in (("onnx", ".onnx"), ("litert", ".tflite")):
        path = FOLDER / f"exported{suffix}"
        try:
            artifact = fewbit.export(quantized, path, target=target, time=False)
            again = fewbit.verify(path, unseen, model=quantized)
            for check in (artifact.verification, again):
                row["codes"] = row.get("codes", 0) + sum(layer.total for layer in check.layers)
                row["differing"] = row.get("differing", 0) + sum(layer.differing for layer in check.layers)
            row.setdefault("noise", {})[target] = noise = beyond(quantized, target, path, unseen)
            if noise > NOISE:
                raise ValueError(f"answers differ from the quantized model's by {noise:.2g} (RMS, relative)")
            row["done"].append(target)
        except Exception as error:
            failures[target] = reason(error)
    return failures


def beyond(quantized: Any, target: str, path: Path, inputs: tuple[Tensor, ...]) -> float:
    """How far the file's outputs are from the quantized model's in PyTorch: the worst relative error (RMS)."""
    answers = get_target(target).open_exact(path)(*inputs)
    with torch.no_grad():
        wanted = tree_leaves(quantized(*inputs))
    if [tuple(a.shape) for a in answers] != [tuple(w.shape) for w in wanted]:
        raise ValueError(
            f"outputs of shapes {[list(a.shape) for a in answers]} are {[list(w.shape) for w in wanted]}"
        )
    pairs = zip(answers, wanted, strict=True)
    return max(float((a - w).norm()) / (float(w.norm()) or 1.0) for a, w in pairs)


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).replace(str(FOLDER) + "/", "").splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:240]}"


def work(source: str, seeds: list[int]) -> None:
    """A process that examines seeds, until one ends it: a crash or the alarm."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for seed in seeds:
        signal.alarm(LIMIT)
        started = time.perf_counter()
        row = examine(source, seed)
        append(row | {"seconds": round(time.perf_counter() - started, 1)})


def append(row: Row) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = "; ".join(f"{step}: {text}" for step, text in row["failures"].items()) or "all steps"
    print(f"  {row['source']} {row['seed']}: {shown}", flush=True)


def results() -> dict[tuple[str, int], Row]:
    """The last row of each source and seed."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {(row["source"], row["seed"]): row for row in rows}


def complete(source: str, seeds: list[int]) -> None:
    """Examines the seeds in processes of their own, so that a crash costs one seed."""
    while seeds:
        command = [sys.executable, __file__, "--work", source, "--seeds", ",".join(map(str, seeds))]
        ended = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
        done = {seed for name, seed in results() if name == source}
        left = [seed for seed in seeds if seed not in done]
        if left:
            what = (
                f"no answer in {LIMIT} s" if ended == -signal.SIGALRM else f"the process ended with {ended}"
            )
            append({"source": source, "seed": left[0], "done": [], "failures": {"process": what}})
        seeds = left[1:]


def show(rows: list[Row]) -> None:
    """How many models passed each step, by source; every failure with its seed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    printed = Table(title="Random models by source", title_justify="left", box=box.SIMPLE)
    for column in (
        "source",
        "models",
        *STEPS,
        "largest difference\nto the source",
        "integers that\ndiffer",
        "s",
    ):
        printed.add_column(column, justify="left" if column == "source" else "right")
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        passed = [str(sum(step in row["done"] for row in own)) for step in STEPS]
        largest = max((row["difference"] for row in own if "equal" in row["done"]), default=0.0)
        differing, codes = (sum(row.get(key, 0) for row in own) for key in ("differing", "codes"))
        noisiest = max((n for row in own for n in row.get("noise", {}).values()), default=0.0)
        seconds = sum(row.get("seconds", 0) for row in own)
        printed.add_row(
            source,
            str(len(own)),
            *passed,
            f"{largest:.1e}",
            f"{differing:,} of {codes:,}",
            f"{noisiest:.2g}",
            f"{seconds:.0f}",
        )
    console = Console(width=150, highlight=False)
    console.print(printed)
    for row in rows:
        for step, text in row["failures"].items():
            console.print(f"  {row['source']} {row['seed']}, {step}: {text}", markup=False, soft_wrap=True)


def bars(rows: list[Row], count: int) -> list[Any]:
    """All models of each source, all steps."""
    found = []
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        whole = sum(not row["failures"] for row in own)
        where = Counter(step for row in own for step in row["failures"])
        text = f"{whole} of {len(own)}" + (f"; failed: {dict(where)}" if where else "")
        what = f"{count} random {source} models read, equal within {TOLERANCE:.0e}, quantized, exported, verified"
        found.append(table.bar(what, whole == len(own) == count, text))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=150, help="models of each source")
    parser.add_argument("--only", choices=SOURCES)
    parser.add_argument("--again", action="store_true", help="examine those that failed once more")
    parser.add_argument("--fresh", action="store_true", help="examine all once more")
    parser.add_argument("--work", choices=SOURCES, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="15 models of each source")
    args = parser.parse_args()
    if args.work:
        work(args.work, [int(seed) for seed in args.seeds.split(",")])
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    if args.fresh or args.again:
        kept = [] if args.fresh else [row for row in results().values() if not row["failures"]]
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in kept))
    count = min(15, args.count) if args.quick else args.count
    sources = [source for source in SOURCES if args.only in (None, source)]
    for source in sources:
        complete(source, [seed for seed in range(count) if (source, seed) not in results()])
    rows = [row for (source, seed), row in sorted(results().items()) if source in sources and seed < count]
    show(rows)
    judged = bars(rows, count)
    print(f"written to {compare.save('readers', {'rows': rows, 'bars': judged})}")
    if any(bar["met"] is False for bar in judged):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
