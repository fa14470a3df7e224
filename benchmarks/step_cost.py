"""Bar 5 of training: what a step with fake quantization costs, beside float, torchao's PT2E QAT and Brevitas.

All are timed in turn in one process of the peers' environment (`make peers`), one thread pool, the same batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import compare

from fewbit.tables import text_table

HERE = Path(__file__).resolve().parent
MOST = 1.6  # times the float step


def race(args: argparse.Namespace, bfloat16: bool) -> dict[str, dict[str, object]]:
    command = [str(compare.PEERS_PYTHON), str(HERE / "peers" / "qat_steps.py"), "--network", args.network]
    command += ["--size", str(args.size), "--batch", str(args.batch), "--rounds", str(args.rounds)]
    command += ["--threads", str(args.threads)] + (["--bfloat16"] if bfloat16 else [])
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed:\n{done.stderr[-2000:]}")
    found: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not compare.PEERS_PYTHON.exists():
        print("SKIPPED: no .venv-peers; `make peers` makes it", file=sys.stderr)
        return 77
    missed = False
    for bfloat16 in (False, True):
        found = race(args, bfloat16)
        times = {name: list(values) for name, values in found["times"].items()}  # type: ignore[call-overload]
        rows = []
        for name, values in times.items():
            pairs = sorted(a / b for a, b in zip(values, times["float"], strict=True))
            spread = f"{pairs[len(pairs) // 4]:.2f} to {pairs[-len(pairs) // 4]:.2f}"
            rows.append(
                [name, f"{1000 * statistics.median(values):.0f}", f"{statistics.median(pairs):.2f}", spread]
            )
        rows += [[name, "-", "failed", str(reason)] for name, reason in found["failed"].items()]
        precision = "bfloat16 autocast" if bfloat16 else "float32"
        print(
            f"\n{args.network}, batch {args.batch} of {args.size} x {args.size}, {precision}, {args.threads} threads"
        )
        print(text_table(["step", "ms", "x float", "quartiles"], rows))
        ours = statistics.median(a / b for a, b in zip(times["fewbit W8A8"], times["float"], strict=True))
        peers = [n for n in times if n in ("torchao PT2E QAT", "Brevitas")]
        slower = [n for n in peers if statistics.median(times[n]) < statistics.median(times["fewbit W8A8"])]
        if not bfloat16:
            missed |= ours > MOST
            print(f"bar: at most {MOST} x float: {ours:.2f}, {'met' if ours <= MOST else 'MISSED'}")
        missed |= bool(slower)
        print(
            f"bar: no slower than {' and '.join(peers)}: {'MISSED: ' + ', '.join(slower) if slower else 'met'}"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
