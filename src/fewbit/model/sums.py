"""Quantize steps that round whole sums, as the integer program does.

The simulation adds products in float32, and where a sum lies almost halfway between two codes its rounding errors would
decide. But every sum is a whole number of units, input scale x weight scale, and the errors are far below half a unit:
the step finds the whole number again and rounds it as the reference does, so that both give the same code.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fewbit.model.graph import module_of
from fewbit.model.sites import clamp_bounds, passes_codes, rescale_factor
from fewbit.numerics.qtensor import fake_quantize
from fewbit.numerics.scheme import Scheme

_AXES: dict[type, int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}  # after the channels
_TINY = torch.finfo(torch.float32).tiny


class CodeStep(nn.Module, ABC):
    """Rounds a tensor to the values that codes can stand for: float32 in, float32 out, any shape.

    ``sums`` says what the tensor's numbers are whole multiples of, None where that is not known.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.sums: Sums | None = None

    @abstractmethod
    def coding(self) -> tuple[Tensor, Tensor]:
        """Scale float32 [1] and zero point int32 [1], as they are deployed."""

    def rounded(self, x: Tensor) -> Tensor:
        """The values of x's codes."""
        scale, zero_point = self.coding()
        if self.sums is None:
            return fake_quantize(x, scale, zero_point, self.scheme)
        unit = self.sums.unit()
        codes = torch.round(x / unit.clamp(min=_TINY)) * (unit / scale)
        return fake_quantize(codes, torch.ones_like(scale), zero_point, self.scheme) * scale


class Weights(Protocol):
    """Has the weights of a layer."""

    def weight_scale(self) -> Tensor:
        """The scales of its whole numbers: float32 [channels]."""


@dataclass
class Sums:
    """A layer's sums: of the codes of ``source``, whose scale changes by ``factors``, times those of ``weights``.

    ``axes``: how many follow the channels in what the layer gives.
    """

    source: CodeStep
    factors: list[float]
    weights: Weights
    axes: int

    def unit(self) -> Tensor:
        """float32 [channels, 1, ...]"""
        scale = scaled(self.source, self.factors) * self.weights.weight_scale()
        return scale.reshape(-1, *[1] * self.axes)


def scaled(source: CodeStep, factors: list[float]) -> Tensor:
    """The scale that a step's codes have after they were multiplied by ``factors``: float32 [1]."""
    scale = source.coding()[0].reshape(1)
    for factor in factors:
        scale = scale * torch.tensor(factor, dtype=torch.float32)
    return scale


def read_by(node: Node, gm: GraphModule) -> tuple[CodeStep, list[float]] | None:
    """The step whose codes a layer multiplies, and how their scale changes on the way there."""
    factors: list[float] = []
    source: Any = node.args[0]
    while isinstance(source, Node):
        part = module_of(source, gm)
        if isinstance(part, CodeStep):
            return part, factors[::-1]
        if not passes_codes(source, gm):
            return None
        factor = rescale_factor(source, gm)
        factors += [] if factor is None else [factor]
        source = source.args[0]
    return None


def attach_sums(gm: GraphModule, weights: Mapping[Node, Weights]) -> None:
    """Tell each step of a graph whose sums it rounds; ``weights`` are those of its integer layers, by node."""
    for part in gm.modules():
        if isinstance(part, CodeStep):
            part.sums = None
    for node, those in weights.items():
        axes = _AXES.get(type(_plain(module_of(node, gm))))
        found, step = read_by(node, gm), _rounds(node, gm)
        if axes is None or found is None or step is None:
            continue
        if max(found[0].scheme.spec.bits, step.scheme.spec.bits) <= 8:
            step.sums = Sums(*found, those, axes)


def _rounds(node: Node, gm: GraphModule) -> CodeStep | None:
    """The step that rounds a layer's output, at once or after a ReLU; other bounds are no whole number of units."""
    while len(node.users) == 1:
        (node,) = node.users
        part = module_of(node, gm)
        if isinstance(part, CodeStep):
            return part
        if clamp_bounds(node, gm) != (0.0, math.inf):
            return None
    return None


def _plain(layer: nn.Module | None) -> nn.Module | None:
    """The layer itself, inside of one that trains."""
    inner = getattr(layer, "layer", None)
    return inner if isinstance(inner, nn.Module) else layer
