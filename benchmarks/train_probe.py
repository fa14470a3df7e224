"""Trains the probe network on noisy digits, seeded, and writes models/probe.safetensors."""

from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
from models.probe import Probe

EPOCHS, BATCH = 20, 64


def accuracy(module: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Per cent of inputs whose largest output is at their label; the module is left in eval mode."""
    with torch.no_grad():
        predicted = module.eval()(torch.from_numpy(images)).argmax(1).numpy()
    return 100 * float((predicted == labels).mean())


def main() -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the order of float sums, and so the weights, depend on it
    images, labels, test_images, test_labels = data.digits()
    module, rng = Probe(), np.random.default_rng(0)
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(images))
        module.train()
        for step in range(len(images) // BATCH):
            rows = order[step * BATCH : (step + 1) * BATCH]
            noisy = torch.from_numpy(data.noise(images[rows], 10_000 + 100 * epoch + step))
            loss = F.cross_entropy(module(noisy), torch.from_numpy(labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = accuracy(module, test_images, test_labels)
        print(f"epoch {epoch + 1}/{EPOCHS}: {found:.2f} % of noisy test digits")
    file = Path(__file__).parent / "models" / "probe.safetensors"
    save_file({k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}, file)
    total = sum(p.numel() for p in module.parameters())
    print(f"{file}: {total:,} parameters, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
