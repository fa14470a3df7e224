"""The saved form: bits per weight beside the entropy, zlib and lzma, and how fast weights are decoded on one thread.

The entropy is that of weights drawn independently, which no coder that sees nothing but counts goes below. A rate is
megabytes of float32 weights (four for each) a second of processor time, so that other work does not count.
"""

import argparse
import lzma
import sys
import time
import zlib
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import table
import torch
from torch import Tensor

from fewbit.numerics.coded_tensor import CodedTensor
from fewbit.numerics.coding import registry
from fewbit.numerics.packing import pack

FLOOR = 100.0  # MB/s


def layers(side: int) -> dict[str, tuple[Tensor, int]]:
    """Codes of a weight, and their bits, as pruning, k-means and rounding leave them: the seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(side, side, generator=generator)
    kept = torch.rand(side, side, generator=generator) < 0.05
    dead = (
        torch.rand(side, generator=generator) < 0.3
    )  # inputs that no unit reads, as the border of MNIST's images
    shared = (gauss * 3).round().clamp(-8, 7) + 8  # sixteen values
    sparse = torch.where(kept, shared.clamp(max=14) + 1, 0)
    return {
        "4 bits, dense": (shared.to(torch.uint8), 4),
        "8 bits, dense": ((gauss * 35).round().clamp(-127, 127).to(torch.int8), 8),
        "5 % of 16 values": (sparse.to(torch.uint8), 4),
        "5 %, dead inputs": (torch.where(dead, 0, sparse).to(torch.uint8), 4),
    }


def entropy(codes: Tensor) -> float:
    """Bits a weight."""
    share = codes.unique(return_counts=True)[1].double() / codes.numel()
    return -float((share * share.log2()).sum())


def timed(run: Callable[[], Any], rounds: int) -> float:
    """The median of a few rounds, in seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return median(seconds)


def routes(codes: Tensor, bits: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Bytes of each way to store the codes, and what reads them."""
    ours = CodedTensor.encode(codes).to_bytes()
    n, shape = codes.numel(), tuple(codes.shape)
    found: dict[str, tuple[int, Callable[[], Any]]] = {
        "fewbit": (len(ours), lambda: CodedTensor.read(ours, n, 1).decode(codes.dtype, shape))
    }
    symbols = codes.reshape(-1).view(torch.uint8).numpy()
    symbols = symbols - np.uint8(codes.min())
    counts = np.bincount(symbols)
    for name in registry.names():
        coder = registry.module(name)
        stored = coder.encode(symbols, counts)
        found[f"  dense, {name}"] = (sum(map(len, stored)), lambda c=coder, s=stored: c.decode(*s, n))
    plain, packed = symbols.tobytes(), bytes(pack(codes, bits).numpy())
    for name, data in ((", a byte a code", plain), (", packed codes", packed)):
        z, x = zlib.compress(data, 9), lzma.compress(data, preset=6)
        found[f"zlib{name}"] = (len(z), lambda z=z: zlib.decompress(z))
        found[f"lzma{name}"] = (len(x), lambda x=x: lzma.decompress(x))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=2000, help="weights of a layer: the square of this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small layers; rates are not judged")
    args = parser.parse_args()
    torch.set_num_threads(1)
    side = 400 if args.quick else args.side
    bars = []
    for name, (codes, bits) in layers(side).items():
        n, bound = codes.numel(), entropy(codes)
        print(f"\n{name}: {n:,} weights, entropy {bound:.4f} bits")
        print(f"{'route':24}{'bits a weight':>15}{'over entropy':>14}{'MB/s of float32':>18}")
        sizes, rates = {}, {}
        for route, (size, read) in routes(codes, bits).items():
            sizes[route], rates[route] = 8 * size / n, 4 * n / 1e6 / timed(read, args.rounds)
            print(f"{route:24}{sizes[route]:15.4f}{sizes[route] / bound - 1:14.2%}{rates[route]:18,.0f}")
        least = min(size for route, size in sizes.items() if "zlib" in route or "lzma" in route)
        slack = 0.02 if args.quick else 0.01
        text = f"within {slack:.0%} of the entropy, or below"
        bars.append(
            table.bar(
                f"{name}: {text}",
                sizes["fewbit"] <= (1 + slack) * bound,
                f"{sizes['fewbit'] / bound - 1:.2%}",
            )
        )
        bars.append(
            table.bar(
                f"{name}: smaller than zlib and lzma",
                sizes["fewbit"] < least,
                f"{sizes['fewbit'] / least:.3f} of the smallest",
            )
        )
        rate = None if args.quick else rates["fewbit"] >= FLOOR
        bars.append(
            table.bar(f"{name}: decoded at {FLOOR:.0f} MB/s at least", rate, f"{rates['fewbit']:,.0f} MB/s")
        )
    return 0 if all(bar["met"] is not False for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
