"""Torch-Pruning on a CIFAR-10 ResNet: global group-norm pruning to a share of the work, the weights in a file.

Arguments: network, how many times fewer multiply-accumulates, file.
"""

import sys
from pathlib import Path

import torch
import torch_pruning as tp
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import build, weights_file  # the environment is another one, the networks are ours

STEPS = 400


def main() -> None:
    network, speedup, file = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    model = build(network, weights_file(network)).eval()
    example = torch.randn(1, 3, 32, 32)
    # The shortcuts pad with as many zero channels as the blocks were written with: what they add to has to stay.
    kept = [model.conv1, model.linear, *(m for name, m in model.named_modules() if name.endswith("conv2"))]
    pruner = tp.pruner.BasePruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
        iterative_steps=STEPS, pruning_ratio=1.0, max_pruning_ratio=0.95, ignored_layers=kept,
    )  # fmt: skip
    whole, _ = tp.utils.count_ops_and_params(model, example)
    while True:
        pruner.step()
        left, _ = tp.utils.count_ops_and_params(model, example)
        if whole / left >= speedup:
            break
        if pruner.current_step >= STEPS:
            raise SystemExit(f"only {whole / left:.2f} x fewer MACs can be had")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    print(f"Torch-Pruning {tp.__version__}: {whole / left:.2f} x fewer MACs")


if __name__ == "__main__":
    main()
