"""Six networks through every target: size, latency, integer coverage, agreement, integers that differ."""

import argparse
import json
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import compare
import data
import models
import table
import torch
from torch import Tensor, nn

import fewbit
from fewbit.deploy import Artifact
from fewbit.evaluation.latency import ratio
from fewbit.evaluation.metrics import Report
from fewbit.model.simulate import QuantizedModel

NETWORKS = ["demo", "resnet20", "mobilenetv2-digits", "ds-cnn", "lstm", "vit"]
TARGETS = ["onnx", "litert", "executorch", "openvino", "torch"]
FOLDER = data.BUILD / "targets"
RESULTS = FOLDER / "results.jsonl"
Row = dict[str, Any]


def network(name: str, test: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A named network with calibration inputs, test inputs and their labels."""
    if name == "demo":
        from fewbit.demo import load

        module, digits = load()
        arrays = digits.calibration_images, digits.test_images[:test], digits.test_labels[:test]
    else:
        task = data.task(models.CASES[name].data, calibration=256, test=test)
        module, arrays = models.build(name), (task.calibration, task.inputs, task.labels)
    calibration, inputs, labels = (torch.from_numpy(array) for array in arrays)
    return module, calibration, inputs, labels


def measure(name: str, targets: list[str], test: int) -> None:
    """Quantizes one network once, exports it for each target and appends a row for each to the results."""
    module, calibration, inputs, labels = network(name, test)
    with torch.no_grad():
        floating = 100 * float((module(inputs).argmax(1) == labels).float().mean())
    quantized = fewbit.quantize(module, calibration, progress=False)
    for target in targets:
        started = time.perf_counter()
        row: Row = {"network": name, "target": target, "inputs": len(inputs), "float_accuracy": floating}
        row |= through(quantized, target, (inputs, labels), FOLDER / name)
        row |= {"seconds": round(time.perf_counter() - started, 1), "commit": commit()}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {name}, {target}: {row.get('error') or row['coverage']} ({row['seconds']} s)", flush=True)


def through(quantized: QuantizedModel, target: str, test: tuple[Tensor, Tensor], folder: Path) -> Row:
    """What one target makes of the model; an error becomes its first line."""
    try:
        fleet = fewbit.export(quantized, folder, targets=[target], test=test)
        return facts(fleet[target], fleet.reports[target])
    except Exception as error:  # one target that fails must not hide what the others show
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines and lines[0].startswith("no target could be written"):
            lines = [line.removeprefix(f"{target}: ") for line in lines[1:]]
        return {"error": f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"}


def facts(artifact: Artifact, report: Report) -> Row:
    """The numbers of one row, from what the gate found and what the runtime answered."""
    check, times = artifact.verification, artifact.latency
    assert check is not None and report.agreement is not None and report.agreement.top1 is not None
    row: Row = {
        "bytes": artifact.size, "runtime": check.runtime, "coverage": check.short_coverage(),
        "kernels": check.coverage_text(), "accuracy": 100 * float(report.metrics["accuracy"]),  # type: ignore[arg-type]
        "same_as_simulation": 100 * report.agreement.top1, "sqnr_db": report.agreement.to_json()["sqnr_db"],
        "exact": check.exact, "tolerance": check.tolerance, "layers": len(check.layers),
        "codes": sum(c.total for c in check.layers), "differing": sum(c.differing for c in check.layers),
        "largest": max((c.largest for c in check.layers), default=0), "whole_network": check.whole_network,
        "outputs": check.output_total, "outputs_differing": check.output_differing,
        "error_of_outputs": check.output_error,
        "fast": str(check.fast) if check.fast else "", "notes": artifact.notes,
        "float_layers": sorted({f"{k.kind}: {k.cause}" for k in check.kernels if not k.integer}),
        "ms": times["quantized"].median_ms,
    }  # fmt: skip
    if "float" in times:
        pair = ratio(times["quantized"], times["float"])
        row |= {"float_ms": times["float"].median_ms, "ratio": pair.median, "ratio_q1": pair.q1}
    return row


def commit() -> str:
    """The commit that was measured; "+" where files differ from it."""
    command = ["git", "-C", str(data.ROOT), "describe", "--always", "--dirty=+", "--abbrev=8"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def results() -> dict[tuple[str, str], Row]:
    """The last row of each network and target."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {(row["network"], row["target"]): row for row in rows}


def differences(row: Row) -> str:
    """Integers that differ, where the runtime shows them."""
    if not row["layers"]:
        return "not visible"
    unit = f", by {row['largest']}" if row["differing"] else ""
    return f"{row['differing']:,} of {row['codes']:,}{unit}"


def show(rows: list[Row]) -> None:
    """One line for each network and target; below, what failed, what is float and why, what there is to note."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    printed = Table(title=f"Networks by target; {compare.cpu()}", title_justify="left", box=box.SIMPLE)
    for column in ("network", "target"):
        printed.add_column(column)
    for column in (
        "kB",
        "ms",
        "x float",
        "in integer\nkernels",
        "accuracy %\n(float)",
        "as simulated\n%",
        "SQNR to\nsimulation dB",
    ):
        printed.add_column(column, justify="right")
    printed.add_column("integers of layers\nthat differ", justify="right")
    for row in rows:
        if "error" not in row:
            sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
            shown = f"{row['ratio']:.2f}" if "ratio" in row else "-"
            printed.add_row(
                row["network"], row["target"], f"{row['bytes'] / 1e3:,.1f}", f"{row['ms']:.3g}", shown, row["coverage"],
                f"{row['accuracy']:.1f} ({row['float_accuracy']:.1f})", f"{row['same_as_simulation']:.1f}", sqnr,
                differences(row),
            )  # fmt: skip
    console = Console(width=150, highlight=False)
    console.print(printed)
    for row in rows:
        lines = [f"failed: {row['error']}"] if "error" in row else row["notes"] + row["float_layers"]
        for line in lines:
            console.print(f"  {row['network']}, {row['target']}: {line}", markup=False, soft_wrap=True)


def bars(rows: list[Row], missing: int) -> list[Any]:
    """What the rows say of the three promises."""
    good = [row for row in rows if "error" not in row]
    wrong = [row for row in good if not row["exact"] or row["largest"] > row["tolerance"]]
    slow = [row for row in good if row.get("ratio", 0) > 1]
    untold = [row for row in slow if not any("not faster than float" in note for note in row["notes"])]
    failed = [f"{row['network']} {row['target']}" for row in rows if "error" in row]
    through_all = f"{len(good)} of {len(rows)} written and verified" + (
        f"; not {', '.join(failed)}" if failed else ""
    )
    beyond = f"{len(wrong)} files differ by more than their runtime's rule"
    told = f"{len(slow)} slower, {len(untold)} untold"
    return [
        table.bar("each network through every target", not failed and not missing, through_all),
        table.bar("0 unexplained differences", not wrong, beyond),
        table.bar("int8 never slower than float without being told", not untold, told),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, separated by commas")
    parser.add_argument("--targets", default=",".join(TARGETS), help="targets, separated by commas")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--quick", action="store_true", help="64 test inputs instead of 192")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    names, targets = args.only.split(","), args.targets.split(",")
    if any(name in models.CASES and models.CASES[name].data == "cifar10" for name in names):
        data.skip_without_data()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = {} if args.again else {key: row for key, row in results().items() if "error" not in row}
    for name in names:
        wanted = [target for target in targets if (name, target) not in done]
        if wanted:
            measure(name, wanted, 64 if args.quick else 192)
    found = results()
    rows = [found[key] for name in names for target in targets if (key := (name, target)) in found]
    show(rows)
    judged = bars(rows, len(names) * len(targets) - len(rows))
    print(f"written to {compare.save('targets', {'rows': rows, 'bars': judged})}")
    if any(bar["met"] is False for bar in judged):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
