"""What criteria for single weights have to see of a model on data: second moments of inputs, gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fewbit.data import Batch
from fewbit.model.graph import in_eval_mode
from fewbit.pruning.evidence import Loss, cross_entropy, differentiable
from fewbit.statistics import LAYERS, input_patches


class Seen:
    """Sums over data for the weights of some layers; see ``fewbit.pruning.saliency.Weight`` for what they mean."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.hessians: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self._places: dict[str, int] = {}

    def add_inputs(
        self, layer: str, whole: bool, generator: torch.Generator, module: nn.Module, inputs: Any
    ) -> None:
        for patches in input_patches(module, inputs[0].detach(), generator):
            patches = patches.double()
            if whole:
                self.hessians[layer] = self.hessians.get(layer, 0) + patches.mT @ patches
            else:
                self.inputs[layer] = self.inputs.get(layer, 0) + patches.square().sum(1)
            self._places[layer] = self._places.get(layer, 0) + patches.shape[1]

    def watch_output(self, layer: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        axis = output.dim() - 1 if isinstance(module, nn.Linear) else 1

        def see(gradient: Tensor) -> None:
            found = gradient.double().square().movedim(axis, 0).flatten(1).sum(1)
            self.outputs[layer] = self.outputs.get(layer, 0) + found

        output.register_hook(see)

    def finish(self, samples: int, batches: int) -> None:
        """Sums become means."""
        for layer, places in self._places.items():
            (self.hessians if layer in self.hessians else self.inputs)[layer] /= places
        for total in self.outputs.values():
            total /= samples
        for total in self.squares.values():
            total /= batches


def see(
    gm: GraphModule,
    weights: Collection[str],
    wanted: Collection[str],
    batches: Iterable[Batch],
    generator: torch.Generator,
    loss: Loss | None = None,
) -> Seen:
    """Run the model on batches, in eval mode.

    ``weights``: their names; of layers without second moments of inputs none are taken. ``wanted``: any of "inputs",
    "hessian" and "gradients". ``loss``: the mean over a batch; by default the cross entropy to the labels, or without
    any to classes drawn from the model's answers.
    """
    seen = Seen()
    layers = [name.rpartition(".")[0] for name in weights if name.endswith(".weight")]
    hooks = []
    for layer in dict.fromkeys(layers):
        module = gm.get_submodule(layer)
        if not isinstance(module, LAYERS):
            continue
        if {"inputs", "hessian"} & set(wanted):
            add = partial(seen.add_inputs, layer, "hessian" in wanted, generator)
            hooks.append(module.register_forward_pre_hook(add))
        if "gradients" in wanted:
            hooks.append(module.register_forward_hook(partial(seen.watch_output, layer)))
    samples = count = 0
    try:
        with in_eval_mode(gm), differentiable(gm):
            for inputs, target in batches:
                samples, count = samples + len(inputs[0]), count + 1
                with torch.set_grad_enabled("gradients" in wanted):
                    output = gm(*inputs)
                if "gradients" in wanted:
                    _backward(gm, weights, seen, _value(loss, output, target, generator), len(inputs[0]))
    finally:
        for hook in hooks:
            hook.remove()
    seen.finish(samples, count)
    return seen


def _value(
    loss: Callable[..., Tensor] | None, output: Any, target: Any, generator: torch.Generator
) -> Tensor:
    return cross_entropy(output, target, generator) if loss is None else loss(output, target)


def _backward(gm: GraphModule, weights: Collection[str], seen: Seen, value: Tensor, samples: int) -> None:
    """Gradients of the sum over samples, so that those at the outputs are each sample's own."""
    parameters = [gm.get_parameter(name) for name in weights]
    found = torch.autograd.grad(value * samples, parameters, materialize_grads=True)
    for name, gradient in zip(weights, found, strict=True):
        seen.squares[name] = seen.squares.get(name, 0) + (gradient.double() / samples).square()
