"""From the module of an ONNX graph to the proven standard form, with as many free sizes as file and model allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from fewbit.errors import ModelError
from fewbit.model.onnx_build import Network
from fewbit.model.onnx_graph import Graph
from fewbit.model.onnx_proof import Source, compare, prove
from fewbit.model.readers import torch as torch_reader

Example = tuple[Tensor, ...]
aten = torch.ops.aten


def standard(module: Network, graph: Graph, source: Source, inputs: Example) -> fx.GraphModule:
    """The standard form. ModelError where it does not compute what the file does on the inputs."""
    declared = [[at for at, size in enumerate(i.shape) if not isinstance(size, int)] for i in graph.inputs]
    if not any(declared) and (freed := _with_free_batch(module, source, inputs)) is not None:
        return freed
    batches = [[0] if 0 in dims else [] for dims in declared]
    none: list[list[int]] = [[] for _ in declared]
    attempts: list[list[list[int]]] = [declared, batches, none]
    failed: ModelError | None = None
    for at, free in enumerate(attempts):
        if free in attempts[:at]:
            continue
        try:
            gm = torch_reader.read(module, inputs, dynamic_shapes=_freedom(free))
            if free == declared != batches and _computes_image_sizes(gm, inputs):
                continue  # free image sizes are not worth arithmetic on sizes in the graph
            prove(gm, source, inputs)
            _prove_other_batch(gm, source, inputs)
        except ModelError as error:
            failed = failed or error
            continue
        gm.meta["notes"] += _not_free(gm, declared)
        return gm
    assert failed is not None
    raise failed


def _not_free(gm: fx.GraphModule, declared: list[list[int]]) -> list[str]:
    """Notes on sizes that the file leaves free and the graph does not."""
    found = []
    for (name, shape), dims in zip(gm.meta["dynamic"].items(), declared, strict=True):
        fixed = {at: shape[at] for at in dims if isinstance(shape[at], int)}
        if fixed:
            listed = ", ".join(f"size {at} at {size}" for at, size in fixed.items())
            found.append(f"input {name!r} is free in the file, and fixed in the graph, in {listed}")
    return found


def _freedom(free: list[list[int]]) -> Any:
    return tuple(dict.fromkeys(dims, Dim.AUTO) for dims in free)


def _computes_image_sizes(gm: fx.GraphModule, inputs: Example) -> bool:
    computed = any(node.target is aten.sym_size.int for node in gm.graph.nodes)
    return computed and any(t.dim() >= 4 for t in inputs)


def _free_batch(gm: fx.GraphModule) -> list[bool]:
    """Whether each input's first size is the free batch size."""
    shapes = list(gm.meta["dynamic"].values())
    batch = shapes[0][0] if shapes and shapes[0] else None
    return [isinstance(batch, str) and bool(shape) and shape[0] == batch for shape in shapes]


def _prove_other_batch(gm: fx.GraphModule, source: Source, inputs: Example) -> None:
    """A free batch size is really free: the file too takes one more sample."""
    free = _free_batch(gm)
    if any(free):
        longer = tuple(torch.cat([t, t[:1]]) if f else t for t, f in zip(inputs, free, strict=True))
        prove(gm, source, longer, f"a batch of {len(longer[0])}")


def _with_free_batch(module: Network, source: Source, inputs: Example) -> fx.GraphModule | None:
    """The graph of a file with a fixed batch size for any batch size, where every sample is on its own.

    That is proven by runs: what the graph says to twice the batch is what the file says to each half.
    """
    batch = len(inputs[0]) if inputs and inputs[0].dim() else 0
    batched = [bool(t.dim()) and len(t) == batch for t in inputs]
    if not batch:
        return None
    other = tuple(t.roll(1, -1) if b else t for t, b in zip(inputs, batched, strict=True))
    both = tuple(torch.cat([t, o]) if b else t for t, o, b in zip(inputs, other, batched, strict=True))
    try:
        gm = torch_reader.read(module, both, dynamic_shapes=_freedom([[0] * b for b in batched]))
        if not all(f == b for f, b in zip(_free_batch(gm), batched, strict=True)):
            return None
        halves = [source.run(inputs), source.run(other)]
        if any(e.dim() == 0 or len(e) != batch for e in halves[0]):
            return None
        compare(gm, [torch.cat(parts) for parts in zip(*halves, strict=True)], both, source, "two batches")
        prove(gm, source, inputs)
    except ModelError:
        return None
    gm.meta["notes"].append(
        f"the file has a fixed batch size of {batch}; every sample is on its own, so the graph takes any"
    )
    return gm
