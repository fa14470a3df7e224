"""Four, three and two bits after training: ResNet-20 and ResNet-56 on CIFAR-10, peers on the same images."""

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import compare
import data
import models
import numpy as np
import ours
import table
import torch

import fewbit

CALIBRATION = 1024
PEERS = ["brevitas-gptq", "brevitas-learned", "aimet-seqmse", "aimet-adaround", "nncf-few-bits"]
ONLY = {"nncf-few-bits": {"w4a4", "w4a8"}}  # the settings of peers that do not take every width
MINUTES, CORES = 6, 4  # what the reconstruction of ResNet-20 may take, and on how many cores
Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Bits of weights and activations, the recipe, how many points it may cost; whether there are no images."""

    label: str
    bits: tuple[int, int]
    recipe: str
    allowed: float
    synthetic: bool = False


SETTINGS = {
    "w4a4": Setting("W4A4", (4, 4), "w4a4", 0.6),
    "w3a3": Setting("W3A3", (3, 3), "w3a3", 2.0),
    "w2a4": Setting("W2A4", (2, 4), "w2a4", 3.0),
    "w4a8": Setting("W4A8", (4, 8), "w4a8", 0.15),
    "w2a8": Setting("W2A8", (2, 8), "w2a8", 2.0),
    "data-free": Setting("W4A4, no data", (4, 4), "w4a4", 1.5, synthetic=True),
}
CODEBOOKS = "codebooks"
WEIGHTS = ["codebook4", "codebook4_shared", "int4", "int5", "codebook3", "codebook3_shared", "int3"]
FINETUNE = {4: 3, 3: 5}  # epochs, by bits of the weights; as the recipes codebook4 and codebook3 have it
CODEBOOK_BARS = {"codebook4": 0.2, "codebook3": 0.8}


@dataclass
class Store:
    """Records of runs in a JSON file, which processes side by side may share; a run that is there is not repeated."""

    file: Path
    fresh: bool
    done: set[str] = field(default_factory=set)

    def run(self, key: str, asked: dict[str, Any], measure: Callable[[], Record]) -> Record:
        """The record of `key` for what was asked, measured if it is not there; failed runs are tried again."""
        found = self._load()["runs"].get(key)
        if (
            found
            and found["asked"] == asked
            and "error" not in found
            and (not self.fresh or key in self.done)
        ):
            return dict(found)
        record = {"asked": asked, **measure(), "load": os.getloadavg()[0], "time": time.strftime("%F %H:%M")}
        self._update(lambda content: content["runs"].update({key: record}))
        self.done.add(key)
        shown = record.get("error") or f"{record['accuracy']:.2f} %, {record.get('seconds', 0):.0f} s"
        print(f"  {key}: {shown}", file=sys.stderr)
        return record

    def judged(self, bars: list[Record]) -> None:
        """Saves the bars as they were judged last, with the environment."""
        self._update(lambda content: content.update(bars=bars, environment=compare.environment()))

    def _load(self) -> dict[str, Any]:
        content = json.loads(self.file.read_text()) if self.file.exists() else {}
        return {"runs": {}, **content}

    def _update(self, change: Callable[[dict[str, Any]], None]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self._load()
            change(content)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(content, indent=1))
            part.replace(self.file)


class Network:
    """One network's runs: ours, the peers' and the float baseline, on the same images for each seed."""

    def __init__(self, name: str, store: Store, args: argparse.Namespace) -> None:
        self.name, self.store, self.args = name, store, args
        self.test = 2000 if args.quick else None
        self._benches: dict[int, compare.Bench] = {}

    def bench(self, seed: int) -> compare.Bench:
        """The network with the calibration images that `seed` draws; all seeds have the same test images."""
        if seed not in self._benches:
            into = f"few_bits/{self.name}-{'quick-' if self.args.quick else ''}{seed}"
            drawn = compare.Bench.prepare(
                self.name, calibration=CALIBRATION, test=self.test, seed=seed, into=into
            )
            self._benches = {seed: drawn}  # one at a time: the test images are large
        return self._benches[seed]

    def float_accuracy(self) -> float:
        """Per cent, of the float file in ONNX Runtime."""
        run = self.store.run(
            f"{self.name}/float",
            {"test": self.test},
            lambda: {"accuracy": self.bench(0).float_row()["accuracy"]},
        )
        return float(run["accuracy"])

    def ours(self, key: str, seed: int, export: bool) -> Record:
        """Our accuracy in simulation, and with `export` the exported file's in ONNX Runtime."""
        options = {"recipe": SETTINGS[key].recipe, **self.args.options}
        asked = {"test": self.test, "export": export, **options}

        def measure() -> Record:
            bench, synthetic = self.bench(seed), SETTINGS[key].synthetic
            module, example = models.build(bench.name, bench.weights), torch.from_numpy(bench.task.inputs[:1])
            started = time.perf_counter()
            images = (
                fewbit.synthesize(module, example, samples=CALIBRATION, seed=seed, progress=False)
                if synthetic
                else torch.from_numpy(bench.task.calibration)
            )
            made = time.perf_counter() - started
            quantized = fewbit.quantize(module, images, seed=seed, progress=False, **options)
            seconds = time.perf_counter() - started
            simulated = ours.simulate(quantized, bench.task.inputs)
            record = {
                "accuracy": bench.accuracy(simulated), "seconds": seconds, "synthesis_seconds": made,
                "threads": torch.get_num_threads(),
            }  # fmt: skip
            return record | (self._exported(bench, quantized, simulated) if export else {})

        return self.store.run(f"{self.name}/{key}/{seed}/fewbit", asked, measure)

    def _exported(self, bench: compare.Bench, quantized: Any, simulated: np.ndarray) -> Record:
        file = bench.folder / "few-bits.onnx"
        fewbit.export(quantized, file, time=False)
        outputs = compare.run_onnx(file, bench.task.inputs, threads=self.args.threads)
        return {
            "onnx_accuracy": bench.accuracy(outputs), "onnx_bytes": file.stat().st_size,
            "onnx_agreement": 100 * float((outputs.argmax(1) == simulated.argmax(1)).mean()),
        }  # fmt: skip

    def peer(self, peer: str, key: str, seed: int) -> Record:
        """A peer's accuracy in its own simulation, on the same float weights and images."""
        bits = SETTINGS[key].bits
        more = [f"--seed={seed}", "--bits", *map(str, bits)]
        if self.args.peer_iterations:
            more.append(f"--iterations={self.args.peer_iterations}")
        asked = {"test": self.test, "iterations": self.args.peer_iterations, "limit": self.args.limit}

        def measure() -> Record:
            bench = self.bench(seed)
            out = bench.folder / f"{peer}-{key}"
            result = bench.ask(peer, out, more, threads=self.args.threads, limit=self.args.limit)
            if "error" in result:
                return result
            outputs = np.load(out / "outputs.npy", allow_pickle=False)
            kept = {name: result[name] for name in ("seconds", "versions")}
            return {"accuracy": bench.accuracy(outputs), **kept}

        return self.store.run(f"{self.name}/{key}/{seed}/{peer}", asked, measure)

    def codebook(self, weights: str) -> Record:
        """Weights only: accuracy as they round without data, with GPTQ, and fine-tuned; bits with tables and scales."""
        options = {"weights": weights, "activations": "float", "ends": "int8", "weight_observer": "mse"}
        epochs = FINETUNE[3 if "3" in weights else 4]
        variants = {
            "no_data": {}, "accuracy": {"rounding": "gptq"}, "tuned": {"rounding": "gptq", "finetune": epochs},
        }  # fmt: skip

        def measure() -> Record:
            bench, record = self.bench(0), {}
            images = torch.from_numpy(bench.task.calibration)
            for name, more in variants.items():
                started = time.perf_counter()
                module = models.build(bench.name, bench.weights)
                quantized = fewbit.quantize(module, images, progress=False, **options, **more)
                record["seconds"] = time.perf_counter() - started
                record[name] = bench.accuracy(ours.simulate(quantized, bench.task.inputs))
            coded = [quantized.qtensors[layer] for layer in quantized.qtensors.names()]
            inner = [q for q in coded if q.scheme.format == weights]
            record["bits_per_weight"] = 8 * sum(q.nbytes for q in inner) / sum(q.codes.numel() for q in inner)
            return record

        asked = {"test": self.test, **options, "variants": variants}
        return self.store.run(f"{self.name}/{CODEBOOKS}/{weights}", asked, measure)


