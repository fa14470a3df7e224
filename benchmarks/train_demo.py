"""Train the demo network and write src/fewbit/demo/digits.safetensors; prints the held-out accuracy.

    .venv/bin/python benchmarks/train_demo.py            # writes the shipped file anew
    .venv/bin/python benchmarks/train_demo.py --seeds 3  # also the accuracy of other seeds, written nowhere

The same seed, torch version, thread count and kind of CPU give the same weights.
"""

import argparse
import time

import torch
from safetensors.torch import save_file

from fewbit.demo import accuracy, load_digits_split, train
from fewbit.demo.network import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo network.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to train; seed 0 is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_digits_split()
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        model = train(data, arguments.epochs, seed)
        seconds = time.perf_counter() - start
        test = accuracy(model, data.test_images, data.test_labels)
        print(f"seed {seed}: accuracy {test:.2%} on {len(data.test_labels)} test digits, {seconds:.0f} s")
        if seed == 0:
            save_file(model.state_dict(), WEIGHTS)
            parameters = sum(p.numel() for p in model.parameters())
            print(f"wrote {WEIGHTS.name}: {parameters:,} parameters, {WEIGHTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
