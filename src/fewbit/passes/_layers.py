"""What the passes ask of a graph's layers: who calls them, who shares weights, which axis is a channel."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.model.graph import module_of

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Weighted = Convolution | nn.Linear
Moments = tuple[Tensor, Tensor]  # mean and standard deviation per channel, float64 [C]
_MOMENTS = "output_moments"
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def calls(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that call each layer, by the layer's name."""
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(node)
    return found


def weighted(node: fx.Node, gm: fx.GraphModule) -> Weighted | None:
    """The convolution or linear layer that a node calls."""
    module = module_of(node, gm)
    return module if isinstance(module, CONVOLUTION + (nn.Linear,)) else None


def shared_parameters(gm: fx.GraphModule) -> set[int]:
    """Identities of parameters with more than one name: two layers, or a layer and a plain use of it."""
    count = Counter(id(p) for _, p in gm.named_parameters(remove_duplicate=False))
    return {identity for identity, names in count.items() if names > 1}


def is_shared(layer: nn.Module, shared: set[int]) -> bool:
    """Whether one of the layer's own parameters is in `shared`."""
    return any(id(p) in shared for p in layer.parameters(recurse=False))


def by_output(layer: Weighted, weight: Tensor) -> Tensor:
    """`weight` with output channels first, in the order of the layer's output: [outputs, ...]."""
    if not isinstance(layer, TRANSPOSED):
        return weight
    groups, outputs = layer.groups, layer.out_channels // layer.groups
    kernel = weight.shape[2:]
    grouped = weight.reshape(groups, -1, outputs, *kernel).transpose(1, 2)
    return grouped.reshape(layer.out_channels, -1, *kernel)


def scale_outputs(layer: Weighted, weight: Tensor, factor: Tensor) -> Tensor:
    """`weight` with output channel c multiplied by `factor[c]`; [C] with the layer's output channels."""
    if not isinstance(layer, TRANSPOSED):
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
    ones = [1] * (weight.dim() - 2)
    return (grouped * factor.reshape(layer.groups, 1, -1, *ones)).reshape(weight.shape)


def by_input(layer: Weighted, weight: Tensor) -> Tensor:
    """`weight` with input channels first, in the order of the layer's input: [inputs, ...]."""
    if isinstance(layer, nn.Linear):
        return weight.t()
    if isinstance(layer, TRANSPOSED):
        return weight
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2)
    return grouped.reshape(layer.in_channels, -1, *weight.shape[2:])


def scale_inputs(layer: Weighted, weight: Tensor, factor: Tensor) -> Tensor:
    """`weight` with input channel c multiplied by `factor[c]`; [C] with the layer's input channels."""
    if isinstance(layer, nn.Linear):
        return weight * factor
    ones = [1] * (weight.dim() - 2)
    if isinstance(layer, TRANSPOSED):
        return weight * factor.reshape(-1, 1, *ones)
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(layer.groups, 1, -1, *ones)).reshape(weight.shape)


def channels_out(layer: Weighted) -> int:
    """Number of output channels (features of a linear layer)."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def channels_in(layer: Weighted) -> int:
    """Number of input channels (features of a linear layer)."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def store(name: str, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer new values in its own dtype; ModelError, and no change, if one is not finite there."""
    values = {"weight": weight, "bias": bias}
    own = layer.get_parameter("weight")
    dtype = own.dtype
    stored = {key: value.detach().to(dtype) for key, value in values.items() if value is not None}
    for key, value in stored.items():
        bad = (~torch.isfinite(value)).nonzero()
        if len(bad):
            raise ModelError(
                f"layer {name!r}: its new {key} is {value[tuple(bad[0])].item()} at {bad[0].tolist()}: "
                f"expected a number that {dtype} can hold; look for weights or statistics of extreme size"
            )
    for key, value in stored.items():
        old = getattr(layer, key)
        trained = own.requires_grad if old is None else old.requires_grad
        setattr(layer, key, nn.Parameter(value.contiguous(), requires_grad=trained))


def moments(node: fx.Node) -> Moments | None:
    """What a folded batch norm knew of this layer's output; None where none was folded."""
    found: Moments | None = node.meta.get(_MOMENTS)
    return found


def set_moments(node: fx.Node, mean: Tensor, std: Tensor) -> None:
    """Note mean and standard deviation of a layer's output; a pass that moves the output notes the new ones."""
    node.meta[_MOMENTS] = (mean.detach().double(), std.detach().double())
