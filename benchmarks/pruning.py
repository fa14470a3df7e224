"""Channels pruned and trained on: ResNet-56 on CIFAR-10 with less than half its work, the whole network as teacher.

Training keeps its state after each epoch in build/benchmarks/pruning; the same command goes on after an interruption,
and prints what is done. `--set full` is for a GPU or a night. `--peer` prunes with Torch-Pruning (`make peers`), to
the same work, and trains what it gives in the very same way.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from data import BUILD, ROOT, cifar10_test, normalise, skip_without_data, training_images
from models import build, weights_file
from torch import Tensor, nn

import fewbit

NETWORK = "resnet56"
EPOCHS = {"short": 15, "full": 100}
BARS = {"short": {2.1: 92.5}, "full": {2.1: 93.3, 2.57: 93.0}}
SEEN = 2048  # training images, for the criterion and for the fit
COMMON = {
    "optimizer": "sgd", "lr": 0.04, "weight_decay": 2e-4, "batch_size": 128, "augment": "images",
    "precision": "bfloat16", "distill": fewbit.Distillation("kd", temperature=4.0),
}  # fmt: skip


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent, in eval mode."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * float((found == labels).double().mean())


def macs(model: nn.Module) -> int:
    """Of one image."""
    return fewbit.measure(model, torch.zeros(1, 3, 32, 32)).macs


def pruned(speedup: float, criterion: str, train: tuple[Tensor, Tensor]) -> nn.Module:
    """By fewbit: one shot, weights fitted again."""
    some = tuple(part[:SEEN] for part in train)
    return fewbit.prune(
        build(NETWORK, weights_file(NETWORK)), data=some, speedup=speedup, criterion=criterion
    )


def pruned_by_peer(speedup: float, folder: Path) -> nn.Module:
    """By Torch-Pruning, in its own environment: its weights, in a network of their shapes."""
    from safetensors.torch import load_file

    file = folder / "peer.safetensors"
    if not file.exists():
        python = ROOT / ".venv-peers" / "bin" / "python"
        source = str(ROOT / "benchmarks" / "peers" / "torch_pruning_resnet.py")
        subprocess.run([str(python), source, NETWORK, str(speedup), str(file)], check=True)
    state = load_file(file)
    model = build(NETWORK, weights_file(NETWORK))
    for name, module in model.named_modules():
        for key in [*module._parameters, *module._buffers]:
            if f"{name}.{key}" in state:
                owner = module._parameters if key in module._parameters else module._buffers
                value = state[f"{name}.{key}"]
                owner[key] = nn.Parameter(value) if owner is module._parameters else value
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        if isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    return model


def trained(
    speedup: float, args: argparse.Namespace, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """What is measured of one network; kept in a file once it is done."""
    who = "torch-pruning" if args.peer else f"fewbit-{args.criterion}"
    folder = BUILD / "pruning" / f"{who}-{speedup}-{args.epochs}-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "result.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    teacher = build(NETWORK, weights_file(NETWORK)).eval()
    small = pruned_by_peer(speedup, folder) if args.peer else pruned(speedup, args.criterion, train)
    result = {"who": who, "macs": macs(small), "parameters": sum(p.numel() for p in small.parameters())}
    result["one shot"] = accuracy(small, *test)
    print(json.dumps(result), flush=True)
    small = fewbit.finetune(
        small, train, epochs=args.epochs, teacher=teacher, folder=folder, resume=True, seed=args.seed, **COMMON
    )  # fmt: skip
    result["accuracy"] = accuracy(small, *test)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    result["minutes"] = sum(float(json.loads(line)["seconds"]) for line in lines) / 60
    if not args.peer:
        fewbit.save(small, folder / "model")
    kept.write_text(json.dumps(result))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=sorted(BARS), default="short")
    parser.add_argument("--speedup", type=float, help="one of the set's, or another")
    parser.add_argument("--criterion", default="activation")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    args.epochs = args.epochs or EPOCHS[args.set]
    skip_without_data()
    test = tuple(torch.from_numpy(a) for a in cifar10_test())
    pixels, classes = training_images()
    train = torch.from_numpy(normalise(pixels)), torch.from_numpy(classes)
    whole = build(NETWORK, weights_file(NETWORK)).eval()
    before = macs(whole)
    print(
        f"{NETWORK} on CIFAR-10, {len(test[1])} test images, float {accuracy(whole, *test):.2f} %; "
        f"{args.epochs} epochs, seed {args.seed}, {torch.get_num_threads()} threads",
        flush=True,
    )
    missed = 0
    for speedup in [args.speedup] if args.speedup else BARS[args.set]:
        found = trained(speedup, args, train, test)
        bar = None if args.peer else BARS[args.set].get(speedup)
        verdict = "" if bar is None else f"  bar {bar:.1f} {'met' if found['accuracy'] >= bar else 'MISSED'}"
        missed += verdict.endswith("MISSED")
        print(
            f"{found['who']:20s} {before / found['macs']:5.2f} x fewer MACs, {found['parameters']:,} parameters: "
            f"one shot {found['one shot']:.2f} %, trained {found['accuracy']:.2f} %  {found['minutes']:.1f} min"
            f"{verdict}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
