"""Pictures for the examples: MNIST and CIFAR-10 from a folder with ``datasets.py``, or else scikit-learn's digits."""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

Split = tuple[np.ndarray, np.ndarray]


def arguments(description: str, argv: Sequence[str] | None, **more: dict[str, Any]) -> argparse.Namespace:
    """What every example takes: where to write, where the data lies, and whether to be done in seconds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("build/examples"), help="folder for the files")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("FEWBIT_DATA"), help="folder with datasets.py"
    )
    parser.add_argument("--quick", action="store_true", help="little data and training")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    found = parser.parse_args(argv)
    if found.data and not (Path(found.data) / "datasets.py").is_file():
        parser.error(
            f"{found.data}: no datasets.py there; without --data the examples run on scikit-learn's digits"
        )
    found.output.mkdir(parents=True, exist_ok=True)
    return found


def load(name: str, folder: Path | None) -> tuple[Split, Split]:
    """Training and test split of "mnist" (28x28x1) or "cifar10" (32x32x3): images uint8 NHWC in random order, labels.

    Without the folder: the 8x8 digits, 1,297 to train on and 500 to test on, enlarged for "cifar10".
    """
    if folder:
        spec = importlib.util.spec_from_file_location("datasets", Path(folder) / "datasets.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return _shuffled(*getattr(module, name)("train")), _shuffled(*getattr(module, name)("test"))
    digits = load_digits()
    images = (digits.images[..., None] * (255 / 16)).astype(np.uint8)
    if name == "cifar10":
        images = images.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    images, labels = _shuffled(images, digits.target)
    return (images[500:], labels[500:]), (images[:500], labels[:500])


def _shuffled(images: np.ndarray, labels: np.ndarray) -> Split:
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order].astype(np.int64)
