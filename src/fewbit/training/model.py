"""A quantized network as an ordinary ``nn.Module`` that trains, and its way back to the model that is exported."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fewbit.errors import ModelError, RecipeError
from fewbit.model.biases import round_biases
from fewbit.model.graph import copy_graph, module_of
from fewbit.model.integer_forms import IntegerForm, integer_form
from fewbit.model.operators import operator
from fewbit.model.simulate import DynamicFakeQuantize, FakeQuantize, QuantizedModel
from fewbit.model.sites import passes_codes, rescale_factor
from fewbit.model.ties import separate_ties
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, blocks, unblocks
from fewbit.plan import Plan, Row
from fewbit.training.estimators import (
    ActivationEstimator,
    Limit,
    WeightEstimator,
    activation_estimator,
    serves_activations,
    serves_weights,
    weight_estimator,
)
from fewbit.training.gradients import GradientFormat
from fewbit.training.layers import TrainableLayer, TrainableStep

Portable = Callable[[Tensor, Tensor, Tensor, Scheme], tuple[Tensor, Tensor]]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FALLBACK = "lsq", "codebook", "ste"  # estimators by preference, where the one that was asked for does not serve


@dataclass(frozen=True)
class Training:
    """How a network learns in codes.

    ``weights`` and ``activations`` name estimators; where one does not serve a format, LSQ does, or the format's own.
    ``gradients``: the format of gradients, None for float. ``stochastic``: they are rounded at random.
    ``freeze``: the share of steps in which a weight's code may turn round before it is held; None for no limit.
    """

    weights: str = "lsq"
    activations: str = "lsq"
    gradients: str | None = None
    stochastic: bool = True
    freeze: float | None = None


class TrainableModel(nn.Module):
    """A network with quantize steps that trains like any other: its parameters are latent weights, scales, biases.

    In eval mode and without gradients it answers exactly as ``convert()`` will, which is what is exported; with
    gradients it computes through its estimators, and batch norms act as their mode says.

    Attributes:
        network: the graph; ``TrainableLayer`` and ``TrainableStep`` in the places of layers and quantize steps.
        plan, integer, example, target, facts: as of ``QuantizedModel``.
    """

    def __init__(self, network: GraphModule, model: QuantizedModel, training: Training) -> None:
        super().__init__()
        self.network = network
        self.plan: Plan = model.plan
        self.integer = model.integer
        self.example = model.example
        self.target = model.target
        self.facts: dict[str, Any] = model.facts
        self.settings = training

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def layers(self) -> Iterator[tuple[str, TrainableLayer]]:
        """The layers with latent weights, by path."""
        for path, part in self.network.named_modules():
            if isinstance(part, TrainableLayer):
                yield path, part

    def steps(self) -> Iterator[tuple[str, TrainableStep]]:
        """The quantize steps, by path."""
        for path, part in self.network.named_modules():
            if isinstance(part, TrainableStep):
                yield path, part

    def set_progress(self, share: float) -> None:
        """How much of training is over, 0 to 1; some estimators grow stricter with it."""
        for part in self.network.modules():
            if isinstance(part, WeightEstimator | ActivationEstimator):
                part.progress = share

    def dampening(self) -> Tensor:
        """How far latent weights lie from their codes' values, as squares: a scalar to add to a loss, so that codes rest.

        Nagel et al. (arXiv 2203.11086), equation 5; in units of the weights themselves.
        """
        terms = [
            dampening(estimator, layer.layer.get_parameter(name))
            for _, layer in self.layers()
            for name, estimator in layer.estimators.items()
            if isinstance(estimator, WeightEstimator) and estimator.scheme.spec.integer
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def convert(self) -> QuantizedModel:
        """The quantized model that this one has become; the two give the same answers.

        Scales of tables (sigmoid, GELU, ...) are moved, in both, by parts in ten thousand, away from rounding ties.
        """
        graph = copy_graph(self.network)
        qtensors: dict[str, QTensor] = {}
        for path, layer in self.layers():
            qtensors |= {f"{path}.{name}": q for name, q in layer.codes().items()}
            _replace(graph, path, layer.converted())
        for path, step in self.steps():
            _replace(graph, path, step.converted())
        for path, part in list(graph.named_modules()):
            if isinstance(part, _DynamicStep):
                _replace(graph, path, DynamicFakeQuantize())
        graph.eval()
        model = QuantizedModel(
            graph, self.plan, qtensors, self.integer, self.example, self.target, copy.deepcopy(self.facts)
        )
        separate_ties(model)
        round_biases(model)
        return model


def dampening(estimator: WeightEstimator, weight: Tensor) -> Tensor:
    """The squared distance of a latent weight from its quantized value, where it is not clipped: a scalar."""
    with torch.no_grad():
        value = estimator(weight)
    lo, hi = value.amin(), value.amax()
    return (weight.clamp(lo, hi) - value).square().sum()


class _DynamicStep(nn.Module):
    """The dynamic quantize step; gradients pass straight through, since nothing is clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.step = DynamicFakeQuantize()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            result: Tensor = self.step(x)
            return result
        with torch.no_grad():
            value = self.step(x)
        return x + (value - x).detach()


