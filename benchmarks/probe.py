"""Bar 5: one awkward network (depthwise, hardswish, attention, LayerNorm) through fewbit and every peer."""

import argparse
from typing import Any

import compare
import ours
import table
import torch

PEERS = [
    "ort",
    "ort-reduce",
    "ort-u8u8",
    "ort-dynamic",
    "aimet",
    "torchao",
    "nncf",
    "modelopt",
    "modelopt-onnx",
]
OTHER_RUNTIMES = ["openvino", "xnnpack"]
QUICK_PEERS = ["ort", "ort-reduce"]
SETTINGS: dict[str, dict[str, Any]] = {
    "fewbit int8": {},
    "fewbit int8, mse observer": {"observer": "mse"},
    "fewbit int8 dynamic": {"recipe": "int8-dynamic"},
}


def ahead(mine: compare.Row, peer: compare.Row, threads: int) -> dict[str, Any]:
    """One bar: ours against one peer's row in accuracy (within its own noise), size and latency."""
    worse = []
    # Two files that answer alike differ by chance: one standard error of the difference on 3,000 inputs is 0.3.
    if mine["accuracy"] < peer["accuracy"] - 0.3:
        worse.append("accuracy")
    if mine["bytes"] > peer["bytes"]:
        worse.append("size")
    low, middle, high = compare.pair_ratio(mine, peer, threads)
    if middle > 1.0:
        worse.append("latency")
    simulated = peer.get("simulation_sqnr_db")
    if simulated is not None and not mine["simulation_exact"] and mine["simulation_sqnr_db"] < simulated:
        worse.append("simulated vs deployed")
    accuracies = f"accuracy {mine['accuracy']:.2f} against {peer['accuracy']:.2f} %"
    sizes = f"{mine['bytes'] / peer['bytes']:.2f} x the size"
    text = f"{accuracies}, {sizes}, {middle:.2f} ({low:.2f} to {high:.2f}) x the time"
    found = f"{text}; behind in {', '.join(worse)}" if worse else text
    return table.bar(f"ahead of {peer['name']}", not worse, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=300)
    parser.add_argument("--peers", default="", help="names of compare.PEERS, separated by commas")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="measuring time for each number of threads"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, few peers")
    args = parser.parse_args()
    torch.set_num_threads(2)
    bench = compare.Bench.prepare("probe", calibration=args.calibration)
    rows = [bench.float_row()]
    rows += [ours.attempt(bench, label, **settings) for label, settings in SETTINGS.items()]
    chosen = QUICK_PEERS if args.quick else [*PEERS, *OTHER_RUNTIMES]
    peers = [bench.peer_row(key) for key in (args.peers.split(",") if args.peers else chosen)]
    for threads in (1, 4):
        bench.add_latency([*rows, *peers], threads, 6.0 if args.quick else args.seconds)
    count = f"{args.calibration} calibration images, {len(bench.task.inputs)} test images"
    table.show(f"probe network, batch 1; {count}; {compare.cpu()}", [*rows, *peers], list(table.COLUMNS))
    mine = rows[1]
    bars = [ahead(mine, peer, 1) for peer in peers if "error" not in peer and "error" not in mine]
    print(f"written to {compare.save('probe', {'rows': [*rows, *peers], 'bars': bars})}")


if __name__ == "__main__":
    main()
