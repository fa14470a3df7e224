"""The benchmarks' networks by name: how each is built, what it is fed, where its weights come from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models import dscnn, lstm, mobilenetv2, probe, resnet18, resnet_cifar, transformer, vit

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """A network, the kind of data it takes (see data.task), its weights' file name ("" = seeded random)."""

    factory: Callable[[], nn.Module]
    data: str
    weights: str = ""


CASES = {
    "resnet20": Case(lambda: resnet_cifar.ResNet(3), "cifar10", "cifar10-resnet20.safetensors"),
    "resnet56": Case(lambda: resnet_cifar.ResNet(9), "cifar10", "cifar10-resnet56.safetensors"),
    "probe": Case(probe.Probe, "digits", "probe.safetensors"),
    "resnet18": Case(resnet18.ResNet18, "images224"),
    "mobilenetv2": Case(lambda: mobilenetv2.MobileNetV2(size=224), "images224"),
    "mobilenetv2-32": Case(lambda: mobilenetv2.MobileNetV2(width=0.5, size=32, classes=10), "images32"),
    "transformer": Case(transformer.Encoder, "tokens32x128"),
    "mobilenetv2-digits": Case(
        lambda: mobilenetv2.MobileNetV2(width=0.35, size=32, classes=10),
        "digits32",
        "mobilenetv2-digits.safetensors",
    ),
    "ds-cnn": Case(dscnn.DSCNN, "keywords", "ds-cnn.safetensors"),
    "lstm": Case(lstm.LSTMClassifier, "digit-rows", "lstm.safetensors"),
    "vit": Case(vit.VisionTransformer, "digits32", "vit.safetensors"),
}


def weights_file(name: str) -> Path | None:
    """Where the trained weights of a case lie, None where they are seeded. Raises data.NoData."""
    case = CASES[name]
    if not case.weights:
        return None
    if (HERE / case.weights).exists():
        return HERE / case.weights
    from data import data_folder

    return data_folder() / "models" / case.weights


def build(name: str, weights: Path | None = None) -> nn.Module:
    """The network in eval mode, with `weights` (safetensors), its trained weights, or seeded random ones."""
    if name not in CASES:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(CASES)}")
    from safetensors.torch import load_file

    case, torch_state = CASES[name], torch.random.get_rng_state()
    torch.manual_seed(0)
    module = case.factory()
    file = weights or weights_file(name)
    if file is not None:
        module.load_state_dict(load_file(file), strict=False)
        _check_all_loaded(module, load_file(file), file)
    else:
        settle_statistics(module, case.data)
    torch.random.set_rng_state(torch_state)
    return module.eval()


def _check_all_loaded(module: nn.Module, state: dict[str, torch.Tensor], file: Path) -> None:
    # num_batches_tracked is not needed for inference and missing from some files.
    wanted = {key for key in module.state_dict() if not key.endswith("num_batches_tracked")}
    if wanted != (found := {key for key in state if not key.endswith("num_batches_tracked")}):
        raise ValueError(f"{file}: names differ from the network's: {sorted(wanted ^ found)[:5]}")


def settle_statistics(module: nn.Module, kind: str) -> None:
    """Gives a random network batch-norm statistics and scales as if it had seen data; in place."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    from data import task

    generator = torch.Generator().manual_seed(1)
    for norm in norms:
        norm.momentum = None  # plain average over all batches below
        with torch.no_grad():
            norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
            norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=generator))
    module.train()
    with torch.no_grad():
        for batch in torch.from_numpy(task(kind, calibration=64, test=1, seed=42).calibration).split(16):
            module(batch)
    for norm in norms:
        norm.momentum = 0.1
