"""Makes a trainable network from a quantized one: latent weights, estimators, and the batch norms that come back."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.errors import RecipeError
from fewbit.model.graph import copy_graph, module_of
from fewbit.model.integer_forms import IntegerForm, integer_form
from fewbit.model.operators import operator
from fewbit.model.simulate import DynamicFakeQuantize, FakeQuantize, QuantizedModel
from fewbit.model.sums import attach_sums, read_by
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, blocks, unblocks
from fewbit.plan import Row
from fewbit.training.estimators import (
    WeightEstimator,
    activation_estimator,
    serves_activations,
    serves_weights,
    weight_estimator,
)
from fewbit.training.gradients import GradientFormat
from fewbit.training.layers import DynamicStep, TrainableLayer, TrainableStep, norm_gain, times_channels
from fewbit.training.model import DEFAULT, TrainableModel, Training, replace_layer

Portable = Callable[[Tensor, Tensor, Tensor, Scheme], tuple[Tensor, Tensor]]
Norm = nn.modules.batchnorm._BatchNorm
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Estimators by preference, where the one that was asked for does not serve.
_FALLBACK = ("lsq", "codebook", "ste")


def make_trainable(
    model: QuantizedModel,
    latent: GraphModule | None = None,
    source: GraphModule | None = None,
    training: Training = DEFAULT,
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
    builder.attach_sums()
    builder.check_used()
    network.train()
    made = TrainableModel(network, model, builder.shared_source())
    made.training_with = training
    return made


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
        self.folded = {norm: path for path, norm in self.norms.items()}
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
                replace_layer(self.network, str(node.target), DynamicStep())
            if not isinstance(part, FakeQuantize):
                continue
            name = "ste"
            if not self._fixed(node.args[0]):
                name = self._chosen(
                    self.training.activations, partial(serves_activations, scheme=part.scheme)
                )
            estimator = activation_estimator(name, part.scheme, part.scale, part.zero_point)
            replace_layer(self.network, str(node.target), TrainableStep(estimator, part.scheme))

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

    def shared_source(self) -> GraphModule | None:
        """The float graph with the layers that learn; batch norms that do not go on beside theirs are folded."""
        if self.source is None:
            return None
        layers = {
            path: part for path, part in self.network.named_modules() if isinstance(part, TrainableLayer)
        }
        for node in list(self.source.graph.nodes):
            path = self.folded.get(str(node.target)) if node.op == "call_module" else None
            if path is not None and layers[path].norm is None:
                node.replace_all_uses_with(node.args[0])
                self.source.graph.erase_node(node)
        self.source.delete_all_unused_submodules()
        self.source.recompile()
        for path, part in layers.items():
            if part.norm is None:
                replace_layer(self.source, path, part.layer)
        for name, tensor in (*self.network.named_parameters(), *self.network.named_buffers()):
            _share(self.source, name, tensor)
        return self.source

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
            estimators[name] = self._estimator(row, layer.get_parameter(name), norm, self._integer(path))
        gradient = self.gradient if rows else None
        replace_layer(self.network, path, TrainableLayer(layer, estimators, norm, self._read(path), gradient))

    def attach_sums(self) -> None:
        """Steps that round the sums of a layer learn of it."""
        parts = {
            n: module_of(n, self.network) for n in self.network.graph.nodes if n.name in self.model.integer
        }
        layers = {node: part for node, part in parts.items() if isinstance(part, TrainableLayer)}
        attach_sums(self.network, {n: layer for n, layer in layers.items() if "weight" in layer.estimators})

    def _integer(self, path: str) -> bool:
        """Whether a layer computes on codes."""
        nodes = self.network.graph.nodes
        return any(n.op == "call_module" and n.target == path and n.name in self.model.integer for n in nodes)

    def _norm(self, path: str, rows: list[Row]) -> Norm | None:
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

    def _estimator(
        self, row: Row, parameter: nn.Parameter, norm: Norm | None, integer: bool
    ) -> WeightEstimator:
        if id(parameter) in self.estimators:
            return self.estimators[id(parameter)]
        q = self.model.qtensors[row.site]
        if norm is not None:
            q = _unfolded(q, parameter, norm)
        spec = q.scheme.spec
        name = self._chosen(self.training.weights, partial(serves_weights, spec=spec))
        with torch.no_grad():
            parameter.copy_(_agreeing(parameter, q))
        estimator = weight_estimator(name, parameter.detach(), q)
        if self.portable is not None and integer and spec.integer and spec.bits == 8:
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
        found = read_by(nodes[0], self.network)
        return None if found is None or not isinstance(found[0], TrainableStep) else (found[0], found[1])


class _PortableLimit:
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


def _share(graph: GraphModule, name: str, tensor: Tensor) -> None:
    """Let the graph use this tensor where it has one of that name."""
    owner, _, last = name.rpartition(".")
    try:
        part = graph.get_submodule(owner)
    except AttributeError:
        return
    if last in part._parameters or last in part._buffers:
        setattr(part, last, tensor)


def _make_positive(layer: nn.Module, norm: Norm) -> None:
    """Turn round the channels that the batch norm multiplies by a negative number, in place: the outputs stay."""
    if not norm.affine:
        return
    sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0)
    with torch.no_grad():
        weight = layer.get_parameter("weight")
        weight.copy_(times_channels(weight, sign, layer))
        if isinstance(layer.bias, Tensor):
            layer.get_parameter("bias").mul_(sign)
        norm.get_buffer("running_mean").mul_(sign)
        norm.weight.mul_(sign)


def _ensure_bias(layer: nn.Module, norm: Norm) -> None:
    """A layer with a batch norm gets a bias if it has none, zero and not to be learned: its converted form has one."""
    if not isinstance(layer.bias, Tensor):
        zero = layer.get_parameter("weight").new_zeros(norm.num_features)
        layer.register_parameter("bias", nn.Parameter(zero, requires_grad=False))


def _take_bias(layer: nn.Module, old: nn.Module) -> None:
    """Begin with the bias that quantization left, which may be corrected."""
    bias = getattr(old, "bias", None)
    if isinstance(bias, Tensor) and isinstance(getattr(layer, "bias", None), Tensor):
        with torch.no_grad():
            layer.get_parameter("bias").copy_(bias)


def _unfolded(q: QTensor, weight: Tensor, norm: Norm) -> QTensor:
    """The codes with the scales that they have in front of the batch norm, which has no negative weights."""
    gain = norm_gain(norm)
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
