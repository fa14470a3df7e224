"""A part of a quantized graph in which weights' codes, biases and activations' scales can be learned."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.model.blocks import Block, as_module
from fewbit.model.simulate import FakeQuantize
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.straight_through import coin_flips, learned_step


class LearnedWeight(Protocol):
    """A weight whose codes are being learned."""

    def weight(self) -> Tensor:
        """As it is now: float32, differentiable."""

    def hard(self) -> QTensor:
        """As codes."""


W = TypeVar("W", bound=LearnedWeight)


class LearnedLayer(nn.Module, Generic[W]):
    """A convolution or linear layer with a weight that learns, and a bias that does."""

    def __init__(self, layer: nn.Module, learned: W) -> None:
        super().__init__()
        self.layer, self.learned = layer, learned
        bias = layer.bias
        self.bias = nn.Parameter(bias.detach().clone()) if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        values = {"weight": self.learned.weight()}
        if self.bias is not None:
            values["bias"] = self.bias
        result: Tensor = torch.func.functional_call(self.layer, values, (x,))
        return result


class LearnedStep(nn.Module):
    """A quantize step whose scale learns, and that leaves half of the values as they are if ``drop`` is given."""

    def __init__(self, step: FakeQuantize, drop: torch.Generator | None, learns: bool) -> None:
        super().__init__()
        self.step, self.drop = step, drop
        self.change = nn.Parameter(torch.zeros((), device=step.scale.device), requires_grad=learns)

    def scale(self) -> Tensor:
        """The scale as it is now, always positive: float32 scalar."""
        return self.step.scale.reshape(()) * self.change.exp()

    def forward(self, x: Tensor) -> Tensor:
        scheme, zero_point = self.step.scheme, int(self.step.zero_point)
        dropped = None if self.drop is None else coin_flips(x.shape, self.drop).to(x.device)
        return learned_step(x, self.scale(), scheme.qmin - zero_point, scheme.qmax - zero_point, dropped)


class LearnedBlock(Generic[W]):
    """A block with all of it that learns; ``module`` computes it.

    Args:
        weights: by layer, the float weight and its codes, where codes are to be learned.
        learn: makes a learned weight of such a pair.
        fixed: paths of quantize steps whose scale must stay, since others use the same.
        drop: the source of random drops, None for no drops.
    """

    def __init__(
        self,
        block: Block,
        gm: GraphModule,
        weights: Mapping[str, tuple[Tensor, QTensor]],
        learn: Callable[[Tensor, QTensor], W],
        fixed: set[str],
        drop: torch.Generator | None = None,
    ) -> None:
        self.layers: dict[str, LearnedLayer[W]] = {}
        self.steps: dict[str, LearnedStep] = {}
        for path in dict.fromkeys(block.calls()):
            part = gm.get_submodule(path)
            if isinstance(part, FakeQuantize) and part.scheme.spec.integer:
                self.steps[path] = LearnedStep(part, drop, path not in fixed)
            elif path in weights:
                self.layers[path] = LearnedLayer(part, learn(*weights[path]))
        self.module = as_module(block, gm, {**self.layers, **self.steps})

    def weights(self) -> list[W]:
        """The weights that learn."""
        return [layer.learned for layer in self.layers.values()]

    def biases(self) -> list[Tensor]:
        """The biases of the same layers."""
        return [layer.bias for layer in self.layers.values() if layer.bias is not None]

    def scales(self) -> list[Tensor]:
        """The relative changes of activations' scales, as logarithms."""
        return [step.change for step in self.steps.values() if step.change.requires_grad]

    def learned(self) -> Iterator[tuple[str, str, Tensor]]:
        """What was learned, decided: layer or step; which part of it; and the value.

        The parts are "codes", "weight_scale", "codebook", "bias" and "scale".
        """
        for path, layer in self.layers.items():
            q = layer.learned.hard()
            yield path, "codes", q.codes
            yield path, "weight_scale", q.scale
            if q.codebook is not None:
                yield path, "codebook", q.codebook
            if layer.bias is not None:
                yield path, "bias", layer.bias.detach()
        for path, step in self.steps.items():
            if step.change.requires_grad:
                yield path, "scale", step.scale().detach().reshape(1)