def measured(network: Network, keys: Iterable[str]) -> list[Record]:
    """A row for each setting: our mean and extremes over the seeds, each peer's mean beside ours on its seeds."""
    args, rows = network.args, []
    seeds = [0] if args.quick else args.seeds
    for key in keys:
        runs = {s: network.ours(key, s, export=key == "w4a4" and s == seeds[0]) for s in seeds}
        found = [run["accuracy"] for run in runs.values()]
        row: Record = {
            "setting": SETTINGS[key], "accuracy": mean(found), "found": found, "peers": {}, "errors": {},
            "seconds": mean(run["seconds"] for run in runs.values()), "onnx": runs[seeds[0]].get("onnx_accuracy"),
        }  # fmt: skip
        able = [peer for peer in args.peers if key in ONLY.get(peer, SETTINGS)]
        for peer in [] if SETTINGS[key].synthetic else able:
            asked = {s: network.peer(peer, key, s) for s in seeds if s in args.peer_seeds}
            answered = {s: run["accuracy"] for s, run in asked.items() if "error" not in run}
            if answered:
                beside = mean(runs[s]["accuracy"] for s in answered)
                row["peers"][peer] = {"accuracy": mean(answered.values()), "ours": beside}
            elif asked:
                row["errors"][peer] = next(iter(asked.values()))["error"]
        rows.append(row)
    return rows


