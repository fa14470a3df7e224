"""How much each layer's weights mind few bits, or few channels: one layer changed at a time.

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

from fewbit.data import as_batches
from fewbit.errors import CalibrationError, ModelError, PlanError, RecipeError
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
from fewbit.pruning.evidence import Loss
from fewbit.rounding import required_statistics, round_weight
from fewbit.search.answers import divergence, log_probabilities, outputs
from fewbit.search.channels import harm_of_pruning
from fewbit.search.harm import FORMAT_METRICS, LayerHarm, Sensitivity, check_metrics
from fewbit.training.model import TrainableModel

_DERIVATIVES = {"hessian", "fisher"}


def sensitivity(
    model: Any,
    calibration: object,
    candidates: Sequence[str] = ("int8", "int4", "int2"),
    *,
    metrics: Sequence[str] | None = None,
    ratios: Sequence[float] = (),
    criterion: str = "l2",
    loss: Loss | None = None,
    probes: int = 2,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Sensitivity:
    """How much harm each layer's weights do in each format, or without a share of its channels; no labels needed.

    ``model``: what ``fewbit.quantize`` takes. ``calibration``: inputs, as there; 128 are usually enough, read once.
    ``candidates``: formats of weights, per output channel, rounded to nearest with the ranges of least squared error.
    ``metrics``: ``"sqnr"`` (dB, of the network's output), ``"kl"`` (nats, of its predictions), ``"hessian"`` (mean
    trace times squared error) and ``"fisher"`` (each weight's squared error times its own Fisher information). The
    Hessian is that of the cross entropy to the model's own predictions, whose labels are drawn from them in
    expectation: it equals the Fisher information, and both are estimated with ``probes`` random vectors a batch
    (Hutchinson), summed over the batch's samples and averaged over all samples.

    With ``ratios``, such as ``(0.25, 0.5, 0.75)``, channels are pruned instead, those that ``criterion`` finds least
    needed: one group of channels that leave together at a time, nothing fitted again. The ``format`` of a row is then
    "25%" and so on, its ``weights`` are those that leave, its ``error`` their share of the squares of all. ``metrics``:
    "sqnr", "kl", and where the data have labels "loss" (its rise; ``loss(output, target)``, by default cross entropy)
    and "accuracy" (its fall, of 1). The data stay in memory.

    Memory: one batch's activations, and one copy of the weights for each candidate; with derivatives those of a
    training step. The same seed gives the same numbers.

    Raises ``FormatError``, ``RecipeError``, ``ModelError``, ``DataError`` or ``CalibrationError``.
    """
    if isinstance(model, QuantizedModel | TrainableModel):
        raise ModelError("the model is quantized already; measure the float model it came from")
    module = as_module(model)
    example = getattr(module, "meta", {}).get("example")
    labels = None if ratios else False
    batches = as_batches(calibration, what="calibration", like=example, labels=labels, batch_size=batch_size)
    if ratios:
        gm = _read(module, tuple(x[:4] for x in batches.peek()[0]))
        return harm_of_pruning(gm, batches, ratios, metrics, criterion, loss, seed, progress)
    metrics = FORMAT_METRICS if metrics is None else metrics
    _check(candidates, metrics, probes)
    gm = _folded(module, tuple(x[:4] for x in batches.peek()[0]))
    layers = _candidates(gm, candidates)
    meter = _Meter(gm, layers, frozenset(metrics), probes, seed)
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


def _check(candidates: Sequence[str], metrics: Sequence[str], probes: int) -> None:
    if isinstance(candidates, str) or not candidates:
        raise RecipeError(f'candidates is {candidates!r}, expected names of formats such as ("int8", "int4")')
    for name in candidates:
        get_format(name)
    check_metrics(metrics, FORMAT_METRICS)
    if probes < 1:
        raise RecipeError(f"probes is {probes}, expected at least 1")


def _folded(module: nn.Module, few: tuple[Tensor, ...]) -> GraphModule:
    """The model as a graph of our own in eval mode, batch norm folded: what quantization rounds."""
    gm = _read(module, few)
    run("fold_batch_norm", gm, few)
    return gm


def _read(module: nn.Module, few: tuple[Tensor, ...]) -> GraphModule:
    gm = copy.deepcopy(module) if isinstance(module, GraphModule) else read(module, few)
    return gm.eval()


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
        expected = outputs(walk.finish())
        before = log_probabilities(expected[0].double()) if "kl" in self.metrics else None
        self.predictions += before.numel() // before.shape[-1] if before is not None else 0
        for layer in self.layers:
            walk.advance(layer.node)
            for name, rounded in layer.rounded.items():
                kept = layer.weight.data
                try:
                    layer.weight.data = rounded
                    found = outputs(walk.finish())
                finally:
                    layer.weight.data = kept
                for left, right in zip(expected, found, strict=True):
                    self.noise[layer.site, name].update(left, right)
                if before is not None:
                    after = log_probabilities(found[0].double())
                    self.divergence[layer.site, name] += divergence(before, after)

    def _differentiate(self, inputs: tuple[Tensor, ...], generator: torch.Generator) -> None:
        """Hutchinson in the space of outputs: E (J^T sqrt(p) z)^2 is the diagonal of J^T diag(p) J, z random signs.

        J is the Jacobian of all samples' log probabilities, so that this is the Fisher information and, with the
        model's own predictions as labels, the Hessian of the cross entropy. One backward pass serves all layers, and
        no second derivatives are needed.
        """
        for layer in self.layers:
            layer.weight.requires_grad_(True)
        with torch.enable_grad():
            log_p = log_probabilities(outputs(self.gm(*inputs))[0], "hessian and fisher")
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
