"""How much each layer's weights mind few bits, one layer quantized at a time.

The trace of the Hessian as in Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks"
(arXiv 1911.03852), here of the loss whose labels are the float model's own predictions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fewbit.data import as_batches
from fewbit.errors import CalibrationError, DataError, ModelError, PlanError, RecipeError
from fewbit.evaluation.agreement import SignalToNoise
from fewbit.model.readers import as_module
from fewbit.model.readers.torch import read
from fewbit.model.simulate import QuantizedModel
from fewbit.model.sites import find_sites, place
from fewbit.numerics.format import get_format
from fewbit.observers import make_observer, weight_statistics
from fewbit.passes import run
from fewbit.plan import Recipe, Row, resolve
from fewbit.progress import shown
from fewbit.registry import nearest
from fewbit.rounding import required_statistics, round_weight
from fewbit.search.harm import METRICS, LayerHarm, Sensitivity
from fewbit.training.model import TrainableModel

_DERIVATIVES = {"hessian", "fisher"}


def sensitivity(
    model: Any,
    calibration: object,
    candidates: Sequence[str] = ("int8", "int4", "int2"),
    *,
    metrics: Sequence[str] = ("sqnr", "kl", "hessian", "fisher"),
    probes: int = 2,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Sensitivity:
    """How much harm each layer's weights do in each format, all else float; no labels needed.

    ``model``: what ``fewbit.quantize`` takes. ``calibration``: inputs, as there; 128 are usually enough, read once.
    ``candidates``: formats of weights, per output channel, rounded to nearest with the ranges of least squared error.
    ``metrics``: ``"sqnr"`` (dB, of the network's output), ``"kl"`` (nats, of its predictions), ``"hessian"`` (mean
    trace times squared error) and ``"fisher"`` (each weight's squared error times its own Fisher information). The
    Hessian is that of the cross entropy to the model's own predictions, whose labels are drawn from them in
    expectation: it equals the Fisher information, and both are estimated with ``probes`` random vectors a batch
    (Hutchinson), summed over the batch's samples and averaged over all samples.

    Memory: one batch's activations, and one copy of the weights for each candidate; with derivatives those of a
    training step. The same seed gives the same numbers.

    Raises ``FormatError``, ``RecipeError``, ``ModelError``, ``DataError`` or ``CalibrationError``.
    """
    chosen = _check(candidates, metrics, probes)
    if isinstance(model, QuantizedModel | TrainableModel):
        raise ModelError("the model is quantized already; measure the float model it came from")
    module = as_module(model)
    example = getattr(module, "meta", {}).get("example")
    batches = as_batches(calibration, what="calibration", like=example, labels=False, batch_size=batch_size)
    gm = _folded(module, tuple(x[:4] for x in batches.peek()[0]))
    layers = _candidates(gm, candidates)
    meter = _Meter(gm, layers, chosen, probes, seed)
    for index, (inputs, _) in enumerate(shown(batches, batches.length, "measuring layers", progress)):
        meter.update(inputs, index)
    return meter.result(tuple(metrics))


@dataclass
class _Layer:
    """A weight with its rounded versions by format."""

    site: str
    node: Node
    weight: nn.Parameter
    rounded: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.site.removesuffix(".weight")

    def error(self, candidate: str) -> Tensor:
        return (self.rounded[candidate] - self.weight).detach().double()


def _check(candidates: Sequence[str], metrics: Sequence[str], probes: int) -> frozenset[str]:
    if isinstance(candidates, str) or not candidates:
        raise RecipeError(f'candidates is {candidates!r}, expected names of formats such as ("int8", "int4")')
    if isinstance(metrics, str) or not metrics:
        raise RecipeError(f"metrics is {metrics!r}, expected some of {', '.join(METRICS)}")
    for name in candidates:
        get_format(name)
    for name in metrics:
        if name not in METRICS:
            raise RecipeError(f"unknown metric {name!r}: {nearest(str(name), list(METRICS))}")
    if probes < 1:
        raise RecipeError(f"probes is {probes}, expected at least 1")
    return frozenset(metrics)


def _folded(module: nn.Module, few: tuple[Tensor, ...]) -> GraphModule:
    """The model as a graph of our own in eval mode, batch norm folded: what quantization rounds."""
    gm = copy.deepcopy(module) if isinstance(module, GraphModule) else read(module, few)
    gm.eval()
    run("fold_batch_norm", gm, few)
    return gm


def _candidates(gm: GraphModule, candidates: Sequence[str]) -> list[_Layer]:
    """Every weight that a plan would round, in the graph's order, with its rounded versions."""
    layers: dict[str, _Layer] = {}
    calls = {str(n.target): n for n in reversed(gm.graph.nodes) if n.op == "call_module"}
    for name in dict.fromkeys(candidates):
        recipe = Recipe.from_kwargs(weights=name, activations="float", weight_observer="mse")
        plan = resolve(recipe, find_sites(gm, place(gm, recipe.mode)))
        for row in plan.weights():
            if row.scheme is None or row.shared_with is not None:
                continue
            layer, key = row.site.rsplit(".", 1)
            weight = gm.get_submodule(layer).get_parameter(key)
            found = layers.setdefault(row.site, _Layer(row.site, calls[layer], weight, {}))
            found.rounded[name] = _rounded(row, weight.detach())
    order = {node: n for n, node in enumerate(gm.graph.nodes)}
    if not layers:
        raise ModelError("the model has no layer with weights that could be quantized")
    return sorted(layers.values(), key=lambda each: order[each.node])


def _rounded(row: Row, weight: Tensor) -> Tensor:
    assert row.scheme is not None and row.observer is not None and row.rounding is not None
    asked = required_statistics(row.rounding) | weight_statistics(row.observer)
    if asked:
        raise PlanError(
            f"{row.site}: {row.rounding} needs {', '.join(sorted(asked))}, which is not measured here"
        )
    observer = make_observer(row.observer, row.scheme)
    observer.update(weight)
    return round_weight(row.rounding, weight, row.scheme, *observer.bounds()).dequantize()


class _Meter:
    """Sums over batches of everything that is measured."""

    def __init__(
        self, gm: GraphModule, layers: list[_Layer], metrics: frozenset[str], probes: int, seed: int
    ) -> None:
        self.gm, self.layers, self.metrics = gm, layers, metrics
        self.probes, self.seed = probes, seed
        keys = [(layer.site, name) for layer in layers for name in layer.rounded]
        self.noise = {key: SignalToNoise() for key in keys}
        self.divergence = dict.fromkeys(keys, 0.0)
        self.weighted = dict.fromkeys(keys, 0.0)
        self.traces = dict.fromkeys((layer.site for layer in layers), 0.0)
        self.samples = self.predictions = 0

    def update(self, inputs: tuple[Tensor, ...], index: int) -> None:
        """One batch."""
        self.samples += inputs[0].shape[0] if inputs[0].dim() else 1
        if self.metrics & _DERIVATIVES:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            self._differentiate(inputs, generator)
        if self.metrics - _DERIVATIVES:
            with torch.no_grad():
                self._compare(inputs)

    def _compare(self, inputs: tuple[Tensor, ...]) -> None:
        """Each layer's rounded weights in turn; what comes before the layer is computed once."""
        walk = _Walk(self.gm, inputs)
        expected = _outputs(walk.finish())
        before = _log_probabilities(expected[0].double()) if "kl" in self.metrics else None
        self.predictions += before.numel() // before.shape[-1] if before is not None else 0
        for layer in self.layers:
            walk.advance(layer.node)
            for name, rounded in layer.rounded.items():
                kept = layer.weight.data
                try:
                    layer.weight.data = rounded
                    found = _outputs(walk.finish())
                finally:
                    layer.weight.data = kept
                for left, right in zip(expected, found, strict=True):
                    self.noise[layer.site, name].update(left, right)
                if before is not None:
                    after = _log_probabilities(found[0].double())
                    self.divergence[layer.site, name] += float((before.exp() * (before - after)).sum())

    def _differentiate(self, inputs: tuple[Tensor, ...], generator: torch.Generator) -> None:
        """Hutchinson in the space of outputs: E (J^T sqrt(p) z)^2 is the diagonal of J^T diag(p) J, z random signs.

        J is the Jacobian of all samples' log probabilities, so that this is the Fisher information and, with the
        model's own predictions as labels, the Hessian of the cross entropy. One backward pass serves all layers, and
        no second derivatives are needed.
        """
        for layer in self.layers:
            layer.weight.requires_grad_(True)
        with torch.enable_grad():
            log_p = _log_probabilities(_outputs(self.gm(*inputs))[0], "hessian and fisher")
        p = log_p.detach().exp()
        weights = [layer.weight for layer in self.layers]
        for probe in range(self.probes):
            z = torch.randint(0, 2, p.shape, generator=generator).to(p.dtype) * 2 - 1
            again = probe + 1 < self.probes
            gradients = torch.autograd.grad(
                log_p, weights, p.sqrt() * z, retain_graph=again, materialize_grads=True
            )
            for layer, gradient in zip(self.layers, gradients, strict=True):
                diagonal = gradient.double().square() / self.probes
                self.traces[layer.site] += float(diagonal.sum())
                for name in layer.rounded:
                    self.weighted[layer.site, name] += float((diagonal * layer.error(name).square()).sum())

    def result(self, metrics: tuple[str, ...]) -> Sensitivity:
        rows = []
        for layer in self.layers:
            count, power = layer.weight.numel(), float(layer.weight.detach().double().square().sum())
            for name in layer.rounded:
                key, squares = (layer.site, name), float(layer.error(name).square().sum())
                found = {
                    "sqnr": self.noise[key].sqnr_db,
                    "kl": max(self.divergence[key], 0.0) / max(self.predictions, 1),
                    "hessian": self.traces[layer.site] / self.samples / count * squares,
                    "fisher": self.weighted[key] / self.samples,
                }
                error = squares / power if power else 0.0
                rows.append(LayerHarm(layer.name, name, count, error, {m: found[m] for m in metrics}))
                self._check_finite(rows[-1])
        traces = {layer.name: self.traces[layer.site] / self.samples for layer in self.layers}
        return Sensitivity(tuple(rows), metrics, self.samples, traces if self.metrics & _DERIVATIVES else {})

    def _check_finite(self, row: LayerHarm) -> None:
        bad = [name for name, value in row.metrics.items() if math.isnan(value)]
        if bad:
            raise CalibrationError(
                f"{row.layer}: {bad[0]} is not a number on the calibration data; look for NaN or infinite values in "
                "the data or the weights"
            )


class _Walk(Interpreter):
    """A run that stops in front of a node and can be finished from there many times over.

    Kept are only the values that nodes ahead still read.
    """

    def __init__(self, gm: GraphModule, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(gm)
        self.nodes = list(gm.graph.nodes)
        self.at = 0
        self.args_iter = iter(inputs)
        while self.nodes[self.at].op == "placeholder":
            self._step(self.nodes[self.at])
            self.at += 1

    def advance(self, node: Node) -> None:
        """Run up to, but not including, a node that lies ahead (or here)."""
        while self.nodes[self.at] is not node:
            self._step(self.nodes[self.at])
            self.at += 1

    def finish(self) -> Any:
        """The model's outputs; the walk itself stays where it is."""
        kept = dict(self.env)
        try:
            for node in self.nodes[self.at : -1]:
                self._step(node)
            return self.run_node(self.nodes[-1])
        finally:
            self.env = kept

    def _step(self, node: Node) -> None:
        self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, []):
            self.env.pop(dead, None)


def _outputs(answer: Any) -> list[Tensor]:
    found = [x for x in tree_leaves(answer) if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise ModelError("the model gives no floating tensor: there is no output to compare")
    return found


def _log_probabilities(output: Tensor, metric: str = "kl") -> Tensor:
    """Of the model's first output, classes last: logits, or probabilities that sum to one."""
    axis = -1 if output.dim() in (1, 2, 3) else 1
    output = output.movedim(axis, -1)
    if output.shape[-1] < 2:
        raise DataError(
            f"{metric} compares predictions, and the model's output of shape {tuple(output.shape)} has no classes: "
            'measure metrics=("sqnr",)'
        )
    values = output.detach()
    if bool((values >= 0).all()) and bool((values.sum(-1) - 1).abs().max() < 1e-3):
        output = output.clamp_min(1e-12).log()
    return F.log_softmax(output, -1)