def show(network: Network, rows: list[Record], baseline: float) -> None:
    """The table of one network: drop in points, and each peer's accuracy."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    images = f"{CALIBRATION} calibration images; float {baseline:.2f} %; {compare.cpu()}"
    grid = Table(title=f"{network.name}, CIFAR-10: {images}", title_justify="left", box=box.SIMPLE)
    peers = list(dict.fromkeys(peer for row in rows for peer in (*row["peers"], *row["errors"])))
    for column in ("setting", "fewbit %", "seeds", "drop", "allowed", "ONNX %", "s"):
        grid.add_column(column, justify="left" if column in ("setting", "seeds") else "right")
    for peer in peers:
        grid.add_column(compare.PEERS[peer].label, justify="right")
    for row in rows:
        theirs = [f"{row['peers'][p]['accuracy']:.2f}" if p in row["peers"] else "" for p in peers]
        grid.add_row(
            row["setting"].label, f"{row['accuracy']:.2f}", " ".join(f"{a:.2f}" for a in row["found"]),
            f"{baseline - row['accuracy']:.2f}", f"{row['setting'].allowed:.2f}",
            "" if row["onnx"] is None else f"{row['onnx']:.2f}", f"{row['seconds']:.0f}", *theirs,
        )  # fmt: skip
    console = Console(width=max(160, Console().width), highlight=False)
    console.print(grid)
    for row in rows:
        for peer, error in row["errors"].items():
            console.print(f"  {compare.PEERS[peer].label}, {row['setting'].label}: {error}", markup=False)


def judged(network: Network, rows: list[Record], baseline: float) -> list[Record]:
    """Bars 1 and 2 for one network; a short run judges nothing."""
    bars, quick = [], network.args.quick
    for row in rows:
        what, drop = f"{network.name} {row['setting'].label}", baseline - row["accuracy"]
        met = None if quick else drop <= row["setting"].allowed
        bars.append(table.bar(f"{what}: within {row['setting'].allowed} points", met, f"{drop:.2f}"))
        if row["peers"]:
            closest, best = max(row["peers"].items(), key=lambda each: each[1]["accuracy"] - each[1]["ours"])
            label = compare.PEERS[closest].label
            shown = f"{best['ours']:.2f} %, {label} {best['accuracy']:.2f} % on the same images"
            met = None if quick else best["ours"] > best["accuracy"]
            bars.append(table.bar(f"{what}: ahead of {len(row['peers'])} peers", met, shown))
    slowest = max((row["seconds"] for row in rows), default=0.0)
    if network.name == "resnet20" and rows:
        enough = slowest <= 60 * MINUTES
        # Fewer cores can show that it is fast enough, but not that it is too slow.
        met = (
            None
            if quick or (not enough and min(torch.get_num_threads(), os.cpu_count() or 1) < CORES)
            else enough
        )
        text = f"{network.name}: reconstructed in {MINUTES} minutes on {CORES} cores"
        bars.append(table.bar(text, met, f"{slowest:.0f} s with {network.args.threads} threads"))
    return bars


def codebooks(network: Network, baseline: float) -> list[Record]:
    """Bar 3: table and bars of codebooks beside integers, weights only."""
    rows = {weights: network.codebook(weights) for weights in WEIGHTS}
    print(f"\n{network.name}, weights only, both ends int8; float {baseline:.2f} %")
    print(
        f"{'':20}{'no data %':>12}{'GPTQ %':>10}{'fine-tuned %':>14}{'drop':>8}{'bits per weight':>18}{'s':>8}"
    )
    for weights, row in rows.items():
        drop = f"{row['no_data']:12.2f}{row['accuracy']:10.2f}{row['tuned']:14.2f}{baseline - row['accuracy']:8.2f}"
        print(f"{weights:20}{drop}{row['bits_per_weight']:18.2f}{row['seconds']:8.1f}")
    bars, quick = [], network.args.quick
    for weights, row in rows.items():
        what = f"{network.name} {weights}"
        if weights in CODEBOOK_BARS:
            allowed, drop = CODEBOOK_BARS[weights], baseline - row["accuracy"]
            met = None if quick else drop <= allowed
            bars.append(table.bar(f"{what}: within {allowed} points", met, f"{drop:.2f}"))
        smaller = [
            n for n in rows if n.startswith("int") and rows[n]["bits_per_weight"] <= row["bits_per_weight"]
        ]
        if weights.startswith("codebook") and smaller:
            rival = max(smaller, key=lambda name: rows[name]["accuracy"])
            met = None if quick else row["accuracy"] >= rows[rival]["accuracy"]
            shown = f"{row['accuracy']:.2f} %, {rival} {rows[rival]['accuracy']:.2f} %"
            bars.append(table.bar(f"{what}: as good as integers of no more bits per weight", met, shown))
    return bars


def arguments() -> argparse.Namespace:
    """The command line; `options` are what it adds to our recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", help="default: resnet20,resnet56")
    parser.add_argument("--settings", help=f"of {', '.join(SETTINGS)}, {CODEBOOKS} (default: all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--peers", help=f"of {', '.join(PEERS)} (default: all), or 'none'")
    parser.add_argument("--peer-seeds", default="0", help="on which of the seeds peers run")
    parser.add_argument("--peer-iterations", type=int, help="of peers that learn (default: their own)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one run of a peer")
    parser.add_argument("--iterations", type=int, help="steps for each block instead of the recipe's")
    parser.add_argument("--finetune", type=int, help="epochs instead of the recipe's")
    parser.add_argument("--threads", type=int, default=min(CORES, os.cpu_count() or 1))
    parser.add_argument("--fresh", action="store_true", help="measure again what is in few_bits.json")
    parser.add_argument(
        "--quick", action="store_true", help="ResNet-20, W4A4 and W2A4, seed 0, 2,000 test images"
    )
    args = parser.parse_args()
    args.models = (args.models or ("resnet20" if args.quick else "resnet20,resnet56")).split(",")
    args.settings = (
        args.settings or ("w4a4,w2a4" if args.quick else ",".join([*SETTINGS, CODEBOOKS]))
    ).split(",")
    args.peers = (args.peers or ("none" if args.quick else ",".join(PEERS))).split(",")
    args.peers = [] if args.peers == ["none"] else args.peers
    args.seeds, args.peer_seeds = ([int(s) for s in t.split(",")] for t in (args.seeds, args.peer_seeds))
    for given, known in ((args.settings, [*SETTINGS, CODEBOOKS]), (args.peers, PEERS)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
    short = {"iterations": 50, "finetune": 0} if args.quick else {}
    chosen = {"iterations": args.iterations, "finetune": args.finetune}
    args.options = short | {name: value for name, value in chosen.items() if value is not None}
    return args


def main() -> None:
    args = arguments()
    data.skip_without_data()
    torch.set_num_threads(args.threads)
    file = data.BUILD / ("few_bits-quick.json" if args.quick else "few_bits.json")
    store, bars = Store(file, args.fresh), []
    keys = [key for key in args.settings if key in SETTINGS]
    for name in args.models:
        network = Network(name, store, args)
        baseline = network.float_accuracy()
        rows = measured(network, keys)
        if rows:
            show(network, rows, baseline)
            bars += judged(network, rows, baseline)
        if CODEBOOKS in args.settings:
            bars += codebooks(network, baseline)
    store.judged(bars)
    print(f"written to {file}")
    sys.exit(any(bar["met"] is False for bar in bars))


if __name__ == "__main__":
    main()
