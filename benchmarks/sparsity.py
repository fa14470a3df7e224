"""Single weights pruned: ResNet-20 on CIFAR-10, in one shot by each criterion, or with a few epochs of training.

`--trained` prunes to 90 % zeros in steps, with training in between and after, and keeps its states in
build/benchmarks/sparsity; the same command goes on after an interruption.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from data import BUILD, cifar10_test, normalise, skip_without_data, training_images
from models import build, weights_file
from torch import Tensor, nn

import fewbit
from fewbit.pruning.saliency import saliency_names

NETWORK = "resnet20"
SEEN = 1024  # training images, for criteria and for the fit
CASES = {"50 %": {"sparsity": 0.5}, "70 %": {"sparsity": 0.7}, "2:4": {"structure": "2:4"}}
MOST_LOST = {"50 %": 0.5, "70 %": 3.0, "2:4": 0.8, "90 % trained": 1.0}  # points
BEST = "magnitude"
EPOCHS, STEPS = 5, 2
COMMON = {
    "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "batch_size": 128, "augment": "images",
    "precision": "bfloat16",
}  # fmt: skip


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent, in eval mode."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * float((found == labels).double().mean())


def one_shot(
    criterion: str, case: dict[str, Any], data: tuple[Tensor, Tensor], repair: bool, seed: int
) -> nn.Module:
    """Pruned in one go."""
    net = build(NETWORK, weights_file(NETWORK)).eval()
    return fewbit.prune(net, data=data, criterion=criterion, repair=repair, seed=seed, **case)


def trained(train: tuple[Tensor, Tensor], seed: int) -> nn.Module:
    """90 % zeros in steps: an epoch after each, the rest of them after the last; the float network teaches."""
    folder = BUILD / "sparsity" / f"90-{EPOCHS}-{seed}"
    kept = folder / "model.json"
    teacher = build(NETWORK, weights_file(NETWORK)).eval()
    data = tuple(part[:SEEN] for part in train)
    done = 0

    def learn(model: nn.Module) -> nn.Module:
        nonlocal done
        done += 1
        last = done == STEPS
        return fewbit.finetune(
            model, train, epochs=EPOCHS - STEPS + 1 if last else 1, schedule="cosine" if last else "constant",
            teacher=teacher, folder=folder / f"step{done}", resume=True, seed=seed, **COMMON,
        )  # fmt: skip

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model").exists():
        return fewbit.load(folder / "model")
    small = fewbit.prune(
        teacher, data=data, sparsity=0.9, criterion="lamp", steps=STEPS, train=learn, seed=seed
    )
    fewbit.save(small, folder / "model")
    kept.write_text(json.dumps({"sparsity": small.meta["sparsity"].share}))
    return small


def verdict(case: str, lost: float) -> str:
    """Whether a bar is met."""
    return f"bar {MOST_LOST[case]:.1f} points lost: {'met' if lost <= MOST_LOST[case] else 'MISSED'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--criteria", nargs="*", choices=saliency_names())
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    skip_without_data()
    test = tuple(torch.from_numpy(a) for a in cifar10_test())
    pixels, classes = training_images()
    train = torch.from_numpy(normalise(pixels)), torch.from_numpy(classes)
    data = tuple(part[:SEEN] for part in train)
    baseline = accuracy(build(NETWORK, weights_file(NETWORK)), *test)
    print(
        f"{NETWORK}, {len(test[1])} test images, float {baseline:.2f} %, seed {args.seed}; {SEEN} training images seen"
    )
    missed = 0
    if args.trained:
        small = trained(train, args.seed)
        found = accuracy(small, *test)
        missed += baseline - found > MOST_LOST["90 % trained"]
        print(f"90 % zeros, {EPOCHS} epochs: {found:.2f} %; {verdict('90 % trained', baseline - found)}")
        return missed
    print(f"{'zeros':6s} {'criterion':12s} {'bare':>8s} {'fitted':>8s}")
    names = args.criteria or [n for n in saliency_names() if n != "movement"]  # movement needs training
    for case in args.cases:
        for criterion in names:
            found = [
                accuracy(one_shot(criterion, CASES[case], data, r, args.seed), *test) for r in (False, True)
            ]
            bar = ""
            if criterion == BEST:
                missed += baseline - found[1] > MOST_LOST[case]
                bar = verdict(case, baseline - found[1])
            print(f"{case:6s} {criterion:12s} {found[0]:8.2f} {found[1]:8.2f}  {bar}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