def make_trainable(
    model: QuantizedModel,
    latent: GraphModule | None = None,
    source: GraphModule | None = None,
    training: Training = Training(),
    portable: Portable | None = None,
) -> TrainableModel:
    """A network to train from what quantization gave.

    Args:
        model: its codes and scales are where training begins; left as it is.
        latent: the same graph before rounding, without quantize steps; by default weights begin at what they are.
        source: the same before batch norms were folded: those of layers whose scales are free come back.
        training: estimators, gradients.
        portable: widens the ranges of weights for kernels that saturate; None where none does.

    Raises:
        RecipeError: an estimator that does not exist, or that serves no tensor of the model.
    """
    network = copy_graph(model.graph)
    builder = _Builder(model, network, latent, source, training, portable)
    builder.steps()
    builder.layers()
    builder.check_used()
    network.train()
    return TrainableModel(network, model, training)


class _Builder:
    def __init__(
        self,
        model: QuantizedModel,
        network: GraphModule,
        latent: GraphModule | None,
        source: GraphModule | None,
        training: Training,
        portable: Portable | None,
    ) -> None:
        self.model, self.network, self.training, self.portable = model, network, training, portable
        self.latent = copy_graph(model.graph if latent is None else latent)
        self.source = None if source is None else copy_graph(source)
        self.norms = {} if self.source is None else _folded(self.source, self.network)
        self.gradient = None
        if training.gradients is not None:
            self.gradient = GradientFormat(training.gradients, training.stochastic)
        self.estimators: dict[int, WeightEstimator] = {}
        self.used: set[str] = set()

    # ---- activations -------------------------------------------------------------------------------------------------

    def steps(self) -> None:
        for node in self.network.graph.nodes:
            part = module_of(node, self.network)
            if isinstance(part, DynamicFakeQuantize):
                _replace(self.network, str(node.target), _DynamicStep())
            if not isinstance(part, FakeQuantize):
                continue
            name = "ste"
            if not self._fixed(node.args[0]):
                name = self._chosen(self.training.activations, lambda n, s=part.scheme: serves_activations(n, s))
            estimator = activation_estimator(name, part.scheme, part.scale, part.zero_point)
            _replace(self.network, str(node.target), TrainableStep(estimator, part.scheme))

    def _fixed(self, node: Any) -> bool:
        """Whether the operator at a node fixes the range of what it gives."""
        op = operator(node, self.network)
        if node.name not in self.model.integer or op is None:
            return False
        form = integer_form(node, op, self.network)
        return isinstance(form, IntegerForm) and form.fixed is not None

    def _chosen(self, asked: str, serves: Callable[[str], bool]) -> str:
        if serves(asked):
            self.used.add(asked)
            return asked
        return next(name for name in _FALLBACK if serves(name))

    def check_used(self) -> None:
        """The estimators that were asked for serve something."""
        kinds = {"weights": self.model.plan.weights(), "activations": list(self._activation_rows())}
        for kind, rows in kinds.items():
            asked = getattr(self.training, kind)
            formats = sorted({row.scheme.format for row in rows if row.scheme is not None})
            if formats and asked not in self.used and asked != Training.weights:
                raise RecipeError(
                    f"estimator {asked!r} serves none of the model's {kind}, which are {', '.join(formats)}: "
                    "choose another estimator or other formats"
                )

    def _activation_rows(self) -> Iterator[Row]:
        return (row for row in self.model.plan.rows if row.kind in ("activation", "output"))

    # ---- weights -----------------------------------------------------------------------------------------------------

    def layers(self) -> None:
        rows: dict[str, list[Row]] = {}
        for row in self.model.plan.weights():
            if row.scheme is not None:
                rows.setdefault(row.site.rpartition(".")[0], []).append(row)
        for path in dict.fromkeys((*rows, *self.norms)):
            self._layer(path, rows.get(path, []))

    def _layer(self, path: str, rows: list[Row]) -> None:
        norm = self._norm(path, rows)
        graph = self.latent if norm is None or self.source is None else self.source
        layer = graph.get_submodule(path)
        old = self.network.get_submodule(path)
        if norm is None:
            _take_bias(layer, old)
        else:
            _make_positive(layer, norm)
        _ensure_bias(layer, norm)
        estimators = {}
        for row in rows:
            name = row.site.rpartition(".")[2]
            estimators[name] = self._estimator(row, layer.get_parameter(name), norm)
        gradient = self.gradient if rows else None
        _replace(self.network, path, TrainableLayer(layer, estimators, norm, self._read(path), gradient))

    def _norm(self, path: str, rows: list[Row]) -> nn.Module | None:
        """The batch norm that goes on beside the layer; None where there is none, or the scales are not free."""
        if path not in self.norms or self.source is None:
            return None
        norm = self.source.get_submodule(self.norms[path])
        assert isinstance(norm, NORMS)
        for row in rows:
            scheme = row.scheme
            assert scheme is not None
            count = self.model.qtensors[row.site].scale.numel()
            free = scheme.spec.scaled and scheme.spec.scale_bits == 32 and scheme.spec.block is None
            if not free or scheme.granularity == "tensor" or count % norm.num_features:
                return None
        return norm

    def _estimator(self, row: Row, parameter: nn.Parameter, norm: nn.Module | None) -> WeightEstimator:
        if id(parameter) in self.estimators:
            return self.estimators[id(parameter)]
        q = self.model.qtensors[row.site]
        if norm is not None:
            q = _unfolded(q, parameter, norm)
        spec = q.scheme.spec
        name = self._chosen(self.training.weights, lambda n: serves_weights(n, spec))
        with torch.no_grad():
            parameter.copy_(_agreeing(parameter, q))
        estimator = weight_estimator(name, parameter.detach(), q)
        if self.portable is not None and spec.integer and spec.bits == 8:
            estimator.limit = _PortableLimit(self.portable, q)
        if self.training.freeze is not None and spec.integer:
            estimator.watch(parameter.detach(), self.training.freeze)
        self.estimators[id(parameter)] = estimator
        return estimator

    def _read(self, path: str) -> tuple[TrainableStep, list[float]] | None:
        """The step whose codes a layer multiplies, and how their scale changes on the way there."""
        nodes = [n for n in self.network.graph.nodes if n.op == "call_module" and n.target == path]
        if len(nodes) != 1 or nodes[0].name not in self.model.integer:
            return None
        factors: list[float] = []
        node: Any = nodes[0].args[0]
        while isinstance(node, Node):
            part = module_of(node, self.network)
            if isinstance(part, TrainableStep):
                return part, factors[::-1]
            if not passes_codes(node, self.network):
                return None
            factor = rescale_factor(node, self.network)
            factors += [] if factor is None else [factor]
            node = node.args[0]
        return None


