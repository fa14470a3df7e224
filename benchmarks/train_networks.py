"""Trains the small networks of the targets benchmark, seeded; writes models/<name>.safetensors in half precision."""

import argparse
from collections.abc import Iterator

import data
import models
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 64
EPOCHS = {"mobilenetv2-digits": 20, "ds-cnn": 6, "lstm": 40, "vit": 30}


def batches(kind: str, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch: drawn anew for keywords, the clean digits under new noise otherwise."""
    if kind == "keywords":
        images, labels = data.keywords(4096, 10_000 + epoch)
    else:
        clean, labels, _, _ = data.digits()
        images = data.FORMS[kind](data.noise(clean, 10_000 + epoch))
    order = np.random.default_rng(epoch).permutation(len(images))
    for start in range(0, len(images) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH]
        yield images[rows], labels[rows]


def accuracy(module: nn.Module, kind: str) -> float:
    """Per cent of 600 test inputs."""
    task = data.task(kind, calibration=1, test=600)
    with torch.no_grad():
        predicted = module.eval()(torch.from_numpy(task.inputs)).argmax(1).numpy()
    return 100 * float((predicted == task.labels).mean())


def train(name: str) -> None:
    """AdamW, one-cycle learning rate; what the last epoch left, rounded to half precision."""
    from safetensors.torch import save_file

    case, epochs = models.CASES[name], EPOCHS[name]
    torch.manual_seed(0)
    module = case.factory()
    steps = epochs * sum(1 for _ in batches(case.data, 0))
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        module.train()
        for images, labels in batches(case.data, epoch):
            loss = F.cross_entropy(module(torch.from_numpy(images)), torch.from_numpy(labels))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 5 == 4 or epoch == epochs - 1:
            print(f"{name}, epoch {epoch + 1}/{epochs}: {accuracy(module, case.data):.2f} %", flush=True)
    file = models.HERE / case.weights
    state = {k: v.half() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, file)
    total = sum(p.numel() for p in module.parameters())
    print(f"{file}: {total:,} parameters, {file.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(EPOCHS), help="networks, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of float sums, and so the weights, depend on it
    for name in args.only.split(","):
        train(name)


if __name__ == "__main__":
    main()
