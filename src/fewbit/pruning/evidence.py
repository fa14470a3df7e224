"""What criteria have to see of a model on data: gradients of units, and sizes of what weights multiply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fewbit.data.intake import Batch
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
    loss: Loss | None = None,
) -> Evidence:
    """Run the model on batches, in eval mode.

    ``loss``: by default the cross entropy to the labels, or to the model's own answers.
    """
    evidence = Evidence()
    if not needs:
        return evidence
    squares = _Squares(c) if "inputs" in needs else None
    count = 0
    with in_eval_mode(c.gm):
        for inputs, target in batches:
            count += 1
            if squares is not None:
                with torch.no_grad():
                    squares.run(*inputs)
            if "gradients" in needs:
                with torch.enable_grad():
                    _add_gradients(c, groups, evidence, (loss or answers)(c.gm(*inputs), target))
    for sums in (evidence.first, evidence.second):
        for total in sums.values():
            total /= count
    if squares is not None:
        evidence.inputs = squares.result()
    return evidence


def answers(output: Any, target: Any) -> Tensor:
    """Cross entropy to labels; without any, to classes drawn from what the model says (seed of PyTorch)."""
    logits = output[0] if isinstance(output, tuple | list) else output
    classes = logits.flatten(0, -2)
    if target is None:
        target = torch.distributions.Categorical(logits=classes.detach()).sample()
    return F.cross_entropy(classes, torch.as_tensor(target).reshape(-1))


def _add_gradients(c: Coupling, groups: Collection[Group], evidence: Evidence, loss: Tensor) -> None:
    tensors = list({id(m.slot.tensor): m.slot.tensor for g in groups for m in parameters(g)}.values())
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    products = {
        id(tensor): (tensor * gradient).detach()
        for tensor, gradient in zip(wanted, found, strict=True)
        if gradient is not None
    }
    for group in groups:
        key = group.labels[0]
        parts = [
            rows(m, products[id(m.slot.tensor)]) for m in parameters(group) if id(m.slot.tensor) in products
        ]
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
