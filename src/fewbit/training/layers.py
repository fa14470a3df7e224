"""A layer whose weights are quantized in every forward pass, its batch norm beside it, and a quantize step that learns.

While gradients are wanted, both compute through their estimators. Without gradients they compute exactly what the
converted model does: the batch norm is folded into the weights' scales, so that their codes stay the same codes.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewbit.model.integer_weights import integer_scale
from fewbit.model.simulate import DynamicFakeQuantize, FakeQuantize
from fewbit.model.sums import CodeStep, scaled
from fewbit.numerics.format import SMALLEST_SCALE
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.training.estimators import ActivationEstimator, WeightEstimator
from fewbit.training.gradients import GradientFormat, quantize_gradient

_BIAS_BITS = 23  # a bias of more bits would no longer be exact in the float32 step of requantization


class TrainableStep(CodeStep):
    """A quantize step through an estimator; float in and out, any shape."""

    def __init__(self, estimator: ActivationEstimator, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.estimator = estimator

    def coding(self) -> tuple[Tensor, Tensor]:
        return self.estimator.exact()

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            result: Tensor = self.estimator(x)
            return result
        return self.rounded(x)

    def converted(self) -> FakeQuantize:
        """The step with its scale as it is now."""
        return FakeQuantize(self.scheme, *self.coding())

    @torch.no_grad()
    def take_scale(self, step: nn.Module) -> None:
        """The scale of a converted step, which may have been moved a little."""
        assert isinstance(step, FakeQuantize)
        if not torch.equal(step.scale, self.estimator.exact()[0]):
            scale: Any = self.estimator.scale
            scale.copy_(step.scale.reshape(scale.shape))


class DynamicStep(nn.Module):
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


class TrainableLayer(nn.Module):
    """A layer with latent weights, an estimator for each that has codes, and the batch norm that follows, if any.

    Args:
        layer: computes; its parameters are the latent weights. Its bias is a parameter even where it does not learn.
        estimators: by the parameter's name.
        norm: the batch norm that was folded into the layer; its weight is used without its sign.
        source: the quantize step whose codes the layer multiplies, None where it reads floats; and the factors by
            which those codes' scale changes on the way.
        gradient: the format of the gradients that come back to the layer, and of its weights'; None for float.
    """

    def __init__(
        self,
        layer: nn.Module,
        estimators: Mapping[str, WeightEstimator],
        norm: nn.Module | None = None,
        source: tuple[TrainableStep, list[float]] | None = None,
        gradient: GradientFormat | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.estimators = nn.ModuleDict(estimators)
        self.norm = norm
        self._source = [source]  # in a list: the step is a child of the network, not of each of its readers
        self.gradient = gradient
        self._scale: Tensor | None = None

    def weight_scale(self) -> Tensor:
        """The scales of the whole numbers that the last pass without gradients multiplied: float32 [channels]."""
        assert self._scale is not None
        return self._scale

    def forward(self, *inputs: Any) -> Any:
        if not (self.training or torch.is_grad_enabled()):
            return functional_call(self.layer, self.exact(), inputs)
        values = {name: self._estimated(name) for name in self.estimators}
        y = functional_call(self.layer, values, inputs)
        if self.norm is not None:
            y = self._normalised(y)
        return y if self.gradient is None else _quantized_gradients(y, self.gradient)

    def _estimated(self, name: str) -> Tensor:
        value: Tensor = self.estimators[name](self.layer.get_parameter(name))
        return value if self.gradient is None else quantize_gradient(value, self.gradient)

    def _normalised(self, y: Tensor) -> Tensor:
        norm: Any = self.norm
        weights = {} if norm.weight is None else {"weight": norm.weight.abs()}
        result: Tensor = functional_call(norm, weights, (y,))
        return result

    # ---- as it will be deployed --------------------------------------------------------------------------------------

    @torch.no_grad()
    def codes(self) -> dict[str, QTensor]:
        """The codes of each quantized parameter, with the batch norm in the weight's scales."""
        found = {name: _hard(e, self.layer.get_parameter(name)) for name, e in self.estimators.items()}
        if self.norm is None or "weight" not in found:
            return found
        q = found["weight"]
        gain, bias = norm_gain(self.norm), self._folded_bias()
        scale = q.scale.double() * gain.repeat_interleave(q.scale.numel() // len(gain))
        unit = self._unit(q)
        if unit is not None and q.scheme.granularity == "channel":
            # A channel that its batch norm has all but switched off: its bias must still fit the accumulator.
            scale = torch.maximum(scale, bias.abs() * q.scale.double() / (unit * 2.0**_BIAS_BITS))
        found["weight"] = dataclasses.replace(q, scale=scale.clamp(min=SMALLEST_SCALE).to(torch.float32))
        return found

    @torch.no_grad()
    def exact(self) -> dict[str, Tensor]:
        """The layer's parameters as deployed, by name: those with codes, and what a batch norm is folded into."""
        codes = self.codes()
        self._scale = integer_scale(codes["weight"]) if "weight" in codes else None
        values = {name: q.dequantize() for name, q in codes.items()}
        if self.norm is not None and "weight" not in values:
            weight, gain = self.layer.get_parameter("weight"), norm_gain(self.norm)
            values["weight"] = times_channels(weight.double(), gain, self.layer).to(weight.dtype)
        bias = self._bias(codes.get("weight"))
        return values if bias is None else {**values, "bias": bias}

    def _bias(self, q: QTensor | None) -> Tensor | None:
        """The bias as the integer program adds it: whole multiples of input scale x weight scale; float otherwise."""
        bias = getattr(self.layer, "bias", None)
        if not isinstance(bias, Tensor):
            return None
        folded = bias.double() if self.norm is None else self._folded_bias()
        unit = None if q is None else self._unit(q)
        if unit is not None:
            # The program rounds the float32 bias to codes; what it adds is a multiple of the unit.
            folded = torch.round(folded.to(torch.float32).double() / unit) * unit
        return folded.to(torch.float32)

    def converted(self) -> nn.Module:
        """The layer as it is without this one around it: quantized weights, the bias with the batch norm's in it."""
        layer = copy.deepcopy(self.layer)
        with torch.no_grad():
            for name, value in self.exact().items():
                layer.get_parameter(name).copy_(value)
        for parameter in layer.parameters():
            parameter.requires_grad_()
        return layer

    def _folded_bias(self) -> Tensor:
        norm: Any = self.norm
        bias = self.layer.get_parameter("bias").detach().double() - norm.running_mean.double()
        bias = bias * norm_gain(norm)
        return bias if norm.bias is None else bias + norm.bias.detach().double()

    def _unit(self, q: QTensor) -> Tensor | None:
        """What the integer program's bias counts in: float64 [channels]; None where the layer reads floats."""
        found = self._source[0]
        if found is None:
            return None
        return (scaled(*found).to(q.scale.device) * integer_scale(q)).double()


def _hard(estimator: nn.Module, weight: Tensor) -> QTensor:
    assert isinstance(estimator, WeightEstimator)
    return estimator.hard(weight.detach().to(torch.float32))


def norm_gain(norm: Any) -> Tensor:
    """What a batch norm multiplies each channel by, without its sign: float64 [channels]."""
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    return gain if norm.weight is None else gain * norm.weight.detach().double().abs()


def times_channels(weight: Tensor, gain: Tensor, layer: nn.Module) -> Tensor:
    """A layer's weight with its output channels multiplied by [channels]."""
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * gain.reshape(shape)


def _quantized_gradients(value: Any, form: GradientFormat) -> Any:
    """The value, each float tensor of it (an LSTM gives several) with quantized gradients."""
    if isinstance(value, tuple):
        return tuple(_quantized_gradients(each, form) for each in value)
    return quantize_gradient(value, form) if isinstance(value, Tensor) else value
