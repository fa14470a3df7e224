"""Channels that learn to be needed less: the demonstration network with and without a group lasso, then pruned."""

import argparse
import sys

import torch

import fewbit
from fewbit import demo

EPOCHS = 10
SPEEDUPS = (1.5, 2.0, 3.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--strength", type=float, default=1e-3)
    args = parser.parse_args()
    model, data = demo.load()
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    image = torch.from_numpy(data.test_images[:1])
    print(
        f"{EPOCHS} epochs on labels, strength {args.strength:g}; accuracy in % of {len(test[1])} test images"
    )
    print(f"{'seed':>4s} {'penalty':>8s} {'whole':>7s} " + " ".join(f"{f'{s:g} x':>7s}" for s in SPEEDUPS))
    for seed in args.seeds:
        for penalised in (False, True):
            penalty = fewbit.group_lasso(model, image, strength=args.strength) if penalised else None
            trained = fewbit.finetune(model, train, epochs=EPOCHS, teacher=None, penalty=penalty, seed=seed)
            nets = [trained, *(fewbit.prune(trained, image, speedup=s) for s in SPEEDUPS)]
            found = [100 * fewbit.evaluate(net, test).metrics["accuracy"] for net in nets]
            row = " ".join(f"{each:7.2f}" for each in found)
            print(f"{seed:4d} {'with' if penalised else 'without':>8s} {row}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
