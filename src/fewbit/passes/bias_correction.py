"""Empirical bias correction: quantization moves each channel's mean, and the bias moves it back.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2
(arXiv 1906.04721).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fewbit.errors import CalibrationError, ModelError
from fewbit.passes._layers import Weighted, channels_out, weighted

PRESERVES = (
    "The mean of each corrected layer's output, per channel over the calibration data: that of the float "
    "graph, within 1 % of the output's root mean square unless a note says otherwise."
)
TOLERANCE = None  # it moves the outputs on purpose; `correct` measures the means again instead
READS_DATA = True
RESIDUAL = 1e-2
SWEEPS = 5

Batches = Iterable[tuple[Tensor, ...]]


@dataclass
class Moments:
    """Sums over calibration data of one layer's output, all its calls together: float64 [C] and a scalar."""

    total: Tensor
    squares: float = 0.0
    count: int = 0

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    @property
    def rms(self) -> float:
        return float((self.squares / max(self.count * len(self.total), 1)) ** 0.5)


@dataclass
class Layer:
    """A layer of the quantized graph with what was measured of its output in both graphs."""

    name: str
    module: Weighted
    reference: Moments
    measured: Moments
    aim: Tensor  # float64 [C], added to the reference's mean: what earlier sweeps fell short of

    def nothing(self) -> Moments:
        """Moments before the first batch."""
        return Moments(torch.zeros_like(self.aim))

    @property
    def shift(self) -> Tensor:
        """What the bias lacks, float64 [C]."""
        return self.reference.mean - self.measured.mean

    @property
    def residual(self) -> float:
        """The largest lacking shift as a fraction of the float output's root mean square."""
        return float(self.shift.abs().max()) / (self.reference.rms or 1.0)


def apply(
    gm: fx.GraphModule, *, reference: fx.GraphModule, batches: Batches, layers: Sequence[str]
) -> list[str]:
    """`correct` under the name that every pass has; `gm` is the quantized graph."""
    return correct(reference, gm, batches, layers)


def correct(
    float_gm: fx.GraphModule, quantized_gm: fx.GraphModule, batches: Batches, layers: Sequence[str]
) -> list[str]:
    """Moves the biases of `layers` in the quantized graph: their outputs get the float graph's means.

    The output meant is what the convolution or linear layer itself returns, before an activation or a
    quantize-dequantize step. Each layer is corrected for what is left after the corrections in front of it:
    while the data runs through, every layer is shifted by the mean difference seen so far before the next
    layer reads it. With one batch that is exactly the layer-by-layer definition, in one reading instead of
    one for each layer. With several batches the first ones ran with shifts that were not final; the means are
    measured again without shifts, and where they are off, the next sweep aims that much to the other side.
    Nothing changes where the means are in place already.

    Memory: one batch's activations and sums per channel. Biases are stored in the layer's dtype; a layer
    without a bias gets one, and a bias shared with another layer becomes its own.

    Args:
        float_gm: the float graph; only read.
        quantized_gm: the same graph with rounded weights and quantize-dequantize steps; changed in place.
        batches: tuples of input tensors; read several times.
        layers: names of convolution and linear layers.

    Returns: one note for each layer and one for the check.

    Raises:
        ModelError: a name is not a convolution or linear layer of both graphs.
        CalibrationError: no batches, batches that can be read only once, a mean that is not finite, or means
            that cannot be moved; then the biases are put back as they were.
    """
    chosen = _layers(float_gm, quantized_gm, layers)
    if not chosen:
        return ["no layers to correct"]
    biases = {name: layer.module.bias for name, layer in chosen.items()}
    try:
        with torch.no_grad(), _eval_mode(float_gm), _eval_mode(quantized_gm):
            return _correct(float_gm, quantized_gm, batches, list(chosen.values()))
    except BaseException:  # also when interrupted: half a correction is worse than none
        for name, bias in biases.items():
            chosen[name].module.bias = bias
        raise


def _correct(
    float_gm: fx.GraphModule, quantized_gm: fx.GraphModule, batches: Batches, layers: list[Layer]
) -> list[str]:
    """Measure and sweep until all means are in place, and keep the best sweep's biases."""
    _measure(float_gm, batches, layers, "reference")
    _measure(quantized_gm, batches, layers, "measured")
    before = {layer.name: layer.residual for layer in layers}
    best, kept = _worst(layers), {layer.name: layer.module.bias for layer in layers}
    for sweep in range(SWEEPS):
        if best.residual <= RESIDUAL:
            break
        for layer in layers if sweep else []:
            layer.aim = layer.aim + layer.shift
        _sweep(float_gm, quantized_gm, batches, layers)
        _measure(quantized_gm, batches, layers, "measured")
        if _worst(layers).residual < best.residual:
            best, kept = _worst(layers), {layer.name: layer.module.bias for layer in layers}
    for layer in layers:
        layer.module.bias = kept[layer.name]
    if best.residual > RESIDUAL and best.residual >= max(before.values()):
        raise CalibrationError(
            f"bias correction cannot move the mean of {best.name!r}, off by {best.residual:.1%} of the "
            "output's root mean square, to where it belongs; use more bits or leave the correction out"
        )
    notes = [f"{name}: mean was off by up to {off:.2%} of the output's rms" for name, off in before.items()]
    goal = "" if best.residual <= RESIDUAL else f", more than the {RESIDUAL:.0%} aimed at"
    return [*notes, f"checked: means left off by at most {best.residual:.2%} ({best.name}){goal}"]


