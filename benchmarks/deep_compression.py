"""Deep Compression's own networks on MNIST: pruned, shared, coded by the recipe of that name; the file is what counts.

LeNet-300-100 and LeNet-5 (Caffe's) are trained in float first. Each step keeps its result in build/benchmarks/
deep_compression; the same command goes on after an interruption. The coded file is read back, and that is evaluated.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from data import BUILD, mnist, skip_without_data
from torch import Tensor, nn

import fewbit

# Published: Han et al., "Deep Compression" (arXiv 1510.00149), tables 1 to 4: times smaller, error in percent.
PUBLISHED = {"lenet-300-100": (40, 1.58), "lenet-5": (39, 0.74)}
BARS = {"lenet-300-100": (50, 1.60), "lenet-5": (50, 0.75)}
EPOCHS = 20  # in float


def lenet_300_100() -> nn.Module:
    """266,610 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Module:
    """431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


NETWORKS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5}


def moved(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Each quarter of a batch's pictures moved its own way, by up to a pixel."""
    (x,) = inputs
    parts = []
    for part in x.chunk(4):
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        padded = nn.functional.pad(part, (1, 1, 1, 1))
        parts.append(padded[:, :, 1 + down : 29 + down, 1 + right : 29 + right])
    return (torch.cat(parts),)


def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent, in eval mode."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(1000)])
    return 100 * float((found != labels).double().mean())


def in_float(name: str, folder: Path, train: tuple[Tensor, Tensor], seed: int) -> nn.Module:
    """The float network, trained or read."""
    from safetensors.torch import load_file, save_file

    kept, net = folder / "float.safetensors", NETWORKS[name]()
    if kept.exists():
        net.load_state_dict(load_file(kept))
        return net
    torch.manual_seed(seed)
    trained = fewbit.finetune(
        NETWORKS[name](), train, epochs=EPOCHS, teacher=None, augment=moved, weight_decay=0.01,
        folder=folder / "training", resume=True, seed=seed,
    )  # fmt: skip
    save_file(trained.state_dict(), kept)
    return trained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(NETWORKS), nargs="*", default=list(NETWORKS))
    parser.add_argument("--recipe", default="deep-compression")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    skip_without_data()
    train, test = (tuple(torch.from_numpy(a) for a in mnist(split)) for split in ("train", "test"))
    missed = 0
    for name in args.only:
        folder = BUILD / "deep_compression" / f"{name}-{Path(args.recipe).stem}-{args.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        net = in_float(name, folder, train, args.seed)
        numbers = sum(p.numel() for p in net.parameters())
        small = fewbit.compress(
            net, train, recipe=args.recipe, augment=moved, folder=folder, resume=True, seed=args.seed
        )
        file = fewbit.save(small, folder / "model.fewbit")
        minutes = (time.perf_counter() - started) / 60
        again = fewbit.load(file)
        times, wrong = 4 * numbers / file.stat().st_size, error(again, *test)
        least, most = BARS[name]
        met = times >= least and round(wrong, 2) <= most
        missed += not met
        paper = "published {} x at {:.2f} %".format(*PUBLISHED[name])
        verdict = f"bar {least} x at {most:.2f} %: {'met' if met else 'MISSED'} ({paper})"
        print(f"{name}: {numbers:,} parameters, float {error(net, *test):.2f} % of {len(test[1]):,} wrong")
        print(
            f"  {file.name} {file.stat().st_size:,} bytes, {times:.1f} x smaller, {wrong:.2f} % wrong, "
            f"{minutes:.1f} min, {torch.get_num_threads()} threads; {verdict}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
