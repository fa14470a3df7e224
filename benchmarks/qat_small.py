"""Small networks in one bit, and the textbook's example: MNIST in binary, LeNet-5 with 4-bit gradients, a first CNN.

Each part keeps its state in build/benchmarks/qat_small; the same command goes on after an interruption.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import BUILD, cifar10_test, mnist, normalise, skip_without_data, training_images
from torch import Tensor, nn

import fewbit

FOLDER = BUILD / "qat_small"
EPOCHS = 20  # in one bit
Data = tuple[Tensor, Tensor]
Result = tuple[float, float]  # accuracy in float and in few bits, percent


def mlp() -> nn.Module:
    """784-1024-1024-10 with batch norms."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU(),
        nn.Linear(1024, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU(),
        nn.Linear(1024, 10, bias=False), nn.BatchNorm1d(10),
    )  # fmt: skip


def lenet5() -> nn.Module:
    """LeNet-5 with batch norms: convolutions of 6 and 16 channels, linear layers of 120, 84 and 10."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.BatchNorm1d(120), nn.ReLU(),
        nn.Linear(120, 84), nn.BatchNorm1d(84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


class Net(nn.Module):
    """The first network of PyTorch's own tutorial on CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))


def accuracy(model: Any, test: Data) -> float:
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in test[0].split(1000)])
    return 100 * float((found == test[1]).double().mean())


def from_float(name: str, make: Any, few: dict[str, Any], seed: int) -> Result:
    """A float network, and the same in few bits, distilled from it."""
    torch.manual_seed(seed)
    images, labels = (torch.from_numpy(a) for a in mnist("train"))
    test = tuple(torch.from_numpy(a) for a in mnist("test"))
    common = {"batch_size": 128, "augment": shifted, "seed": seed, "resume": True}
    train, folder = (images, labels), FOLDER / f"{name}-{seed}"
    net = fewbit.finetune(
        make(), train, epochs=10, teacher=None, folder=FOLDER / f"{name}-float-{seed}", **common
    )
    model = fewbit.finetune(net, train, epochs=EPOCHS, folder=folder, **common, **few)
    return accuracy(net, test), accuracy(model, test)


def shifted(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Digits moved by up to a pixel: no digit may be mirrored."""
    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return tuple(x.roll((dy, dx), (2, 3)) for x in inputs)


def plain_sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, 0.001, momentum=0.9)


def textbook(seed: int) -> Result:
    """Quantization-aware from the start, beside its float twin: SGD 0.001, momentum 0.9, batches of 4, 10 epochs."""
    pixels, labels = training_images()
    train = torch.from_numpy(normalise(pixels)), torch.from_numpy(labels)
    images, classes = (torch.from_numpy(a) for a in cifar10_test())
    found = []
    for name in ("float", "int8"):
        torch.manual_seed(seed)
        net = Net()
        recipe = {"recipe": "int8", "training": OBSERVED} if name == "int8" else {}
        model = fewbit.finetune(
            net, train, epochs=10, optimizer=plain_sgd, schedule="constant", batch_size=4, teacher=None, seed=seed,
            folder=FOLDER / f"textbook-{name}-{seed}", resume=True, **recipe,
        )  # fmt: skip
        found.append(accuracy(model, (images, classes)))
    artifact = fewbit.export(model, FOLDER / "textbook.onnx")
    assert artifact.verification is not None and artifact.verification.exact
    return found[0], found[1]


OBSERVED = fewbit.Training(weights="observed", activations="observed")
BINARY = {"weights": "binary", "activations": "uint1", "observer": "mse"}
BINARY_MLP = {**BINARY, "rules": [{"match": "input*", "activations": "uint8"}]}
BINARY_LENET = {**BINARY, "ends": "int8", "training": fewbit.Training(gradients="int4")}


@dataclass(frozen=True)
class Part:
    """``run`` gives the two accuracies for a seed; the one in few bits may lie ``below`` float, or is ``at_least``.

    ``seeds``: how many are averaged. With batches of 4 and a constant rate a seed's last epoch wanders by 1.5 points.
    """

    run: Callable[[int], Result]
    below: float = 100.0
    at_least: float = 0.0
    seeds: int = 1


PARTS = {
    "MNIST 784-1024-1024-10, W1A1": Part(partial(from_float, "mlp", mlp, BINARY_MLP), at_least=98.5),
    "LeNet-5 W1A1G4": Part(partial(from_float, "lenet5", lenet5, BINARY_LENET), below=1.0),
    "textbook CNN on CIFAR-10, int8 from the start": Part(textbook, below=0.5, seeds=4),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="beginnings of names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    skip_without_data()
    if args.threads:
        torch.set_num_threads(args.threads)
    missed = 0
    for name, part in PARTS.items():
        if args.only and not any(name.startswith(each) for each in args.only):
            continue
        results = []
        for seed in range(args.seed, args.seed + part.seeds):
            base, found = part.run(seed)
            results.append((base, found))
            if part.seeds > 1:
                print(f"  seed {seed}: float {base:5.2f} %  few bits {found:5.2f} %", flush=True)
        base, found = (round(sum(values) / part.seeds, 2) for values in zip(*results, strict=True))
        bar = max(part.at_least, base - part.below)
        missed += found < bar
        verdict = f"at least {bar:.2f}: {'met' if found >= bar else 'MISSED'}"
        print(f"{name:46s} float {base:5.2f} %  few bits {found:5.2f} %  {verdict}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
