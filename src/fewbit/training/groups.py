"""Which parameters learn at which rate: weights, quantizers' scales, and biases and norms each need their own."""

import math
from typing import Any

from torch import nn

from fewbit.training.layers import TrainableLayer, TrainableStep

_LEAST = 1e-8


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, adaptive: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups for a PyTorch optimizer: every parameter that learns, once.

    Weights get ``lr`` and the decay; biases and norms ``lr`` alone. Scales and clips of quantizers get no decay, and
    with ``adaptive`` (Adam and its kin, whose steps do not depend on the gradient's size) a rate in proportion to the
    power of two nearest to the value that they begin with, so that one rate fits all layers; without (SGD), ``lr``,
    since LSQ scales gradients.
    """
    scales: dict[int, nn.Parameter] = {}
    norms: set[int] = set()
    for part in model.modules():
        if isinstance(part, TrainableLayer):
            for estimator in part.estimators.values():
                scales |= {id(p): p for p in estimator.parameters() if p.requires_grad}
        elif isinstance(part, TrainableStep):
            scales |= {id(p): p for p in part.estimator.parameters() if p.requires_grad}
        elif isinstance(part, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            norms |= {id(p) for p in part.parameters(recurse=False)}
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if not p.requires_grad or id(p) in scales:
            continue
        (others if id(p) in norms or p.dim() < 2 or name.endswith("bias") else weights).append(p)
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": lr, "weight_decay": 0.0},
    ]
    by_rate: dict[float, list[nn.Parameter]] = {}
    for p in scales.values():
        size = max(float(p.detach().abs().mean()), _LEAST) if adaptive else 1.0
        by_rate.setdefault(lr * 2.0 ** round(math.log2(size)), []).append(p)
    groups += [{"params": params, "lr": rate, "weight_decay": 0.0} for rate, params in by_rate.items()]
    return [group for group in groups if group["params"]]