class _PortableLimit(Limit):
    """The scale at which a kernel's sums of two products cannot saturate."""

    def __init__(self, portable: Portable, q: QTensor) -> None:
        self.portable, self.scheme, self.shape = portable, q.scheme, q.shape

    def __call__(self, rows: Tensor, scale: Tensor) -> Tensor:
        bound = (scale * self.scheme.qmax).reshape(-1)
        weight = unblocks(rows, self.shape, self.scheme)
        _, hi = self.portable(weight, -bound, bound, self.scheme)
        return (hi / self.scheme.qmax).to(scale.dtype).reshape(scale.shape)


def _folded(source: GraphModule, network: GraphModule) -> dict[str, str]:
    """By layer, the batch norm that was folded into it."""
    left = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    found = {}
    for node in source.graph.nodes:
        if isinstance(module_of(node, source), NORMS) and str(node.target) not in left:
            found[str(node.args[0].target)] = str(node.target)
    return found


def _make_positive(layer: nn.Module, norm: nn.Module) -> None:
    """Turn round the channels that the batch norm multiplies by a negative number, in place: the outputs stay."""
    if norm.weight is None:
        return
    sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0)
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    shape = [1] * layer.get_parameter("weight").dim()
    shape[axis] = -1
    with torch.no_grad():
        layer.get_parameter("weight").mul_(sign.reshape(shape))
        if isinstance(layer.bias, Tensor):
            layer.bias.mul_(sign)
        norm.get_buffer("running_mean").mul_(sign)
        norm.get_parameter("weight").mul_(sign)