def _worst(layers: list[Layer]) -> Layer:
    """The layer whose mean is off most, as it is now."""
    return replace(max(layers, key=lambda layer: layer.residual))


def _measure(
    gm: fx.GraphModule, batches: Batches, layers: list[Layer], what: Literal["reference", "measured"]
) -> None:
    moments = {layer.name: layer.nothing() for layer in layers}
    for inputs in batches:
        _Measure(gm, moments).run(*inputs)
    for layer in layers:
        setattr(layer, what, moments[layer.name])
    if what == "measured":
        _check(layers)


def _sweep(
    float_gm: fx.GraphModule, quantized_gm: fx.GraphModule, batches: Batches, layers: list[Layer]
) -> None:
    sweep = [replace(layer, reference=layer.nothing(), measured=layer.nothing()) for layer in layers]
    # The float graph runs again: its means over the batches seen so far are what the shifts are measured
    # against, and keeping them would take memory that grows with the data.
    for inputs in batches:
        _Measure(float_gm, {layer.name: layer.reference for layer in sweep}).run(*inputs)
        _Shifted(quantized_gm, {layer.name: layer for layer in sweep}).run(*inputs)
    _check(sweep)
    for layer in sweep:
        _add(layer)


def _check(layers: list[Layer]) -> None:
    for layer in layers:
        if layer.reference.count == 0:
            raise CalibrationError("bias correction got no batches: give calibration data")
        if layer.measured.count != layer.reference.count:
            raise CalibrationError(
                f"bias correction saw {layer.reference.count} outputs of {layer.name!r} and then "
                f"{layer.measured.count}: expected the same batches on every reading; give a list, not an "
                "iterator"
            )
        if not bool(torch.isfinite(layer.shift).all()):
            channel = int((~torch.isfinite(layer.shift)).nonzero()[0])
            raise CalibrationError(
                f"bias correction: the mean of {layer.name!r} is not finite in channel {channel}; "
                "look for NaN or infinite values in the data or the weights"
            )


def _add(layer: Layer) -> None:
    """Put the shift into the bias, rounded once from float64."""
    old = layer.module.bias
    shift = layer.shift + layer.aim
    bias = shift if old is None else old.detach().double() + shift
    weight = layer.module.weight
    trained = weight.requires_grad if old is None else old.requires_grad
    layer.module.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=trained)


class _Measure(fx.Interpreter):
    """Runs a graph and adds each layer's output to its moments."""

    def __init__(self, gm: fx.GraphModule, moments: dict[str, Moments]) -> None:
        super().__init__(gm)
        self.moments = moments

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(target, args, kwargs)
        if target in self.moments:
            _accumulate(self.moments[target], self.fetch_attr(target), result)
        return result


class _Shifted(fx.Interpreter):
    """Runs the quantized graph as if each layer had the bias that the data seen so far asks for."""

    def __init__(self, gm: fx.GraphModule, layers: dict[str, Layer]) -> None:
        super().__init__(gm)
        self.layers = layers

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(target, args, kwargs)
        layer = self.layers.get(target)
        if layer is None:
            return result
        _accumulate(layer.measured, layer.module, result)
        axis = _channel_axis(layer.module, result)
        return result + (layer.shift + layer.aim).to(result.dtype).reshape(
            [-1 if d == axis else 1 for d in range(result.dim())]
        )


def _accumulate(moments: Moments, module: Weighted, output: Tensor) -> None:
    axis = _channel_axis(module, output)
    others = [d for d in range(output.dim()) if d != axis]
    moments.total += output.sum(others, dtype=torch.float64) if others else output.double()
    moments.squares += float(output.square().sum(dtype=torch.float64))
    moments.count += output.numel() // output.shape[axis]


def _channel_axis(module: Weighted, output: Tensor) -> int:
    """Last for a linear layer; before the spatial axes for a convolution, with or without a batch axis."""
    spatial = 0 if isinstance(module, nn.Linear) else module.weight.dim() - 2
    return output.dim() - 1 - spatial


def _layers(float_gm: fx.GraphModule, quantized_gm: fx.GraphModule, names: Sequence[str]) -> dict[str, Layer]:
    """The chosen layers, in the graph's order."""
    known = {str(n.target): n for n in float_gm.graph.nodes if weighted(n, float_gm) is not None}
    found: dict[str, Layer] = {}
    for node in quantized_gm.graph.nodes:
        module = weighted(node, quantized_gm)
        name = str(node.target)
        if module is not None and name in names and name in known:
            zeros = torch.zeros(channels_out(module), dtype=torch.float64)
            found.setdefault(name, Layer(name, module, Moments(zeros), Moments(zeros), zeros))
    missing = [name for name in names if name not in found]
    if missing:
        raise ModelError(
            f"bias correction: {missing[0]!r} is not a convolution or linear layer of both graphs; "
            f"they have {', '.join(known) or 'none'}"
        )
    return found


@contextmanager
def _eval_mode(gm: fx.GraphModule) -> Iterator[None]:
    modes = {module: module.training for module in gm.modules()}
    gm.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
