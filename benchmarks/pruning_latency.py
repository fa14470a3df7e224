"""What pruned channels save in time: ResNet-18 at 224x224, batch 1, float32, in ONNX Runtime on one thread.

Weights are random: no accuracy here. The original, the pruned ones and Torch-Pruning's (`make peers`) to the same
work are timed in turn, in one run.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import data
import latency
import models
import numpy as np
import table
import torch

import fewbit

NETWORK = "resnet18"
SPEEDUP, BAR = 2.0, 0.8  # times fewer MACs; the share of it that the clock has to show


def ours(model: torch.nn.Module, example: torch.Tensor, file: Path, **budget: Any) -> dict[str, Any]:
    """A row: the model pruned to a budget, its file, and what pruning said of it."""
    small = fewbit.prune(model, example, progress=False, **budget)
    fewbit.export(small, file, example=example, time=False)
    report = small.meta["pruning"]
    return {"file": file, "macs": report.macs_before / report.macs, "said": report.latency}


def peer(file: Path, multiple: int) -> dict[str, Any]:
    """Torch-Pruning's row; without its environment one that says so."""
    if not compare.PEERS_PYTHON.exists():
        return {"error": "no .venv-peers; see peers-requirements.txt"}
    script = compare.HERE / "peers" / "torch_pruning_latency.py"
    command = [compare.PEERS_PYTHON, script, NETWORK, SPEEDUP, multiple, file]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1][:200]}
    return {"file": file, "macs": float(done.stdout.split()[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time for all together")
    parser.add_argument("--quick", action="store_true", help="a few seconds, no peer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = data.BUILD / "pruning_latency"
    folder.mkdir(parents=True, exist_ok=True)
    model = models.build(NETWORK)
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    fewbit.export(model, folder / "original.onnx", example=example, time=False)
    rows: dict[str, dict[str, Any]] = {"original": {"file": folder / "original.onnx", "macs": 1.0}}
    for multiple in (8, 16, 1):
        name = f"fewbit, 1/{SPEEDUP:g} of the MACs, multiple={multiple}"
        rows[name] = ours(model, example, folder / f"by{multiple}.onnx", speedup=SPEEDUP, multiple=multiple)
    judged = (
        f"fewbit, 1/{SPEEDUP:g} of the MACs, multiple=16"  # a block of ONNX Runtime's kernels with AVX-512
    )
    whole = latency.interleaved({"original": rows["original"]["file"]}, example.numpy(), 1, 3.0)
    goal = 0.5 * whole["original"]["median_ms"]
    budgeted = f"fewbit, latency={goal:.2f} ms"
    rows[budgeted] = ours(model, example, folder / "timed.onnx", latency=f"{goal} ms")
    if not args.quick:
        rows["Torch-Pruning, round_to=8"] = peer(folder / "peer.onnx", 8)
    files = {name: row["file"] for name, row in rows.items() if "file" in row}
    found = latency.interleaved(files, example.numpy(), 1, 10.0 if args.quick else args.seconds)
    print(f"{NETWORK}, 224x224, batch 1, ONNX Runtime, float32, 1 thread; {compare.cpu()}")
    print(f"{'':40s} {'fewer MACs':>10s} {'ms':>8s} {'faster':>8s} {'of the MACs':>12s}")
    for name, row in rows.items():
        if name not in found:
            print(f"{name:40s} failed: {row['error']}")
            continue
        faster = 1 / found[name]["ratio"]
        row |= {
            "faster": faster,
            "latency": found[name],
            "file": str(row["file"]),
            "said": str(row.get("said")),
        }
        ms = found[name]["median_ms"]
        print(f"{name:40s} {row['macs']:9.2f}x {ms:8.2f} {faster:7.2f}x {faster / row['macs']:11.0%}")
    fast = rows[judged]["faster"] / rows[judged]["macs"]
    reached = float(
        np.median(np.array(found[budgeted]["times_ms"]) / np.array(found["original"]["times_ms"]))
    )
    bars = [
        table.bar(f"latency ratio >= {BAR:.0%} of the MAC ratio, multiple=16", fast >= BAR, f"{fast:.0%}"),
        table.bar(
            "pruned to half the latency: within 5 % of it when timed again",
            reached <= 0.525,
            f"{reached:.3f}",
        ),
    ]
    print(f"written to {compare.save('pruning_latency', {'rows': rows, 'bars': bars})}")
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
