"""Inputs of the benchmarks: CIFAR-10 and the folder it lies in, noisy digits, seeded synthetic images."""

import gzip
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"

# The mean and std that the ResNet weights were trained with; not the statistics of CIFAR-10 itself.
MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)

# A third of the digits' value range: makes the task hard enough that a bad quantizer shows.
DIGITS_NOISE = 0.35
DIGITS_TEST, DIGITS_DRAWS = 600, 5


class NoData(Exception):
    """The data folder is not there; the message says where it was looked for."""


@dataclass(frozen=True)
class Task:
    """What a model is calibrated and tested on: float32 arrays [n, ...]; labels [n], None without a task."""

    calibration: np.ndarray
    inputs: np.ndarray
    labels: np.ndarray | None


def data_folder() -> Path:
    """The folder $FEWBIT_DATA, or ../shared/data beside the repository. Raises NoData."""
    named = os.environ.get("FEWBIT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not (folder / "cifar10").is_dir() or not (folder / "models").is_dir():
        origin = "$FEWBIT_DATA" if named else "FEWBIT_DATA is not set; the default"
        raise NoData(
            f"no data: {origin} {folder} has no cifar10/ and models/; set FEWBIT_DATA to the folder that has"
        )
    return folder


def skip_without_data() -> Path:
    """The data folder; without one says loudly what is skipped and ends the program with exit code 77."""
    try:
        return data_folder()
    except NoData as error:
        print(f"SKIPPED, nothing was measured: {error}", file=sys.stderr)
        raise SystemExit(77) from error


def _sheets(split: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    folder = data_folder() / "cifar10"
    labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)[:rows]
    images = []
    for file in sorted(folder.glob(f"{split}_*.webp"))[: -(-len(labels) // 1000)]:
        sheet = np.asarray(Image.open(file).convert("RGB"))  # 32x32 tiles, 40 to a row, 1,000 to a sheet
        tiles = sheet.reshape(-1, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
        images.append(tiles[:1000])
    return np.concatenate(images)[: len(labels)], labels.astype(np.int64)


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 3, h, w] -> float32, (x/255 - mean) / std."""
    return ((images.astype(np.float32) / np.float32(255) - MEAN) / STD).astype(np.float32)


def cifar10_test() -> tuple[np.ndarray, np.ndarray]:
    """All 9,980 test images, normalised, [9980, 3, 32, 32] float32, and labels int64."""
    images, labels = _sheets("test", 10_000)
    return normalise(images), labels


def cifar10_calibration(count: int, seed: int) -> np.ndarray:
    """`count` images drawn without replacement from the 50,000 *training* images, [count, 3, 32, 32]."""
    images, _ = _sheets("train", 50_000)
    return normalise(images[np.random.default_rng(seed).permutation(len(images))[:count]])


def training_images() -> tuple[np.ndarray, np.ndarray]:
    """All 50,000 training images as uint8 [50000, 3, 32, 32], and labels int64."""
    return _sheets("train", 50_000)


def pixels(split: str, count: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 as it is, channels last: float32 0..255 [n, 32, 32, 3] and labels; `count` drawn by the seed."""
    images, labels = _sheets(split, 50_000 if split == "train" else 10_000)
    drawn = np.random.default_rng(seed).permutation(len(images))[:count] if count else np.arange(len(images))
    return np.ascontiguousarray(images[drawn].transpose(0, 2, 3, 1)).astype(np.float32), labels[drawn]


def mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's "train" or "test" digits, 0 to 1, [n, 1, 28, 28] float32, and labels int64."""
    stem = data_folder() / "mnist" / {"train": "train", "test": "t10k"}[split]
    with gzip.open(f"{stem}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(f"{stem}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images.astype(np.float32) / np.float32(255), labels.astype(np.int64)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train images and labels (1,197, clean), test ones (600, each under 5 draws of noise): [n, 1, 8, 8]."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    noisy = noise(np.concatenate([images[test]] * DIGITS_DRAWS), 1)
    return images[train], bunch.target[train], noisy, np.concatenate([bunch.target[test]] * DIGITS_DRAWS)


def noise(images: np.ndarray, seed: int) -> np.ndarray:
    """The images plus Gaussian noise of standard deviation DIGITS_NOISE; float32."""
    added = np.random.default_rng(seed).standard_normal(images.shape, np.float32) * np.float32(DIGITS_NOISE)
    return (images + added).astype(np.float32)


# Digits for networks that take colour images of 32x32 pixels, and for those that take sequences.
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "digits32": lambda images: np.ascontiguousarray(images.repeat(4, 2).repeat(4, 3).repeat(3, 1)),
    "digit-rows": lambda images: np.ascontiguousarray(images[:, 0]),
}


def keywords(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stand-ins for words: 12 patterns of 49 frames, shifted and under noise, [count, 1, 49, 10] float32; labels."""
    patterns = (
        np.random.default_rng(5).standard_normal((12, 8, 4), np.float32).repeat(6, 1).repeat(3, 2)[:, :, :10]
    )
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(patterns), count)
    frames = (np.arange(49)[None, :] + rng.integers(0, 49, count)[:, None]) % patterns.shape[1]
    clean = patterns[labels[:, None], frames] * rng.uniform(0.5, 1.0, (count, 1, 1)).astype(np.float32)
    noisy = clean + rng.standard_normal(clean.shape, np.float32)
    return noisy[:, None].astype(np.float32), labels.astype(np.int64)


def synthetic_images(count: int, size: int, seed: int) -> np.ndarray:
    """Smooth random images with some noise, [count, 3, size, size] float32, zero mean, unit variance."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, max(size // 8, 1), max(size // 8, 1)), np.float32)
    smooth = coarse.repeat(8, axis=2).repeat(8, axis=3)[:, :, :size, :size]
    detail = rng.standard_normal(smooth.shape, np.float32)
    return (np.float32(0.9) * smooth + np.float32(0.43) * detail).astype(np.float32)


def synthetic_tokens(count: int, tokens: int, width: int, seed: int) -> np.ndarray:
    """Random token vectors that drift along the sequence, [count, tokens, width] float32."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((count, tokens, width), np.float32)
    drift = np.cumsum(steps, axis=1) / np.sqrt(np.arange(1, tokens + 1, dtype=np.float32))[None, :, None]
    return drift.astype(np.float32)


def task(kind: str, *, calibration: int = 512, test: int | None = None, seed: int = 0) -> Task:
    """The data of one kind.

    "cifar10", "pixels", "digits", "digits32", "digit-rows", "keywords", "images<size>", "tokens<length>x<width>".

    `test` limits the number of test inputs, drawn without replacement by `seed`. Raises NoData, ValueError.
    """
    if kind == "cifar10":
        inputs, labels = cifar10_test()
        cal = cifar10_calibration(calibration, seed)
    elif kind == "pixels":
        inputs, labels = pixels("test")
        cal, _ = pixels("train", calibration, seed)
    elif kind == "digits":
        train, _, inputs, labels = digits()
        drawn = np.random.default_rng(seed).permutation(len(train))[:calibration]
        cal = noise(train[drawn], 1000 + seed)
    elif kind in ("digits32", "digit-rows"):
        inner = task("digits", calibration=calibration, test=test, seed=seed)
        cal, inputs = (FORMS[kind](images) for images in (inner.calibration, inner.inputs))
        return Task(cal, inputs, inner.labels)
    elif kind == "keywords":
        cal, inputs = keywords(calibration, 7 + seed)[0], keywords(test or 2000, 99)
        return Task(cal, *inputs)
    elif kind.startswith("images"):
        size = int(kind.removeprefix("images"))
        return Task(
            synthetic_images(calibration, size, 7 + seed), synthetic_images(test or 256, size, 99), None
        )
    elif kind.startswith("tokens"):
        length, width = (int(n) for n in kind.removeprefix("tokens").split("x"))
        cal = synthetic_tokens(calibration, length, width, 7 + seed)
        return Task(cal, synthetic_tokens(test or 256, length, width, 99), None)
    else:
        raise ValueError(f"unknown kind of data {kind!r}")
    # The file is sorted by class after its first 1,000 images: a part of it must be drawn, not cut off.
    kept = np.sort(np.random.default_rng(seed + 1).permutation(len(inputs))[: test or len(inputs)])
    return Task(cal, inputs[kept], labels[kept])
