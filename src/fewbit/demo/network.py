"""A small network for scikit-learn's 8x8 digits: residual, depthwise convolution, batch norm, linear head."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "digits.safetensors"
TEST_IMAGES = 497
CALIBRATION_IMAGES = 256


class DigitsNet(nn.Module):
    """Images float32 (n, 1, 8, 8) in 0..1 -> logits float32 (n, 10); 22,090 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32, bias=False)
        self.bn4 = nn.BatchNorm2d(32)
        self.pointwise = nn.Conv2d(32, 64, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        y = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(y)) + x)
        x = self.relu(self.bn4(self.depthwise(x)))
        x = self.relu(self.bn5(self.pointwise(x)))
        return self.head(self.dropout(self.pool(x).flatten(1)))


@dataclass(frozen=True)
class DigitsData:
    """The digits in three parts. Images float32 (n, 1, 8, 8) in 0..1; labels int64 (n,).

    The calibration images are some of the training images; the test images are for nothing but tests.
    """

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    calibration_images: NDArray[np.float32]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def load_digits_split(seed: int = 0) -> DigitsData:
    """scikit-learn's 1,797 digits, shuffled: 1,300 to train on (256 of them to calibrate), 497 to test on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = (digits.images[order, None] / 16.0).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    return DigitsData(
        train_images=images[TEST_IMAGES:],
        train_labels=labels[TEST_IMAGES:],
        calibration_images=images[TEST_IMAGES : TEST_IMAGES + CALIBRATION_IMAGES],
        test_images=images[:TEST_IMAGES],
        test_labels=labels[:TEST_IMAGES],
    )


def train(
    data: DigitsData,
    epochs: int = 40,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> DigitsNet:
    """A network trained on ``data``'s training images, in eval mode: what the last epoch left, no picking.

    AdamW, one-cycle learning rate, images shifted by up to one pixel. ``progress(epoch, loss)`` is called
    after each epoch. The global random state of torch is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet().train()
        images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
        batches = len(images) // 64  # the last, smaller batch of each epoch is left out
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * batches)
        for epoch in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(images))[: batches * 64].split(64):
                loss = nn.functional.cross_entropy(model(_shifted(images[batch])), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            if progress is not None:
                progress(epoch, total / batches)
        return model.eval()


def accuracy(model: nn.Module, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The fraction of ``images`` whose largest logit is at their label."""
    with torch.no_grad():
        predicted = model(torch.from_numpy(images)).argmax(1).numpy()
    return float((predicted == labels).mean())


def load() -> tuple[DigitsNet, DigitsData]:
    """The trained network that ships with fewbit, in eval mode, and the data to train and test it on."""
    from safetensors.torch import load_file

    model = DigitsNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval(), load_digits_split()


def _shifted(images: Tensor) -> Tensor:
    """Each batch moved by -1, 0 or 1 pixel in both directions; zeros come in from the side."""
    dx, dy = (int(n) for n in torch.randint(0, 3, (2,)))
    return nn.functional.pad(images, (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]
