"""Bar 5: GPTQ of a 4096 x 4096 layer with 2,048 tokens in int4, beside the peers that run on this CPU."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import compare
import numpy as np
import table
import torch

SCRIPT = Path(__file__).parent / "peers" / "gptq_layer.py"
OURS = ["fewbit", "fewbit, minmax", "fewbit, importance"]
PEERS = ["llm-compressor", "nncf", "brevitas", "neural-compressor"]
LIMIT = 240  # seconds for one run: a slower peer is out of the race


def layer(size: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights and two sets of tokens like those of language models: correlated, a few channels much larger."""
    generator = torch.Generator().manual_seed(0)
    rank = size // 16
    mixed = torch.randn(2 * tokens, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
    x = 0.7 * mixed / rank**0.5 + torch.randn(2 * tokens, size, generator=generator)
    x *= torch.exp(0.7 * torch.randn(size, generator=generator))
    weight = 0.02 * torch.randn(size, size, generator=generator)
    return weight.numpy(), x[:tokens].numpy(), x[tokens:].numpy()


def run(name: str, folder: Path, group: int | None, threads: int) -> dict[str, Any]:
    """Seconds, and the relative output error on the tokens and on others, of one run in a process of its own."""
    python = sys.executable if name in OURS else str(compare.PEERS_PYTHON)
    out = folder / "rounded.npy"
    command = [python, str(SCRIPT), "--peer", name, "--weight", str(folder / "weight.npy"), "--out", str(out)]
    command += ["--tokens", str(folder / "tokens.npy"), "--threads", str(threads)]
    command += ["--group", str(group)] if group else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {LIMIT} s"}
    except FileNotFoundError:
        return {"error": "no .venv-peers; see peers-requirements.txt"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1][:100]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    rounded, weight = (torch.from_numpy(np.load(p, allow_pickle=False)) for p in (out, folder / "weight.npy"))
    for key, file in (("output_error", "tokens.npy"), ("unseen_error", "unseen.npy")):
        tokens = torch.from_numpy(np.load(folder / file, allow_pickle=False))
        exact = tokens @ weight.T
        found[key] = float((tokens @ rounded.T - exact).square().sum() / exact.square().sum())
    return found


def race(
    group: int | None, folder: Path, names: list[str], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Each tool's fastest of a few interleaved rounds."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if not any("error" in earlier for earlier in runs[name]):
                runs[name].append(run(name, folder, group, threads))
                print(f"  {name}: {runs[name][-1]}", file=sys.stderr)
    return [{"name": name, **min(found, key=lambda r: r.get("seconds", 1e9))} for name, found in runs.items()]


def bars(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Our seconds and our output error against the best peer's."""
    peers = [row for row in rows if row["name"] in PEERS and "error" not in row]
    ours = {row["name"]: row for row in rows}
    if not peers:
        return [table.bar(f"{what}: beside a peer", None, "no peer ran")]
    fastest, closest = min(p["seconds"] for p in peers), min(p["output_error"] for p in peers)
    plain = ours[OURS[0]]
    return [
        table.bar(
            f"{what}: no slower than the fastest peer", plain["seconds"] <= fastest,
            f"{plain['seconds']:.1f} s, peers from {fastest:.1f} s",
        ),
        table.bar(
            f"{what}: output error no higher than the least of the peers'",
            plain["output_error"] <= closest * 1.001,
            f"{plain['output_error']:.3e}, peers from {closest:.3e}",
        ),
    ]  # fmt: skip


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a plain table."""
    print(f"\n{title}\n{'':22}{'s':>8}{'CPU s':>8}{'error':>12}{'unseen':>12}  version")
    for row in rows:
        if "error" in row:
            print(f"{row['name']:22}{row['error']}")
            continue
        errors = f"{row['output_error']:12.3e}{row['unseen_error']:12.3e}"
        print(f"{row['name']:22}{row['seconds']:8.1f}{row['cpu_seconds']:8.1f}{errors}  {row['version']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1, help="the fastest of so many counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=",".join(PEERS), help="names separated by commas")
    args = parser.parse_args()
    result, found = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays = layer(args.size, args.tokens)
        for file, array in zip(("weight", "tokens", "unseen"), arrays, strict=True):
            np.save(folder / f"{file}.npy", array)
        for group in (128, None):
            what = f"group {group}" if group else "per channel"
            rows = race(group, folder, [*OURS, *args.peers.split(",")], args.rounds, args.threads)
            show(f"int4, {what}; {args.size} x {args.size}, {args.tokens} tokens; {compare.cpu()}", rows)
            result[what] = rows
            found += bars(rows, what)
    print(f"written to {compare.save('gptq', {'rows': result, 'bars': found})}")
    sys.exit(any(bar["met"] is False for bar in found))


if __name__ == "__main__":
    main()
