"""A block of a quantized graph in which roundings, biases and activations' scales can be learned."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.model.blocks import Block, as_module
from fewbit.model.simulate import FakeQuantize
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.soft_rounding import SoftRounding
from fewbit.numerics.straight_through import coin_flips, learned_step


class SoftLayer(nn.Module):
    """A convolution or linear layer whose weight rounds softly and whose bias learns."""

    def __init__(self, layer: nn.Module, rounding: SoftRounding) -> None:
        super().__init__()
        self.layer, self.rounding = layer, rounding
        bias = layer.bias
        self.bias = nn.Parameter(bias.detach().clone()) if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        values = {"weight": self.rounding.weight()}
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


class LearnedBlock:
    """A block with all of it that learns; ``module`` computes it, ``store`` puts what was learned into the model.

    Args:
        weights: by layer, the float weight and its nearest codes, where rounding is to be learned.
        fixed: paths of quantize steps whose scale must stay, since others use the same.
        drop: the source of random drops, None for no drops.
    """

    def __init__(
        self,
        block: Block,
        gm: GraphModule,
        weights: Mapping[str, tuple[Tensor, QTensor]],
        fixed: set[str],
        drop: torch.Generator | None,
    ) -> None:
        self.layers: dict[str, SoftLayer] = {}
        self.steps: dict[str, LearnedStep] = {}
        for path in dict.fromkeys(block.calls()):
            part = gm.get_submodule(path)
            if isinstance(part, FakeQuantize) and part.scheme.spec.integer:
                self.steps[path] = LearnedStep(part, drop, path not in fixed)
            elif path in weights:
                self.layers[path] = SoftLayer(part, SoftRounding(*weights[path]))
        self.module = as_module(block, gm, {**self.layers, **self.steps})

    def roundings(self) -> list[Tensor]:
        """The parameters of the weights' roundings."""
        return [layer.rounding.v for layer in self.layers.values()]

    def biases(self) -> list[Tensor]:
        """The biases of the same layers."""
        return [layer.bias for layer in self.layers.values() if layer.bias is not None]

    def scales(self) -> list[Tensor]:
        """The relative changes of activations' scales, as logarithms."""
        return [step.change for step in self.steps.values() if step.change.requires_grad]

    def undecided(self, beta: float) -> Tensor:
        """See ``SoftRounding.undecided``; the sum over all layers."""
        return torch.stack([layer.rounding.undecided(beta) for layer in self.layers.values()]).sum()

    def learned(self) -> Iterator[tuple[str, str, Tensor]]:
        """What was learned, decided: layer or step, "codes", "bias" or "scale", and the value."""
        for path, layer in self.layers.items():
            yield path, "codes", layer.rounding.hard().codes
            if layer.bias is not None:
                yield path, "bias", layer.bias.detach()
        for path, step in self.steps.items():
            if step.change.requires_grad:
                yield path, "scale", step.scale().detach().reshape(1)
