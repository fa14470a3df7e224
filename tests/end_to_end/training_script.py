"""A small training as a program of its own, for tests that kill it or start it in several processes.

``python training_script.py FOLDER [key=value ...]``: trains, and writes the result's tensors to FOLDER/result-RANK.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import fewbit


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 4),
    ).eval()  # fmt: skip


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures with two bright rows, whose place is the class."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(4, (256,), generator=generator)
    images = torch.randn(256, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 2.0
    return images, labels


def train(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "weights": "int4", "activations": "uint4", "epochs": 4, "batch_size": 32, "augment": "images", "held_out": 0.2,
        "folder": folder, "training": fewbit.Training(gradients="int8"), "resume": True, "teacher": None,
        "lr": 5e-3,
    }  # fmt: skip
    return fewbit.finetune(network(), data(), **{**settings, **changes})


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    changes = dict(argument.split("=") for argument in sys.argv[2:])
    model = train(folder, **changes)
    tensors = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(tensors, str(folder / f"result-{os.environ.get('RANK', '0')}"))
