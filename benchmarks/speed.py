"""Bar 4: latency of ResNet-18 at 224x224 beside float and the peers, size, seconds to import and convert."""

import argparse
import subprocess
import sys
from statistics import median
from typing import Any

import compare
import data
import ours
import table
import torch

PEERS = ["ort", "ort-reduce", "ort-u8u8", "torchao", "aimet", "openvino", "xnnpack"]
QUICK_PEERS = ["ort", "ort-reduce"]
COLUMNS = [c for c in table.COLUMNS if not c.startswith("accuracy")]

# In a process of its own: what the import adds when torch is already there, in seconds.
IMPORT = "import time, torch; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def import_seconds(statement: str, times: int = 5) -> float:
    """Median seconds of a statement after `import torch`, each time in a fresh process."""
    runs = []
    for _ in range(times):
        done = subprocess.run(
            [sys.executable, "-c", IMPORT.format(statement)], capture_output=True, text=True
        )
        runs.append(float(done.stdout))
    return median(runs)


def latency_bars(bench: compare.Bench, rows: list[compare.Row], threads: int, seconds: float) -> list[Any]:
    """Our file against quantize_static's fastest one, and against float: these three alone, so more rounds."""
    static = [row for row in rows if row["name"].startswith("ORT static") and "error" not in row]
    best = min(static, key=lambda row: row[f"latency_t{threads}"]["median_ms"], default=None)
    three = [dict(row) for row in (rows[0], rows[1], best) if row is not None]
    bench.add_latency(three, threads, seconds)
    bars = []
    if best is not None:
        low, middle, high = compare.pair_ratio(three[1], three[2], threads)
        tie = low <= 1.0 < high and middle > 1.0
        text = f"latency <= 1.00 x quantize_static's best ({best['name']}), threads: {threads}"
        found = f"{middle:.3f} ({low:.3f} to {high:.3f})" + (
            ", equal within what can be measured" if tie else ""
        )
        bars.append(table.bar(text, None if tie else middle <= 1.0, found))
    low, middle, high = compare.pair_ratio(three[1], three[0], threads)
    # Half the time of float is promised for CPUs with VNNI only.
    met = None if "no VNNI" in compare.cpu() else middle <= 0.5
    text = f"latency <= 0.50 x float ONNX on a CPU with VNNI, threads: {threads}"
    bars.append(table.bar(text, met, f"{middle:.3f} ({low:.3f} to {high:.3f})"))
    return bars


def conversion() -> compare.Row | None:
    """ResNet-20 quantized with 512 images and exported through the gate, two threads; None without data."""
    try:
        bench = compare.Bench.prepare("resnet20", test=64)
    except data.NoData as error:
        print(f"SKIPPED, conversion time not measured: {error}", file=sys.stderr)
        return None
    bench.float_row()
    return ours.make(bench, "fewbit W8A8").row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--peers", default="", help="names of compare.PEERS, separated by commas")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="measuring time for each number of threads"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, few peers")
    args = parser.parse_args()
    torch.set_num_threads(2)
    bench = compare.Bench.prepare(args.model, calibration=16 if args.quick else 64, test=16)
    rows = [bench.float_row(), ours.make(bench, "fewbit W8A8").row]
    if "no VNNI" in compare.cpu():
        # The fastest exact form of a CPU without VNNI is a narrower range; this file shows what that costs.
        rows.append(ours.attempt(bench, "fewbit W8A8, portable=False", portable=False))
    for key in args.peers.split(",") if args.peers else QUICK_PEERS if args.quick else PEERS:
        rows.append(bench.peer_row(key))
    seconds = 10.0 if args.quick else args.seconds
    for threads in (1, 4):
        bench.add_latency(rows, threads, seconds)
    table.show(f"{args.model}, batch 1; {compare.cpu()}", rows, COLUMNS)
    bars = latency_bars(bench, rows, 1, seconds) + latency_bars(bench, rows, 4, seconds)
    small = rows[1]["bytes"] / rows[0]["bytes"]
    bars.append(table.bar("size <= 0.26 x float", small <= 0.26, f"{small:.4f}"))
    alone = import_seconds("import fewbit")
    reached = import_seconds("from fewbit import quantize, export")
    found = f"{alone:.3f} s; with quantize and export themselves {reached:.3f} s"
    bars.append(table.bar("import < 0.3 s beyond torch's", alone < 0.3, found))
    if (row := conversion()) is not None:
        taken = row["seconds"]
        bars.append(
            table.bar("ResNet-20 quantized and exported in < 20 s, 2 threads", taken < 20, f"{taken:.1f} s")
        )
    print(f"written to {compare.save('speed', {'rows': rows, 'bars': bars})}")


if __name__ == "__main__":
    main()
