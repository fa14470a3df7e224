"""Bars 2 and 3: integers that differ between deployed files and `reference`; what runs in integer kernels."""

import argparse
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compare
import coverage
import data
import models
import numpy as np
import table
import torch
from models.random_net import RandomNet
from torch import Tensor, nn

import fewbit
from fewbit.gate import check_file
from fewbit.targets import get_target

NETWORKS = ["resnet20", "resnet56", "mobilenetv2-32", "transformer", "probe", "demo"]


@dataclass
class Found:
    """Counts over all inputs of one network: codes of integer layers, and numbers of the network's output."""

    name: str
    inputs: int = 0
    layers: int = 0
    codes: int = 0
    codes_differing: int = 0
    outputs: int = 0
    outputs_differing: int = 0
    compared: str = ""
    first: str = ""
    convs: tuple[int, int] = (0, 0)
    linears: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    error: str = ""
    exceptions: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every operation is integer, so that the network's outputs must agree bit for bit."""
        return self.compared == "bit for bit"

    @property
    def exact(self) -> bool:
        """Nothing differs that must not."""
        return not self.error and not self.codes_differing and not (self.whole and self.outputs_differing)

    @property
    def covered(self) -> bool:
        """Every convolution and linear layer in an integer kernel, and there is one."""
        kinds = (self.convs, self.linears)
        return not self.error and all(a == b for a, b in kinds) and any(b for _, b in kinds)


def check(name: str, module: nn.Module, calibration: Tensor, inputs: Tensor, file: Path, batch: int) -> Found:
    """Quantizes, exports without the gate, compares here: what differs is counted and not refused."""
    found, started = Found(name, inputs=len(inputs)), time.perf_counter()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        quantized = fewbit.quantize(module, calibration)
        fewbit.export(quantized, file, verify=False)
        _compare(found, file, inputs, batch)
    except Exception as error:  # one network that fails must not hide what the others show
        found.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    found.seconds = time.perf_counter() - started
    return found


def _compare(found: Found, file: Path, inputs: Tensor, batch: int) -> None:
    target = get_target("onnx")
    described = target.describe(file)
    for piece in inputs.split(batch):
        result = check_file(target, file, described.program, described.codes, (piece,))
        wrong = [layer for layer in result.layers if layer.differing]
        found.layers, found.compared = len(result.layers), result.whole_network
        found.codes += sum(layer.total for layer in result.layers)
        found.codes_differing += sum(layer.differing for layer in wrong)
        found.outputs += result.output_total
        found.outputs_differing += result.output_differing
        found.first = found.first or (f"{wrong[0].layer} ({wrong[0].kind})" if wrong else "")
    # Counted by this folder's own reading of the runtime's graph, not by the gate's.
    seen = coverage.read(file)
    found.convs = (seen.integer_convs, seen.integer_convs + seen.float_convs)
    found.linears = (seen.integer_linears, seen.integer_linears + seen.float_linears)
    found.exceptions = [f"{k.layer} ({k.kind}): {k.cause}" for k in result.kernels if not k.integer]


def network(name: str, calibration: int, test: int | None) -> tuple[nn.Module, Tensor, Tensor]:
    """A named network with calibration and test inputs."""
    if name == "demo":
        from fewbit.demo import load

        module, digits = load()
        return module, torch.from_numpy(digits.calibration_images), torch.from_numpy(digits.test_images)
    task = data.task(models.CASES[name].data, calibration=calibration, test=test)
    return models.build(name), torch.from_numpy(task.calibration), torch.from_numpy(task.inputs)


def random_networks(count: int) -> list[Found]:
    """The random networks of seeds 0 to count - 1, each on 32 inputs of its own."""
    from rich.progress import track

    results = []
    for seed in track(range(count), description="random networks", transient=True):
        module = RandomNet(seed).eval()
        rng = np.random.default_rng(seed)
        drawn = torch.from_numpy(rng.standard_normal((64, *module.example), np.float32) * 1.5)
        file = data.BUILD / "random" / f"{seed}.onnx"
        results.append(check(f"seed {seed}", module, drawn[:32], drawn[32:], file, 32))
    return results


