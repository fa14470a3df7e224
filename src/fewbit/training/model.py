"""A quantized network as an ordinary ``nn.Module`` that trains, and its way back to the model that is exported."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.errors import ModelError
from fewbit.model.biases import round_biases
from fewbit.model.graph import copy_graph
from fewbit.model.simulate import DynamicFakeQuantize, QuantizedModel
from fewbit.model.ties import separate_ties
from fewbit.numerics.qtensor import QTensor
from fewbit.plan import Plan, Recipe
from fewbit.training.estimators import ActivationEstimator, WeightEstimator
from fewbit.training.layers import DynamicStep, TrainableLayer, TrainableStep


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


DEFAULT = Training()


class TrainableModel(nn.Module):
    """A network with quantize steps that trains like any other: its parameters are latent weights, scales, biases.

    In eval mode and without gradients it answers exactly as ``convert()`` will, which is what is exported; with
    gradients it computes through its estimators, and batch norms act as their mode says.

    Attributes:
        network: the graph; ``TrainableLayer`` and ``TrainableStep`` in the places of layers and quantize steps.
        plan, integer, example, target, facts: as of ``QuantizedModel``.
        recipe, training_with: what it was made by.
    """

    def __init__(
        self, network: GraphModule, model: QuantizedModel, source: GraphModule | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.plan: Plan = model.plan
        self.integer = model.integer
        self.example = model.example
        self.target = model.target
        self.facts: dict[str, Any] = model.facts
        self.recipe: Recipe | None = None  # what it was quantized by, where it was from a float model
        self.training_with = DEFAULT
        self._source = [source]  # in a list, since its layers are children of the network already

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
        """How far latent weights lie from their codes' values, as squares: a scalar to add to a loss; codes then rest.

        Nagel et al. (arXiv 2203.11086), equation 5; in units of the weights themselves.
        """
        terms = [
            dampening(estimator, layer.layer.get_parameter(name))
            for _, layer in self.layers()
            for name, estimator in layer.estimators.items()
            if isinstance(estimator, WeightEstimator) and estimator.scheme.spec.integer
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def latent_model(self) -> GraphModule:
        """The float network with the latent weights as they are now, and batch norms: a copy, to quantize otherwise.

        Raises ModelError for a network that was equalized or smoothed, or made from a quantized one.
        """
        if self._source[0] is None:
            raise ModelError(
                "this network has no float form of its own: its weights were moved between layers, or came as codes; "
                "quantize without equalize, smooth_quant and absorb_bias, from the float model"
            )
        return copy_graph(self._source[0]).eval()

    def convert(self) -> QuantizedModel:
        """The quantized model that this one has become; the two give the same answers.

        Scales of tables (sigmoid, GELU, ...) are moved, in both, by parts in ten thousand, away from rounding ties.
        """
        graph = copy_graph(self.network)
        qtensors: dict[str, QTensor] = {}
        for path, layer in self.layers():
            qtensors |= {f"{path}.{name}": q for name, q in layer.codes().items()}
            replace_layer(graph, path, layer.converted())
        for path, step in self.steps():
            replace_layer(graph, path, step.converted())
        for path, part in list(graph.named_modules()):
            if isinstance(part, DynamicStep):
                replace_layer(graph, path, DynamicFakeQuantize())
        graph.eval()
        model = QuantizedModel(
            graph, self.plan, qtensors, self.integer, self.example, self.target, copy.deepcopy(self.facts)
        )
        separate_ties(model)
        for path, step in self.steps():
            step.take_scale(model.graph.get_submodule(path))
        round_biases(model)
        return model


def dampening(estimator: WeightEstimator, weight: Tensor) -> Tensor:
    """The squared distance of a latent weight from its quantized value, where it is not clipped: a scalar."""
    with torch.no_grad():
        value = estimator(weight)
    lo, hi = value.amin(), value.amax()
    return (weight.clamp(lo, hi) - value).square().sum()


def replace_layer(graph: GraphModule, path: str, part: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    parent = graph.get_submodule(owner)
    if not isinstance(getattr(parent, name, None), nn.Module):
        raise ModelError(f"{path}: the graph has no such layer")
    setattr(parent, name, part)
