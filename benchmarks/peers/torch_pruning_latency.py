"""Torch-Pruning on a network for 224x224 images, to a share of its work in multiples of channels, exported to ONNX.

Arguments: network, how many times fewer multiply-accumulates, multiple, file. Prints how many times fewer it found.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import float_onnx  # the environment is another one, the networks are ours
from models import build

STEPS = 100


def main() -> None:
    network, speedup, multiple, file = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    model = build(network)
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
        iterative_steps=STEPS, pruning_ratio=0.9, max_pruning_ratio=0.9, round_to=multiple, ignored_layers=[head],
    )  # fmt: skip
    whole, _ = tp.utils.count_ops_and_params(model, example)
    left = whole
    while whole / left < speedup and pruner.current_step < STEPS:
        pruner.step()
        left, _ = tp.utils.count_ops_and_params(model, example)
    float_onnx.export(model, np.concatenate([example.numpy()] * 2), Path(file))
    print(f"{whole / left:.4f}")


if __name__ == "__main__":
    main()
