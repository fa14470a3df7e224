"""Tensors that few bits hurt most and cost least to spare: the ends of a network, and what no layer multiplies."""

import copy
import dataclasses
from collections.abc import Iterator
from glob import escape

import torch
from torch.fx import GraphModule, Node

from fewbit.model.operators import operator
from fewbit.model.sites import Placement, layer_name, passes_codes
from fewbit.numerics.format import format_names, get_format
from fewbit.plan import Recipe, Rule
from fewbit.rounding import can_round, reconstruction

SAME = "same"


def with_edges(recipe: Recipe, gm: GraphModule, placement: Placement) -> Recipe:
    """The recipe with rules for what its ``ends`` and ``addends`` mean in this graph, before the user's own."""
    rules = []
    if recipe.addends != SAME:
        rules += [
            _activations(n, recipe.addends, placement)
            for n in placement.born
            if not any(_multiplies(r, placement) for r in _readers(n, gm))
        ]
    if recipe.ends != SAME:
        rules += list(_ends(recipe, gm, placement))
    return dataclasses.replace(recipe, rules=(*rules, *recipe.rules))


def narrowed(gm: GraphModule, placement: Placement) -> bool:
    """Let layers that multiply read codes of their own where a sum reads the same tensor; in place.

    A residual stream can then keep 8 bits while layers read 4 of them. The codes are born at a function that changes
    nothing: a leaky ReLU of slope 1, since runtimes remove identities, and quantize pairs with nothing between them.
    Returns whether the graph changed.
    """
    points = [point for born in placement.born for point in _forks(born, gm, placement)]
    for point, readers in points:
        with gm.graph.inserting_after(point):
            narrow = gm.graph.call_function(torch.ops.aten.leaky_relu.default, (point, 1.0))
        narrow.name = f"{point.name}_narrow"
        narrow.meta = copy.copy(point.meta)
        for reader in readers:
            reader.replace_input_with(point, narrow)
    if points:
        gm.recompile()
    return bool(points)


def _forks(born: Node, gm: GraphModule, placement: Placement) -> Iterator[tuple[Node, list[Node]]]:
    """Nodes with codes of this birth, and the layers that read them, where other computations than layers do, too."""
    readers = list(_readers(born, gm))
    if all(_multiplies(r, placement) for r in readers) or not any(_multiplies(r, placement) for r in readers):
        return
    passing = [born]
    for node in passing:
        passing += [user for user in node.users if passes_codes(user, gm)]
        layers = [user for user in node.users if _multiplies(user, placement)]
        if layers:
            yield node, layers


def answering(gm: GraphModule, placement: Placement) -> list[Node]:
    """The integer nodes whose output the model returns and nothing else reads."""
    returned = next(n for n in gm.graph.nodes if n.op == "output")
    return [
        n
        for n, carrier in placement.carrier.items()
        if n in placement.forms and set(carrier.users) == {returned}
    ]


def _ends(recipe: Recipe, gm: GraphModule, placement: Placement) -> Iterator[Rule]:
    """The first and the last layer with weights: their weights, what they read, and the last one's output."""
    layers = [n for n in gm.graph.nodes if n.op == "call_module" and _has_weights(n, gm)]
    rounding = None if _rounds(recipe.rounding, recipe.ends) else "nearest"
    for node in dict.fromkeys((*layers[:1], *layers[-1:])):
        yield Rule(
            escape(layer_name(node)),
            weights=recipe.ends,
            granularity="channel",
            weight_symmetric=True,
            rounding=rounding,
        )
        source = _source(node, gm, placement)
        if source is not None:
            yield _activations(source, recipe.ends, placement)
    for node in layers[-1:]:
        if placement.carrier.get(node) in placement.born:
            yield Rule(escape(layer_name(node)), activations=recipe.ends)


def _rounds(rounding: str, format_name: str) -> bool:
    """Whether a recipe's rounding is one for ends of that format: no learning of eight bits, no k-means of integers."""
    known = format_name in format_names()
    return reconstruction(rounding) is None and (not known or can_round(rounding, get_format(format_name)))


def _has_weights(node: Node, gm: GraphModule) -> bool:
    op = operator(node, gm)
    return op is not None and op.weight_axis is not None


def _source(node: Node, gm: GraphModule, placement: Placement) -> Node | None:
    """Where the codes that a layer reads are born; None where it reads floats."""
    source = node.args[0]
    while isinstance(source, Node) and source not in placement.born:
        if not passes_codes(source, gm):
            return None
        source = source.args[0]
    return source if isinstance(source, Node) else None


def _activations(node: Node, format_name: str, placement: Placement) -> Rule:
    owner = next(
        (n for n, carrier in placement.carrier.items() if carrier is node and n in placement.forms), node
    )
    return Rule(escape(layer_name(owner)), activations=format_name)


def _multiplies(node: Node, placement: Placement) -> bool:
    """Whether a node is a convolution, a linear layer or a matrix product."""
    return node in placement.forms and placement.forms[node].heavy


def _readers(node: Node, gm: GraphModule) -> Iterator[Node]:
    """What computes with the codes that are born at a node."""
    for user in node.users:
        if passes_codes(user, gm):
            yield from _readers(user, gm)
        else:
            yield user
