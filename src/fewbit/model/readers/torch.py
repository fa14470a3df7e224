"""Reads an `nn.Module` through `torch.export` into the standard form, and proves that it computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import ModelError
from fewbit.model.graph import refresh
from fewbit.model.torch_build import sizes
from fewbit.model.torch_convert import Converter, Tables
from fewbit.model.torch_export import Example, a, as_example, private_copy, trace
from fewbit.model.torch_layers import LAYERS
from fewbit.model.torch_proof import must_run, prove
from fewbit.model.torch_rewrite import DROPPED, REWRITES

TABLES = Tables(LAYERS, REWRITES, DROPPED)


def read(module: nn.Module, example: Any, *, dynamic_shapes: Any = None) -> fx.GraphModule:
    """The standard form of `module`: `nn` layers under the user's names, functional `aten` operators
    between them.

    `example` is a tensor or a tuple of tensors, one for each input of `forward`, of any batch size. Every
    dimension that the model leaves free is free; `dynamic_shapes`, as in `torch.export.export`, says
    otherwise. The module is not changed. The graph starts in the module's train or eval mode and holds
    float32 copies of its parameters. `gm.meta["notes"]` says what a user must know, `gm.meta["dynamic"]`
    each input's sizes: numbers, or names of free ones.

    Raises ModelError when the module cannot be read, holds NaN or infinite weights, or when the graph does
    not compute what the module does on the example (and, with a free batch size, on one more sample).
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"the model is {a(module)}: expected a torch.nn.Module; for a file, load it first")
    inputs = as_example(example)
    notes: list[str] = []
    source = private_copy(module, notes)
    _check_finite(source)
    must_run(source, inputs)
    gm = Converter(trace(source, inputs, dynamic_shapes, notes), TABLES).convert()
    if dynamic_shapes is None and _computes_sizes(gm) and any(t.dim() >= 4 for t in inputs):
        # free image sizes are not worth arithmetic on sizes in the graph, which few runtimes do well
        gm = Converter(trace(source, inputs, None, notes, images_fixed=True), TABLES).convert()
    gm.meta["dynamic"] = _dynamic(gm)
    prove(gm, source, inputs)
    if (longer := _one_more(gm, inputs)) is not None:
        prove(gm, source, longer, f"a batch of {longer[0].shape[0]}")
    refresh(gm, inputs)
    notes += _lost_in_training(module)
    gm.meta["notes"] = list(dict.fromkeys(notes))
    return _in_mode_of(gm, module)


def _check_finite(module: nn.Module) -> None:
    statistics = [(n, b) for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var"))]
    for name, tensor in [*module.named_parameters(), *statistics]:
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            index = [int(i) for i in bad.nonzero()[0]]
            raise ModelError(
                f"{name} holds {tensor[tuple(index)].item()} at {index}: expected finite numbers; "
                "repair or retrain "
                "that layer first"
            )


def _computes_sizes(gm: fx.GraphModule) -> bool:
    return any(node.target is torch.ops.aten.sym_size.int for node in gm.graph.nodes)


def _dynamic(gm: fx.GraphModule) -> dict[str, tuple[int | str, ...]]:
    return {
        node.name: tuple(size if isinstance(size, int) else str(size) for size in sizes(node.meta["val"]))
        for node in gm.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta["val"], Tensor)
    }


def _one_more(gm: fx.GraphModule, example: Example) -> Example | None:
    """The example with its first sample once more at the end; None where the batch size is fixed."""
    shapes = list(gm.meta["dynamic"].values())
    batch = shapes[0][0] if shapes and shapes[0] else None
    if not isinstance(batch, str):
        return None
    return tuple(
        torch.cat([t, t[:1]]) if shape and shape[0] == batch else t
        for t, shape in zip(example, shapes, strict=True)
    )


def _lost_in_training(module: nn.Module) -> list[str]:
    return [
        f"{name or 'the model'}: dropout of attention weights (p={part.dropout}) acts in training "
        "only and was not kept"
        for name, part in module.named_modules()
        if isinstance(part, nn.MultiheadAttention) and part.dropout
    ]


def _in_mode_of(gm: fx.GraphModule, module: nn.Module) -> fx.GraphModule:
    """Train or eval mode as the user left it, layer by layer (frozen batch norms stay frozen)."""
    modes = {name: part.training for name, part in module.named_modules()}
    gm.train(module.training)
    for name, part in gm.named_modules():
        part.training = modes.get(name, module.training)
    return gm
