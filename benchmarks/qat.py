"""Training in few bits on CIFAR-10: ResNet-20 in several widths, final epoch, the float network beside it.

Each configuration keeps its state after each epoch in build/benchmarks/qat; the same command goes on after an
interruption, and prints what is done. `--epochs` and `--set full` are for a GPU or a night.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import BUILD, cifar10_test, normalise, skip_without_data, training_images
from models import build, weights_file
from torch import Tensor

import fewbit

SEED = 0
EIGHT = {"ends": "int8", "addends": "int8"}  # first and last layer, and where nothing is multiplied
W2A2 = {
    "weights": "int2",
    "activations": "uint2",
    "weight_symmetric": False,
    "weight_observer": "mse",
    "observer": "mse",
}


def _affine(bits: int) -> dict[str, Any]:
    return {**W2A2, "weights": f"int{bits}", "activations": f"uint{bits}", **EIGHT}


# name: what is asked of quantize, the estimators, what finetune gets beside the common settings
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "W4A4": (_affine(4), {}, {}),
    "W3A3": (_affine(3), {}, {}),
    "W2A2": (_affine(2), {}, {}),
    "W2A2 all layers low": ({**W2A2}, {}, {}),
    "ternary A8": ({"weights": "ternary", "activations": "int8", "observer": "mse", **EIGHT}, {}, {}),
    "W1A32": ({"weights": "binary", "activations": "float", "ends": "int8"}, {"weights": "lsq"}, {}),
    "W1A1": ({"weights": "binary", "activations": "uint1", "observer": "mse", **EIGHT}, {}, {}),
}
BARS = {
    "short": {"W4A4": 91.5, "W3A3": 90.8, "W2A2": 88.5, "ternary A8": 90.5, "W1A32": 89.0},
    "full": {"W4A4": 92.0, "W3A3": 91.7, "W2A2": 90.3, "W1A1": 86.5},
}
EPOCHS = {"short": 15, "full": 120}
TEACHER = {"short": "resnet20", "full": "resnet56"}
COMMON = {
    "optimizer": "sgd", "lr": 0.02, "weight_decay": 1e-4, "batch_size": 128, "augment": "images",
    "precision": "bfloat16",
}  # fmt: skip


def accuracy(model: Any, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Percent, and the predicted classes."""
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * float((found == labels).double().mean()), found


def trained(name: str, args: argparse.Namespace, train: tuple[Tensor, Tensor]) -> tuple[Any, float]:
    """The quantized model of a configuration, and the seconds its epochs took."""
    folder = BUILD / "qat" / f"{args.set}-{args.epochs}-{args.seed}" / name.replace(" ", "-")
    asked, estimators, more = CONFIGURATIONS[name]
    kept = folder / "model"
    if kept.exists():
        return fewbit.load(kept), _seconds(folder)
    net = build("resnet20", weights_file("resnet20")).eval()
    teacher = build(args.teacher, weights_file(args.teacher)).eval()
    model = fewbit.finetune(
        net, train, epochs=args.epochs, teacher=teacher, training=fewbit.Training(**estimators), folder=folder,
        resume=True, seed=args.seed, **{**COMMON, **more}, **asked,
    )  # fmt: skip
    fewbit.save(model, kept)
    return model, _seconds(folder)


def _seconds(folder: Path) -> float:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return sum(float(json.loads(line)["seconds"]) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=sorted(BARS), default="short")
    parser.add_argument("--only", nargs="*", help="names of configurations", choices=sorted(CONFIGURATIONS))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--teacher")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--export", action="store_true", help="compare the trained W2A2 model with what is exported"
    )
    args = parser.parse_args()
    args.epochs = args.epochs or EPOCHS[args.set]
    args.teacher = args.teacher or TEACHER[args.set]
    skip_without_data()
    if args.threads:
        torch.set_num_threads(args.threads)
    images, labels = (torch.from_numpy(a) for a in cifar10_test())
    pixels, classes = training_images()
    train = torch.from_numpy(normalise(pixels)), torch.from_numpy(classes)
    net = build("resnet20", weights_file("resnet20")).eval()
    baseline, _ = accuracy(net, images, labels)
    print(f"ResNet-20 on CIFAR-10, {len(labels)} test images, float {baseline:.2f} %; {args.epochs} epochs, seed "
          f"{args.seed}, teacher {args.teacher}, {torch.get_num_threads()} threads")  # fmt: skip
    missed = 0
    for name in args.only or BARS[args.set]:
        model, seconds = trained(name, args, train)
        found, classes_found = accuracy(model, images, labels)
        bar = BARS[args.set].get(name)
        verdict = "" if bar is None else f"  bar {bar:.1f} {'met' if round(found, 2) >= bar else 'MISSED'}"
        missed += bar is not None and round(found, 2) < bar
        print(f"{name:22s} {found:6.2f} %  {seconds / 60:5.1f} min{verdict}", flush=True)
        if args.export:
            print(json.dumps(exported(model, images, classes_found)), flush=True)
    return 1 if missed else 0


def exported(model: Any, images: Tensor, classes: Tensor) -> dict[str, Any]:
    """How many predictions differ between the trained model and its file in ONNX Runtime, and the integer program."""
    import onnxruntime

    path = BUILD / "qat" / "exported.onnx"
    artifact = fewbit.export(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = np.concatenate(
        [session.run(None, {name: part.numpy()})[0].argmax(1) for part in images.split(500)]
    )
    return {
        "file bytes": artifact.size,
        "differing predictions in ONNX Runtime": int((torch.from_numpy(found) != classes).sum()),
        "differing predictions of the integer program": int((in_program(model, images) != classes).sum()),
    }


def in_program(model: Any, images: Tensor) -> Tensor:
    """The classes that the integer reference gives."""
    from fewbit.model.lowering import lower
    from fewbit.model.reference import Reference

    reference = Reference(lower(model))
    return torch.cat([reference(part).argmax(1) for part in images.split(100)])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