def show(rows: list[Found]) -> None:
    """Prints one row for each network."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    printed = Table(
        title=f"Deployed file against reference; {compare.cpu()}", title_justify="left", box=box.SIMPLE
    )
    for name in ("network", "inputs", "integer\nlayers", "their codes\ncompared", "differ"):
        printed.add_column(name, justify="left" if name == "network" else "right")
    for name in ("whole network\noutputs compared", "differ", "convs", "linears", "s"):
        printed.add_column(name, justify="right")
    for f in rows:
        kernels = [f"{a}/{b}" if b else "" for a, b in (f.convs, f.linears)]
        outputs = [f"{f.outputs:,}", f"{f.outputs_differing:,}"] if f.whole else ["has float parts", ""]
        codes = [str(f.layers), f"{f.codes:,}", f"{f.codes_differing:,}"]
        printed.add_row(f.name, f"{f.inputs:,}", *codes, *outputs, *kernels, f"{f.seconds:.0f}")
    console = Console(width=150, highlight=False)
    console.print(printed)
    for f in rows:
        if f.error:
            console.print(f"  {f.name}: failed: {f.error}", markup=False)
        if f.first:
            console.print(f"  {f.name}: first that differs: {f.first}", markup=False)
        causes = Counter(text[text.rindex(" (") + 1 :] for text in f.exceptions)
        for text, count in causes.most_common(8):
            console.print(
                f"  {f.name}: {count} other operations not in integer kernels: {text}", markup=False
            )


def total(results: list[Found]) -> Found:
    """The random networks as one row."""
    whole = [f for f in results if f.whole]
    row = Found(f"{len(results)} random networks", compared="bit for bit" if whole else "")
    for key in ("inputs", "layers", "codes", "codes_differing", "seconds"):
        setattr(row, key, sum(getattr(f, key) for f in results))
    for key in ("outputs", "outputs_differing"):
        setattr(row, key, sum(getattr(f, key) for f in whole))
    for key in ("convs", "linears"):
        setattr(row, key, tuple(sum(getattr(f, key)[i] for f in results) for i in (0, 1)))
    row.name += f", {len(whole)} of them all integer"
    errors = Counter(f.error for f in results if f.error)
    row.error = "; ".join(f"{n} times {text}" for text, n in errors.most_common(5))
    row.exceptions = [text for f in results for text in f.exceptions]
    row.first = ", ".join(f"{f.name}: {f.first}" for f in results if f.first)[:300]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--random", type=int, default=200, help="how many random networks")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="200 test inputs and 20 random networks")
    args = parser.parse_args()
    names = [n for n in args.models.split(",") if n]
    if any(models.CASES[n].data == "cifar10" for n in names if n in models.CASES):
        data.skip_without_data()
    torch.set_num_threads(2)
    rows, test = [], 200 if args.quick else None
    for name in names:
        module, calibration, inputs = network(name, args.calibration, test)
        file = data.BUILD / name / "exactness.onnx"
        rows.append(check(name, module, calibration, inputs[:test], file, 100))
    drawn = random_networks(min(20, args.random) if args.quick else args.random)
    show([*rows, total(drawn)] if drawn else rows)
    compared = sum(f.codes for f in rows + drawn)
    differing = sum(f.codes_differing + (f.outputs_differing if f.whole else 0) for f in rows + drawn)
    failed = [f.name for f in rows + drawn if f.error]
    uncovered = [f.name for f in rows + drawn if not f.covered]
    bars = [
        table.bar(
            "0 differing integers between ONNX Runtime and reference",
            all(f.exact for f in rows + drawn),
            f"{differing:,} of {compared:,} codes differ; {len(failed)} networks failed",
        ),
        table.bar(
            "all convolutions and linear layers in integer kernels",
            not uncovered,
            f"not in {uncovered[:8]}" if uncovered else f"in all {len(rows + drawn)} networks",
        ),
    ]
    result: dict[str, Any] = {
        "rows": [vars(f) for f in rows],
        "random": [vars(f) for f in drawn],
        "bars": bars,
    }
    print(f"written to {compare.save('exactness', result)}")


if __name__ == "__main__":
    main()
