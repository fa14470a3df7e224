"""Bar 1: what quantization costs CIFAR-10 ResNet-20 and ResNet-56, peers beside us on the same images."""

import argparse
from statistics import median
from typing import Any

import compare
import data
import ours
import table
import torch

BARS = {("resnet20", "W8A8"): 91.6, ("resnet56", "W8A8"): 93.3, ("resnet20", "W4A8"): 90.0}
FOUR_BITS = {"weights": "int4", "equalize": True, "bias_correction": True}
PEERS = [
    "ort", "ort-reduce", "ort-u8u8", "ort-s8s8", "ort-dynamic", "nncf", "torchao", "aimet", "modelopt-onnx",
    "openvino", "xnnpack", "aimet-int4",
]  # fmt: skip
QUICK_PEERS = ["ort", "ort-reduce", "ort-u8u8"]
COLUMNS = [c for c in table.COLUMNS if not c.startswith("ms")]


def our_rows(bench: compare.Bench) -> dict[str, compare.Row]:
    """8-bit weights, the same with the full range that only a CPU with VNNI computes, 4-bit weights."""
    rows = {"W8A8": ours.attempt(bench, "fewbit W8A8")}
    if "no VNNI" not in compare.cpu():
        rows["full"] = ours.attempt(bench, "fewbit W8A8, portable=False", portable=False)
    rows["W4A8"] = ours.attempt(bench, "fewbit W4A8, equalized, bias corrected", **FOUR_BITS)
    rows["W4A8 mse"] = ours.attempt(bench, "fewbit W4A8, recipe int4-weights", recipe="int4-weights")
    return rows


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One network: the table, our rows under other draws of the calibration images, and its bars."""
    test = 2000 if args.quick else None
    count = 128 if args.quick else args.calibration
    draws: dict[str, list[float]] = {}
    for seed in range(1, 1 if args.quick else args.draws):
        bench = compare.Bench.prepare(name, calibration=count, test=test, seed=seed)
        bench.float_row()
        for key, row in our_rows(bench).items():
            draws.setdefault(key, []).append(row.get("accuracy", float("nan")))
    bench = compare.Bench.prepare(name, calibration=count, test=test)
    rows = [bench.float_row()]
    mine = our_rows(bench)
    rows += mine.values()
    for key, row in mine.items():
        draws.setdefault(key, []).insert(0, row.get("accuracy", float("nan")))
    for key in args.peers.split(",") if args.peers else QUICK_PEERS if args.quick else PEERS:
        rows.append(bench.peer_row(key))
    images = f"{count} calibration images, {len(bench.task.inputs)} test images"
    table.show(f"{name}, CIFAR-10: {images}; {compare.cpu()}", rows, COLUMNS)
    bars = []
    for (model, key), least in BARS.items():
        if model == name:
            found = median(draws[key])
            shown = ", ".join(f"{accuracy:.2f}" for accuracy in draws[key])
            met = None if args.quick else found >= least
            bars.append(table.bar(f"{name} {key} >= {least} %", met, f"{found:.2f} % (draws: {shown})"))
    return {"rows": rows, "draws": draws, "bars": bars}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="resnet20,resnet56")
    parser.add_argument(
        "--peers", default="", help="names of compare.PEERS, separated by commas (default: all)"
    )
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--draws", type=int, default=3, help="draws of calibration images for our own rows")
    parser.add_argument(
        "--quick", action="store_true", help="2,000 test images, 128 for calibration, few peers"
    )
    args = parser.parse_args()
    data.skip_without_data()
    torch.set_num_threads(2)
    result = {name: measure(name, args) for name in args.models.split(",")}
    print(f"written to {compare.save('accuracy', result)}")


if __name__ == "__main__":
    main()
