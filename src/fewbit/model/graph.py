"""Small operations on graphs in standard form that every pass, target and report needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import ModelError

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]


def module_of(node: fx.Node, gm: fx.GraphModule) -> nn.Module | None:
    """The layer that a call_module node calls, None for other nodes."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_layer(node: fx.Node, gm: fx.GraphModule, kinds: Kinds) -> bool:
    """Whether the node calls a layer of one of these classes."""
    return isinstance(module_of(node, gm), kinds)


def is_function(node: fx.Node, *targets: Any) -> bool:
    """Whether the node calls one of these operators (`torch.ops.aten.relu.default`, ...)."""
    return node.op == "call_function" and node.target in targets


def weight_of(node: fx.Node, gm: fx.GraphModule) -> nn.Parameter | None:
    """The `weight` of the layer that a node calls, None where there is none."""
    return getattr(module_of(node, gm), "weight", None)


def constant_of(node: fx.Node, gm: fx.GraphModule) -> Tensor | None:
    """The parameter or buffer that a get_attr node reads, None for other nodes."""
    if node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(gm.get_submodule(owner), name)
    return tensor


def consumers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read this one, in the order of the graph."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    return sorted(node.users, key=order.__getitem__)


def only_consumer(node: fx.Node) -> fx.Node | None:
    """The one operator that reads this node, None if several do or the model returns it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def calls(gm: fx.GraphModule, target: str) -> list[fx.Node]:
    """The nodes that call the layer `target`: more than one where the model uses a layer twice."""
    return [n for n in gm.graph.nodes if n.op == "call_module" and n.target == target]


def output_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that the model returns, flat, in order; a node that is returned twice is there twice."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    found: list[fx.Node] = []
    fx.map_arg(output.args, found.append)
    return found


def input_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The model's inputs in order."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def add_layer(gm: fx.GraphModule, name: str, layer: nn.Module) -> str:
    """Put a layer into the module tree as `name`, or `name_1`, ... if that is taken; returns the name it
    has.
    """
    taken, candidate, count = {n for n, _ in gm.named_modules()} | set(gm.state_dict()), name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    if not gm.add_submodule(candidate, layer):
        raise ModelError(
            f"layer {candidate!r} cannot be added: part of its path is a tensor; choose another name"
        )
    return candidate


def insert_after(node: fx.Node, make: Callable[[fx.Graph], fx.Node]) -> fx.Node:
    """Put a new node behind `node`, in front of all its consumers; `make(graph)` creates it with `node` as
    an input.
    """
    with node.graph.inserting_after(node):
        new = make(node.graph)
    inherit(new, node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let every consumer of `node` read `new`, which takes over its metadata, and erase `node`."""
    inherit(new, node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def inherit(new: fx.Node, old: fx.Node) -> None:
    """Give `new` the metadata of `old` where it has none of its own."""
    for key, value in old.meta.items():
        new.meta.setdefault(key, value)


def clean(gm: fx.GraphModule) -> fx.GraphModule:
    """After edits: drop dead nodes and layers that nobody calls, check and recompile. Changes and returns
    `gm`.
    """
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return gm


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A deep copy: own parameters (ties stay ties), same metadata and mode."""
    twin = copy.deepcopy(gm)
    twin.meta = copy.deepcopy(gm.meta)
    for new, old in zip(twin.graph.nodes, gm.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return twin


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, every submodule's own mode after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta.pop("shape", None)
        if isinstance(result, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(result.shape), result.dtype
            n.meta["val"] = _symbolic(n.meta.get("val"), result)
        return result


def _symbolic(before: Any, result: Tensor) -> Tensor:
    """A tensor without data: the result's sizes, but free ones stay free where the node had a value of that
    rank.
    """
    if not isinstance(before, Tensor) or before.dim() != result.dim():
        return torch.empty_like(result, device="meta")
    sizes = [
        new if isinstance(old, int) else old for old, new in zip(before.shape, result.shape, strict=True)
    ]
    if sizes == list(before.shape) and before.dtype == result.dtype:
        return before
    return before.new_empty(sizes, dtype=result.dtype)


def refresh(gm: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Set "shape", "dtype" and "val" in the `meta` of every node with one tensor, from a run on `example`
    in eval mode.

    "shape" holds the sizes on the example; "val" is a tensor without data whose free sizes are symbolic, as
    long as the node had one of the same rank (see `inherit`), otherwise it has the example's sizes.
    """
    with torch.no_grad(), in_eval_mode(gm):
        _Recorder(gm).run(*example)
