"""Small operations on graphs in standard form that every pass, target and report needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


def module_of(node: fx.Node, gm: fx.GraphModule) -> nn.Module | None:
    """The layer that a call_module node calls, None for other nodes."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_layer(node: fx.Node, gm: fx.GraphModule, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    """Whether the node calls a layer of one of these classes."""
    return isinstance(module_of(node, gm), kinds)


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(result.shape), result.dtype
        return result


def refresh(gm: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Set `meta["shape"]` and `meta["dtype"]` of every node from a run on `example` in eval mode."""
    training = {module: module.training for module in gm.modules()}
    gm.eval()
    with torch.no_grad():
        _Recorder(gm).run(*example)
    for module, mode in training.items():
        module.training = mode
