"""Reads an `nn.Module` through `torch.export` into the standard form, and proves that it computes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fewbit.errors import ModelError
from fewbit.model.graph import refresh
from fewbit.model.torch_convert import Converter, Tables
from fewbit.model.torch_export import as_example, private_copy, trace
from fewbit.model.torch_layers import LAYERS
from fewbit.model.torch_proof import prove
from fewbit.model.torch_rewrite import DROPPED, IDENTITIES, REWRITES

TABLES = Tables(LAYERS, REWRITES, IDENTITIES, DROPPED)


def read(module: nn.Module, example: Any, *, dynamic_shapes: Any = None) -> fx.GraphModule:
    """The standard form of `module`: `nn` layers under the user's names, functional `aten` operators between them.

    `example` is a tensor or a tuple of tensors, one for each input of `forward`; any batch size. All dimensions that
    the model allows are free, `dynamic_shapes` (as in `torch.export.export`) says otherwise. The module itself
    is not changed. The graph starts in the module's train or eval mode and holds float32 copies of its parameters;
    what a user must know is in `gm.meta["notes"]`. Raises ModelError when the module cannot be read, holds NaN or
    infinite weights, or when the graph does not compute what the module does on the example.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"the model is a {type(module).__name__}: expected a torch.nn.Module")
    inputs = as_example(example)
    notes: list[str] = []
    source = private_copy(module, notes)
    _check_finite(source)
    traced = trace(source, inputs, dynamic_shapes, notes)
    gm = Converter(traced, TABLES).convert()
    gm.eval()
    prove(gm, source, inputs)
    refresh(gm, inputs)
    return gm.train(module.training)


def _check_finite(module: nn.Module) -> None:
    for name, tensor in module.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            index = tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])
            raise ModelError(f"parameter {name!r} holds {tensor[index].item()} at {list(index)}: expected finite "
                             "numbers; repair or retrain the layer first")  # fmt: skip