def _ensure_bias(layer: nn.Module, norm: nn.Module | None) -> None:
    """A layer with a batch norm gets a bias if it has none, zero and not to be learned: its converted form has one."""
    if norm is not None and layer.bias is None:
        weight = layer.get_parameter("weight")
        layer.bias = nn.Parameter(weight.new_zeros(norm.num_features), requires_grad=False)


def _take_bias(layer: nn.Module, old: nn.Module) -> None:
    """Begin with the bias that quantization left, which may be corrected."""
    bias = getattr(old, "bias", None)
    if isinstance(bias, Tensor) and isinstance(getattr(layer, "bias", None), Tensor):
        with torch.no_grad():
            layer.get_parameter("bias").copy_(bias)


def _unfolded(q: QTensor, weight: Tensor, norm: nn.Module) -> QTensor:
    """The codes with the scales that they have in front of the batch norm."""
    gain = torch.rsqrt(norm.get_buffer("running_var").double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    gain = gain.repeat_interleave(q.scale.numel() // len(gain))
    largest = blocks(weight.detach(), q.scheme).abs().amax(dim=1).double() / max(q.scheme.qmax, 1.0)
    scale = torch.where(gain > 1e-9 * gain.max(), q.scale.double() / gain.clamp(min=1e-30), largest)
    return replace(q, scale=scale.clamp(min=1e-30).to(torch.float32))


def _agreeing(weight: Tensor, q: QTensor) -> Tensor:
    """The latent weight; where rounding chose another code than the nearest, that code's value."""
    coded = q.dequantize()
    if q.codebook is not None:
        return weight.detach()
    rows, scale = blocks(weight.detach().to(torch.float32), q.scheme), q.scale.reshape(-1, 1)
    zero_point = q.zero_point.reshape(-1, 1)
    lo, hi = q.scheme.qmin - zero_point, q.scheme.qmax - zero_point
    v = torch.minimum(torch.maximum(rows / scale, lo), hi)
    nearest = torch.round(v) if q.scheme.spec.integer else q.scheme.spec.nearest(v)
    values = blocks(coded, q.scheme)
    same = (nearest * scale - values).abs() <= 1e-6 * scale
    return unblocks(torch.where(same, rows, values), tuple(weight.shape), q.scheme)


def _replace(graph: GraphModule, path: str, part: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    parent = graph.get_submodule(owner)
    if not isinstance(getattr(parent, name, None), nn.Module):
        raise ModelError(f"{path}: the graph has no such layer")
    setattr(parent, name, part)
