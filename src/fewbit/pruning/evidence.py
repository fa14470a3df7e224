"""What criteria have to see of a model on data: gradients of units, and sizes of what weights multiply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fewbit.data import Batch
from fewbit.errors import DataError
from fewbit.model.graph import in_eval_mode
from fewbit.pruning.coupling import Coupling
from fewbit.pruning.criteria import Evidence, parameters, rows
from fewbit.pruning.groups import Group

Loss = Callable[[Any, Any], Tensor]  # of the model's output and the batch's target


def gather(
    c: Coupling,
    groups: Collection[Group],
    needs: Collection[str],
    batches: Iterable[Batch],
    generator: torch.Generator,
    loss: Loss | None = None,
) -> Evidence:
    """Run the model on batches, in eval mode.

    ``loss``: by default the cross entropy to the labels, or without any to classes drawn from the model's answers.
    """
    evidence = Evidence()
    if not needs:
        return evidence
    squares = _Squares(c) if "inputs" in needs else None
    count = 0
    with in_eval_mode(c.gm), differentiable(c.gm):
        for inputs, target in batches:
            count += 1
            if squares is not None:
                with torch.no_grad():
                    squares.run(*inputs)
            if "gradients" in needs:
                with torch.enable_grad():
                    output = c.gm(*inputs)
                    value = cross_entropy(output, target, generator) if loss is None else loss(output, target)
                    _add_gradients(groups, evidence, value)
    for sums in (evidence.first, evidence.second):
        for total in sums.values():
            total /= count
    if squares is not None:
        evidence.inputs = squares.result()
    return evidence


def cross_entropy(output: Any, target: Any, generator: torch.Generator) -> Tensor:
    """Of an output whose last axis runs along classes, to labels of its other axes, or to what the output says itself.

    Raises DataError for labels that are no such classes.
    """
    logits = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), torch.empty(0))
    if logits.dim() < 2 or logits.shape[-1] < 2 or (target is None and logits.dim() > 3):
        raise DataError(
            f"pruning data: the model's first output has shape {tuple(logits.shape)}, which has no classes on its last "
            "axis: give loss=, a function of output and labels"
        )
    rows = logits.flatten(0, -2)
    if target is None:
        return F.cross_entropy(
            rows, torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
        )
    labels = torch.as_tensor(target).reshape(-1)
    if (
        labels.is_floating_point()
        or len(labels) != len(rows)
        or not bool(((labels >= 0) & (labels < rows.shape[1])).all())
    ):
        raise DataError(
            f"pruning data: labels {tuple(torch.as_tensor(target).shape)} of {labels.dtype} are no classes of outputs "
            f"{tuple(logits.shape)} (classes on the last axis); give loss=, a function of output and labels"
        )
    return F.cross_entropy(rows, labels)


@contextmanager
def differentiable(gm: fx.GraphModule) -> Iterator[None]:
    """Gradients for all parameters, also for frozen ones."""
    before = {parameter: parameter.requires_grad for parameter in gm.parameters()}
    gm.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def _add_gradients(groups: Collection[Group], evidence: Evidence, loss: Tensor) -> None:
    tensors = list({id(m.slot.tensor): m.slot.tensor for g in groups for m in parameters(g)}.values())
    found = torch.autograd.grad(loss, tensors, materialize_grads=True)
    products = {id(t): (t * gradient).detach() for t, gradient in zip(tensors, found, strict=True)}
    for group in groups:
        key = group.labels[0]
        parts = [rows(m, products[id(m.slot.tensor)]) for m in parameters(group)]
        zeros = torch.zeros(len(group), dtype=torch.float64)
        first = sum((part.sum(1) for part in parts), zeros).square()
        second = sum((part.square().sum(1) for part in parts), zeros)
        evidence.first[key] = evidence.first.get(key, 0) + first
        evidence.second[key] = evidence.second.get(key, 0) + second


class _Squares(fx.Interpreter):
    """Adds up squares of what each layer multiplies, index by index of its weight."""

    def __init__(self, c: Coupling) -> None:
        super().__init__(c.gm)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.found = {each.node: each for each in c.contractions if each.node.op == "call_module"}

    def run_node(self, n: fx.Node) -> Any:
        each = self.found.get(n)
        if each is not None and each.source in self.env:
            x = self.env[each.source].detach().double().movedim(each.dim, 0).flatten(1)
            layer: Any = self.fetch_attr(str(n.target))
            weight, name = getattr(layer, "weight", None), f"{n.target}.weight"
            if isinstance(weight, Tensor):
                size = weight.shape[0 if getattr(layer, "transposed", False) else 1]
                if len(x) % size == 0 and size > 1:
                    sums = x.square().sum(1).reshape(-1, size)  # a group of a convolution in each row
                    self.sums[name] = self.sums.get(name, 0) + sums.mean(0)
                    self.counts[name] = self.counts.get(name, 0) + x.shape[1]
        return super().run_node(n)

    def result(self) -> dict[str, Tensor]:
        return {name: (total / self.counts[name]).sqrt() for name, total in self.sums.items()}
