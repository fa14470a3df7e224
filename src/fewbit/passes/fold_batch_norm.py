"""Folds batch norm into the convolution or linear layer in front of it (arXiv 1712.05877, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.model.graph import module_of
from fewbit.passes._layers import (
    Moments,
    Weighted,
    calls,
    is_shared,
    scale_outputs,
    set_moments,
    shared_parameters,
    store,
    weighted,
)

PRESERVES = "The outputs in eval mode up to float32 rounding, and every layer but the folded batch norms."
TOLERANCE = (
    1e-3  # channels with next to no variance, as pruning leaves them, multiply float32 rounding errors
)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def apply(gm: fx.GraphModule) -> list[str]:
    """Folds, in place, every batch norm that directly follows a layer whose output nobody else reads.

    A layer that is called several times is folded when the same batch norm follows each call. Other batch
    norms stay, and a note says why. Computed in float64, stored in the layer's dtype; a missing bias appears,
    and a layer whose parameters are tied to another's gets its own.

    Raises:
        ModelError: a batch norm has values that are not finite or a variance that is not positive, or a
            folded weight is beyond the range of its dtype. Layers folded before it stay folded, correctly.
    """
    notes: list[str] = []
    norms = [node for node in gm.graph.nodes if isinstance(module_of(node, gm), BATCH_NORM)]
    for node in norms:
        _check(str(node.target), _norm(node, gm))
    gone: set[fx.Node] = set()
    for node in norms:
        if node in gone:
            continue
        producer = node.args[0]
        assert isinstance(producer, fx.Node)
        layer = weighted(producer, gm)
        reason = _obstacle(node, producer, gm)
        if reason is not None or layer is None:
            notes.append(f"{node.target} stays: {reason}")
            continue
        tied = is_shared(layer, shared_parameters(gm))
        _fold(str(producer.target), layer, _norm(node, gm))
        for call in calls(gm)[str(producer.target)]:
            set_moments(call, *_moments(_norm(node, gm)))
            gone.add(_remove(next(iter(call.users)), call))
        alone = ", which shares its parameters with other layers no more" if tied else ""
        notes.append(f"{node.target} folded into {producer.target}{alone}")
    gm.delete_all_unused_submodules()
    return notes


def _norm(node: fx.Node, gm: fx.GraphModule) -> nn.modules.batchnorm._BatchNorm:
    norm = module_of(node, gm)
    assert isinstance(norm, BATCH_NORM)
    return norm


def _check(name: str, norm: nn.modules.batchnorm._BatchNorm) -> None:
    for key in ("running_mean", "running_var", "weight", "bias"):
        value = getattr(norm, key)
        if value is not None and not bool(torch.isfinite(value).all()):
            channel = int((~torch.isfinite(value)).nonzero()[0])
            raise ModelError(
                f"batch norm {name!r}: {key} is {value[channel].item()} in channel {channel}: expected "
                "finite numbers; run the model in train mode on clean data to repair its statistics"
            )
    if norm.running_var is None:
        return
    bad = (norm.running_var.double() + norm.eps <= 0).nonzero()
    if len(bad):
        channel = int(bad[0])
        found = (
            f"running_var is {norm.running_var[channel].item():g} in channel {channel}, eps is {norm.eps:g}"
        )
        raise ModelError(
            f"batch norm {name!r}: {found}: expected a positive sum; set eps or repair the variance"
        )


def _obstacle(node: fx.Node, producer: fx.Node, gm: fx.GraphModule) -> str | None:
    """Why the batch norm at `node` cannot be folded into its producer; None when it can."""
    layer = weighted(producer, gm)
    if _norm(node, gm).running_mean is None:
        return "it keeps no running statistics and normalises with those of each batch"
    if layer is None:
        return f"its input {producer.name!r} is not the output of a convolution or linear layer"
    if _rank(producer) != (2 if isinstance(layer, nn.Linear) else layer.weight.dim()):
        return f"it does not normalise the output channels of {producer.target}"
    same = calls(gm)[str(producer.target)]
    for call in same:
        others = [reader for reader in call.users if reader is not node]
        if call is producer and others:
            return f"the output of {producer.target} is also read by {others[0].name!r}"
        if call is not producer and (len(others) != 1 or others[0].target != node.target):
            return f"{producer.target} is called {len(same)} times, and this batch norm does not follow each"
    return None


def _rank(node: fx.Node) -> int:
    shape = node.meta.get("shape")
    return len(node.meta["val"].shape if shape is None else shape)


def _fold(name: str, layer: Weighted, norm: nn.modules.batchnorm._BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    bias: Tensor = -norm.running_mean.double()
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    bias = bias * gain
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    store(name, layer, scale_outputs(layer, layer.weight.detach().double(), gain), bias)


def _moments(norm: nn.modules.batchnorm._BatchNorm) -> Moments:
    """Mean and standard deviation of what the batch norm gives, per channel, on its training data."""
    assert norm.running_var is not None
    ones = torch.ones(norm.num_features, dtype=torch.float64)
    var = norm.running_var.double()
    std = (var / (var + norm.eps)).sqrt()
    gain = ones if norm.weight is None else norm.weight.detach().double().abs()
    return (0 * ones if norm.bias is None else norm.bias.detach().double()), gain * std


def _remove(norm: fx.Node, producer: fx.Node) -> fx.Node:
    norm.replace_all_uses_with(producer)
    norm.graph.erase_node(norm)
    return norm
