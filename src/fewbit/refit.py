"""Weights of a pruned model fitted again, so that each layer gives what it gave before; no labels, no gradients.

The least squares of He et al., "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168), layer
by layer in the order of the graph, on what the pruned layers in front of it give.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.data.intake import Batch
from fewbit.model.graph import calls, in_eval_mode, module_of, only_consumer
from fewbit.pruning.coupling import Coupling
from fewbit.pruning.slicing import kept
from fewbit.statistics import input_patches

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RIDGE = 1e-2  # of the mean square of inputs, towards the weights as they were
SAMPLES = 512


class _Reached(Exception):
    """The layer has been called: the rest of the model need not run."""


@dataclass
class _Moments:
    """Sums over the data for one layer: of inputs x inputs, and of inputs x what the whole layer gave."""

    inputs: Tensor
    products: Tensor


def refit(c: Coupling, gone: set[int], smaller: fx.GraphModule, batches: Iterable[Batch]) -> int:
    """Fit the weights of ``smaller``, which lacks the units ``gone`` of ``c.gm``; gives the number of fitted layers.

    Linear layers and convolutions without groups that are called once; 512 samples are read. A constant that is left
    goes into the bias, or into the mean of the batch norm behind it.
    """
    samples: list[tuple[Tensor, ...]] = []
    for inputs, _ in batches:
        samples.append(inputs)
        if sum(len(each[0]) for each in samples) >= SAMPLES:
            break
    layers = [each for each in c.contractions if _fits(each.node, c.gm)]
    with torch.no_grad(), in_eval_mode(c.gm), in_eval_mode(smaller):
        for each in layers:
            name = str(each.node.target)
            _solve(smaller, name, _moments(c, gone, smaller, name, samples))
    return len(layers)


def _fits(node: fx.Node, gm: fx.GraphModule) -> bool:
    layer = module_of(node, gm)
    return (
        isinstance(layer, _LAYERS)
        and getattr(layer, "groups", 1) == 1
        and len(calls(gm, str(node.target))) == 1
    )


def _moments(
    c: Coupling, gone: set[int], smaller: fx.GraphModule, name: str, samples: list[tuple[Tensor, ...]]
) -> _Moments:
    whole: Any = c.gm.get_submodule(name)
    left: Any = smaller.get_submodule(name)
    rows = kept(c, c.slot(f"{name}.weight").axes[0], gone)
    target = whole.weight.flatten(1).double().T
    target = target if rows is None else target[:, rows]
    size = left.weight[0].numel() + 1
    moments = _Moments(
        torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, target.shape[1], dtype=torch.float64)
    )
    for inputs in samples:
        before, after = (_patches(gm, name, inputs) for gm in (c.gm, smaller))
        after = torch.cat([after, torch.ones(len(after), 1, dtype=torch.float64)], 1)
        moments.inputs += after.T @ after
        moments.products += after.T @ (before @ target)
    return moments


def _patches(gm: fx.GraphModule, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """The vectors that a layer multiplies: float64 [places, inputs], the same places for layers of one shape."""
    layer = gm.get_submodule(name)
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.extend(
            part[0].double() for part in input_patches(module, args[0], torch.Generator().manual_seed(0))
        )
        raise _Reached

    hook = layer.register_forward_pre_hook(see)
    try:
        gm(*inputs)
    except _Reached:
        pass
    finally:
        hook.remove()
    return torch.cat(seen)


def _solve(gm: fx.GraphModule, name: str, moments: _Moments) -> None:
    layer: Any = gm.get_submodule(name)
    old = layer.weight.flatten(1).double().T
    old = torch.cat([old, torch.zeros(1, old.shape[1], dtype=torch.float64)])
    ridge = _RIDGE * moments.inputs.diagonal().mean()
    left = moments.inputs + ridge * torch.eye(len(old), dtype=torch.float64)
    found = torch.linalg.solve(left, moments.products + ridge * old)
    shift = _shift(gm, name)
    if shift is None:  # nowhere to put a constant
        found = torch.linalg.solve(left[:-1, :-1], (moments.products + ridge * old)[:-1])
    else:
        tensor, sign = shift
        tensor += sign * found[-1].to(tensor.dtype)
        found = found[:-1]
    layer.weight.copy_(found.T.reshape(layer.weight.shape))


def _shift(gm: fx.GraphModule, name: str) -> tuple[Tensor, int] | None:
    """What a constant can be added to, and its sign there: the bias, or the mean of the only reader's batch norm."""
    layer: Any = gm.get_submodule(name)
    if layer.bias is not None:
        return layer.bias, 1
    reader = only_consumer(calls(gm, name)[0])
    norm = None if reader is None else module_of(reader, gm)
    if isinstance(norm, _NORMS) and norm.running_mean is not None:
        return norm.running_mean, -1
    return None
