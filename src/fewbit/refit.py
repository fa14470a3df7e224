"""Weights of a pruned model fitted again, so that each layer gives what it gave before; no labels, no gradients.

The least squares of He et al., "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168), layer
by layer in the order of the graph, on what the pruned layers in front of it give. Sparse weights keep their zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.data import Batch
from fewbit.model.graph import calls, in_eval_mode, module_of, only_consumer
from fewbit.model.zeros import sparse_names
from fewbit.progress import shown
from fewbit.pruning.coupling import Contraction, Coupling
from fewbit.pruning.slicing import kept
from fewbit.statistics import LAYERS, input_patches

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RIDGE = 1e-2  # of the mean square of inputs, towards the weights as they were
_ITERATIONS, _ACCURACY = 200, 1e-6
_SAMPLES = 512
_WIDEST = 8192  # inputs of an output, whose second moments are solved for
_PLACES = 4096  # that are in float64 at a time
_NUMBERS = 2**26  # of the largest tensor on all samples together; fewer samples are read where that is more


class _Run(fx.Interpreter):
    """A graph on one batch, node by node."""

    def __init__(self, gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(gm)
        self.args_iter = iter(inputs)

    def step(self, node: fx.Node) -> None:
        """Compute a node, and let go of what nobody will read any more."""
        self.env[node] = self.run_node(node)
        for spent in self.user_to_last_uses.get(node, []):
            del self.env[spent]


def refit(
    c: Coupling, gone: set[int], smaller: fx.GraphModule, batches: Iterable[Batch], progress: bool = False
) -> int:
    """Fit the weights of ``smaller``, which lacks the units ``gone`` of ``c.gm``; gives the number of fitted layers.

    Linear layers and convolutions without groups, that are called once, share no weight and have at most 8,192 inputs
    for an output; those at which nothing but zeros arrives stay as they are. Up to 512 samples are read,
    all of which go through both graphs together: fewer where a layer gives much. A constant that is left goes into the
    bias, or into the mean of the batch norm behind it.
    """
    runs = [(_Run(c.gm, x), _Run(smaller, x)) for x in _samples(c.gm, batches)]
    fits = {each.node: each for each in c.contractions if _fits(each.node, c)}
    pairs = list(zip(c.gm.graph.nodes, smaller.graph.nodes, strict=True))
    sources = dict(pairs)
    with torch.no_grad(), in_eval_mode(c.gm), in_eval_mode(smaller):
        for old, new in shown(pairs, len(pairs), "fitting layers", progress):
            each = fits.get(old)
            if each is not None:
                inputs = [(a.env[each.source], b.env[sources[each.source]]) for a, b in runs]
                _fit(c, gone, smaller, each, inputs)
            for before, after in runs:
                before.step(old)
                after.step(new)
    return len(fits)


def _samples(gm: fx.GraphModule, batches: Iterable[Batch]) -> list[tuple[Tensor, ...]]:
    largest = max(math.prod(node.meta["shape"][1:]) for node in gm.graph.nodes if "shape" in node.meta)
    wanted = max(min(_SAMPLES, _NUMBERS // max(largest, 1)), 1)
    found: list[tuple[Tensor, ...]] = []
    for inputs, _ in batches:
        found.append(tuple(x[:wanted] for x in inputs))
        wanted -= len(found[-1][0])
        if wanted <= 0:
            break
    return found


def _fits(node: fx.Node, c: Coupling) -> bool:
    layer, name = module_of(node, c.gm), str(node.target)
    if not isinstance(layer, LAYERS) or getattr(layer, "groups", 1) > 1 or len(calls(c.gm, name)) > 1:
        return False
    if layer.weight[0].numel() > _WIDEST:
        return False
    return len(c.slot(f"{name}.weight").names) == 1


def _fit(
    c: Coupling,
    gone: set[int],
    smaller: fx.GraphModule,
    each: Contraction,
    inputs: list[tuple[Tensor, Tensor]],
) -> None:
    """``inputs``: of the layer in the whole model and in the smaller one, for each batch."""
    name = str(each.node.target)
    whole, layer = c.gm.get_submodule(name), smaller.get_submodule(name)
    weight: Any = layer.weight
    rows = kept(c, c.slot(f"{name}.weight").axes[0], gone)
    goal = c.gm.get_parameter(f"{name}.weight").flatten(1).double().T
    goal = goal if rows is None else goal[:, rows]
    shift = _shift(smaller, name)
    old = weight.flatten(1).double().T
    if shift is not None:
        old = torch.cat([old, torch.zeros(1, old.shape[1], dtype=torch.float64)])
    moments, products = torch.zeros(len(old), len(old), dtype=torch.float64), torch.zeros_like(old)
    for a, b in inputs:
        for some, same in zip(
            _patches(whole, a).split(_PLACES), _patches(layer, b).split(_PLACES), strict=True
        ):
            before, after = some.double(), same.double()
            if shift is not None:
                after = torch.cat([after, torch.ones(len(after), 1, dtype=torch.float64)], 1)
            moments += after.T @ after
            products += after.T @ (before @ goal)
    ridge = _RIDGE * moments.diagonal().mean()
    if not ridge > 0:  # nothing but zeros arrives at the layer
        return
    moments.diagonal().add_(ridge)
    products += ridge * old
    if f"{name}.weight" in sparse_names(smaller):
        free = old != 0
        if shift is not None:
            free[-1] = True
        found = solve_on(free, moments, products, old)
    else:
        found = torch.linalg.solve(moments, products)
    if shift is not None:
        tensor, sign = shift
        tensor += sign * found[-1].to(tensor.dtype)
        found = found[:-1]
    weight.copy_(found.T.reshape(weight.shape))


def solve_on(free: Tensor, moments: Tensor, products: Tensor, start: Tensor) -> Tensor:
    """Columns x that minimise x' M x / 2 - p' x among those that are zero where they are not free.

    Conjugate gradients, all columns at once, scaled by the diagonal: each has free numbers of its own, and a solution
    for each by elimination would cost as much as all of them together.

    Args:
        free: bool [I, O].
        moments: float64 [I, I], positive definite.
        products, start: float64 [I, O]; ``start`` is zero where not free.
    """
    scale = moments.diagonal().unsqueeze(1)
    x, residual = start.clone(), (products - moments @ start) * free
    direction = residual / scale
    gain = (residual * direction).sum(0)
    enough = gain.max() * _ACCURACY**2
    for _ in range(min(len(moments), _ITERATIONS)):
        along = moments @ direction
        step = gain / (direction * along).sum(0).clamp(min=1e-300)
        x += step * direction
        residual -= step * along * free
        scaled = residual / scale
        before, gain = gain, (residual * scaled).sum(0)
        if gain.max() <= enough:
            break
        direction = scaled + gain / before.clamp(min=1e-300) * direction
    return x


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The vectors that a layer multiplies: [places, inputs]; the same places for inputs of the same sizes."""
    return torch.cat([part[0] for part in input_patches(layer, x, torch.Generator().manual_seed(0))])


def _shift(gm: fx.GraphModule, name: str) -> tuple[Tensor, int] | None:
    """What a constant can be added to, and its sign there: the bias, or the mean of the only reader's batch norm."""
    layer: Any = gm.get_submodule(name)
    if layer.bias is not None:
        return layer.bias, 1
    reader = only_consumer(calls(gm, name)[0])
    if reader is None or len(calls(gm, str(reader.target))) != 1:
        return None
    norm = module_of(reader, gm)
    return (norm.running_mean, -1) if isinstance(norm, _NORMS) and norm.running_mean is not None else None
