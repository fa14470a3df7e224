"""Channels pruned in one go, without any training: CIFAR-10 by each criterion, bare and with weights fitted again."""

import argparse
import sys

import torch
from data import cifar10_test, normalise, skip_without_data, training_images
from models import build, weights_file
from torch import Tensor, nn

import fewbit
from fewbit.pruning.criteria import criterion_names

SEEN = 512  # training images, for criteria and for the fit


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent, in eval mode."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * float((found == labels).double().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", help="resnet20 or resnet56")
    parser.add_argument("--speedups", nargs="*", type=float, default=[1.5, 2.0])
    parser.add_argument("--criteria", nargs="*", default=criterion_names(), choices=criterion_names())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    skip_without_data()
    images, labels = (torch.from_numpy(a) for a in cifar10_test())
    pixels, classes = training_images()
    data = torch.from_numpy(normalise(pixels[:SEEN])), torch.from_numpy(classes[:SEEN])
    net = build(args.network, weights_file(args.network)).eval()
    baseline = accuracy(net, images, labels)
    baseline = accuracy(net, images, labels)
    print(
        f"{args.network}, {len(labels)} test images, float {baseline:.2f} %; {SEEN} training images seen, no training"
    )
    print(f"{'criterion':18s} {'MACs':>8s} {'bare':>8s} {'fitted':>8s}")
    for speedup in args.speedups:
        for criterion in args.criteria:
            found = []
            for repair in (False, True):
                small = fewbit.prune(
                    net, data=data, speedup=speedup, criterion=criterion, repair=repair, seed=args.seed
                )
                found.append(accuracy(small, images, labels))
            report = small.meta["pruning"]
            ratio = report.macs_before / report.macs
            print(
                f"{criterion:18s} {'1/' + format(ratio, '.2f'):>8s} {found[0]:8.2f} {found[1]:8.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
