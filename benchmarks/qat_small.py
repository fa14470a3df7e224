"""Small networks in one bit, and the textbook's example: MNIST in binary, LeNet-5 with 4-bit gradients, a first CNN.

Each part keeps its state in build/benchmarks/qat_small; the same command goes on after an interruption.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import BUILD, cifar10_test, mnist, normalise, skip_without_data, training_images
from torch import Tensor, nn

import fewbit

FOLDER = BUILD / "qat_small"
Data = tuple[Tensor, Tensor]


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


def finished(name: str, seed: int, make: Any) -> nn.Module:
    """A float model that was trained before, or is now."""
    file = FOLDER / f"{name}-{seed}.pt"
    model = make[0]()
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    model = make[1](model)
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def from_float(
    name: str, make: Any, few: dict[str, Any], epochs: tuple[int, int], seed: int
) -> tuple[float, float, Any]:
    """Float accuracy, that in few bits after distillation from float, and the quantized model."""
    torch.manual_seed(seed)
    train, test = ([torch.from_numpy(a) for a in mnist(split)] for split in ("train", "test"))
    train = tuple(train)
    common = {"batch_size": 128, "augment": shifted, "seed": seed, "resume": True}
    net = finished(
        name, seed,
        (make, lambda m: fewbit.finetune(m, train, epochs=epochs[0], teacher=None, folder=FOLDER / f"{name}-float-{seed}", **common)),
    )  # fmt: skip
    model = fewbit.finetune(net, train, epochs=epochs[1], folder=FOLDER / f"{name}-{seed}", **common, **few)
    return accuracy(net, test), accuracy(model, test), model


def shifted(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Digits moved by up to a pixel: no digit may be mirrored."""
    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return tuple(x.roll((dy, dx), (2, 3)) for x in inputs)


def textbook(seed: int) -> tuple[float, float, Any]:
    """Quantization-aware from the start, beside its float twin: SGD 0.001, momentum 0.9, batches of 4, 10 epochs."""
    pixels, labels = training_images()
    train = torch.from_numpy(normalise(pixels)), torch.from_numpy(labels)
    images, classes = (torch.from_numpy(a) for a in cifar10_test())
    found = []
    for name in ("float", "int8"):
        torch.manual_seed(seed)
        net = Net()
        recipe = {"recipe": "int8"} if name == "int8" else {}
        model = fewbit.finetune(
            net, train, epochs=10, optimizer=lambda groups: torch.optim.SGD(groups, 0.001, momentum=0.9), schedule="constant",
            batch_size=4, teacher=None, seed=seed, folder=FOLDER / f"textbook-{name}-{seed}", resume=True, **recipe,
        )  # fmt: skip
        found.append(accuracy(model, (images, classes)))
    artifact = fewbit.export(model, FOLDER / "textbook.onnx")
    assert artifact.verification is not None and artifact.verification.exact
    return found[0], found[1], model


BINARY = {"weights": "binary", "activations": "uint1", "observer": "mse"}
PARTS = {
    "MNIST 784-1024-1024-10, W1A1": (
        lambda seed: from_float("mlp", mlp, {**BINARY, "rules": [{"match": "input*", "activations": "uint8"}]}, (10, 40), seed),
        lambda base, found: (found >= 98.5, "at least 98.5"),
    ),
    "LeNet-5 W1A1G4": (
        lambda seed: from_float(
            "lenet5", lenet5, {**BINARY, "ends": "int8", "training": fewbit.Training(gradients="int4")}, (10, 40), seed
        ),
        lambda base, found: (found >= base - 1, "within 1 point of float"),
    ),
    "textbook CNN on CIFAR-10, int8 from the start": (
        textbook,
        lambda base, found: (found >= base - 0.5, "within 0.5 points of float"),
    ),
}  # fmt: skip


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
    for name, (run, judge) in PARTS.items():
        if args.only and not any(name.startswith(each) for each in args.only):
            continue
        base, found, _ = run(args.seed)
        met, bar = judge(round(base, 2), round(found, 2))
        missed += not met
        print(
            f"{name:46s} float {base:5.2f} %  few bits {found:5.2f} %  {bar}: {'met' if met else 'MISSED'}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
