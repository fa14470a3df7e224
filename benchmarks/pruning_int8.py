"""Pruned, then in 8 bits: the ResNet-56 that `pruning.py` made, its file, and its exported form verified bit for bit.

After the channels a few more weights become zero, in one go and fitted again, which makes the file smaller.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from data import BUILD, cifar10_test, normalise, skip_without_data, training_images
from models import build, weights_file
from pruning import NETWORK, accuracy

import fewbit

SEEN = 1024
MOST, LEAST = 0.13, 92.8  # of the float file's bytes; percent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=BUILD / "pruning" / "fewbit-activation-2.1-15-0" / "model"
    )
    parser.add_argument("--sparsity", type=float, default=0.3)
    args = parser.parse_args()
    skip_without_data()
    if not args.model.exists():
        print(f"{args.model} is not there: run python benchmarks/pruning.py first", file=sys.stderr)
        return 77
    test = tuple(torch.from_numpy(a) for a in cifar10_test())
    pixels, classes = training_images()
    order = np.random.default_rng(0).permutation(len(pixels))[:SEEN]
    seen = torch.from_numpy(normalise(pixels[order])), torch.from_numpy(classes[order])
    whole = sum(
        t.numel() * t.element_size() for t in build(NETWORK, weights_file(NETWORK)).state_dict().values()
    )
    small = fewbit.load(args.model)
    print(
        f"{NETWORK}, {len(test[1])} test images, float {whole:,} bytes; pruned {accuracy(small, *test):.2f} %"
    )
    if args.sparsity:
        small = fewbit.prune(small, data=seen, sparsity=args.sparsity)
        print(f"{small.meta['sparsity'].share:.0%} of the weights zero: {accuracy(small, *test):.2f} %")
    quantized = fewbit.quantize(small, seen[0])
    found = accuracy(quantized, *test)
    folder = BUILD / "pruning"
    file = fewbit.save(quantized, folder / "int8.fewbit")
    artifact = fewbit.export(quantized, folder / "int8.onnx")
    share = file.stat().st_size / whole
    met = share <= MOST and found >= LEAST and artifact.verification.exact
    print(f"int8: {found:.2f} %; {file.name} {file.stat().st_size:,} bytes, {share:.4f} of float")
    print(f"int8.onnx {artifact.size:,} bytes, as the integer program: {artifact.verification.exact}")
    print(f"bar {MOST} at {LEAST} %: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
