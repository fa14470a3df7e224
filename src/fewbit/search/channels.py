"""How much each layer's channels are missed: one group of them pruned at a time, at several shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from fewbit.data import Batch, Batches
from fewbit.errors import DataError, ModelError, RecipeError
from fewbit.evaluation.agreement import SignalToNoise
from fewbit.model.graph import in_eval_mode, refresh
from fewbit.progress import shown
from fewbit.pruning.coupling import Coupling
from fewbit.pruning.criteria import needs, parameters, rows, scores
from fewbit.pruning.evidence import Loss, cross_entropy, gather
from fewbit.pruning.groups import Group, couple, find_groups
from fewbit.pruning.slicing import without
from fewbit.search.answers import divergence, log_probabilities, outputs
from fewbit.search.harm import PRUNING_METRICS, LayerHarm, Sensitivity, check_metrics

_FEW = 4  # samples that graphs are read and pruned with


def harm_of_pruning(
    gm: GraphModule,
    batches: Batches,
    ratios: Sequence[float],
    metrics: Sequence[str] | None,
    criterion: str,
    loss: Loss | None,
    seed: int,
    progress: bool,
) -> Sensitivity:
    """See `fewbit.sensitivity`; ``gm`` is changed in no value. Raises RecipeError, ModelError or DataError."""
    if any(not 0 < ratio < 1 for ratio in ratios):
        raise RecipeError(f"ratios is {tuple(ratios)}, expected shares of channels between 0 and 1")
    seen = list(batches)
    metrics = _usual(seen) if metrics is None else metrics
    check_metrics(metrics, PRUNING_METRICS)
    few = tuple(x[:_FEW] for x in seen[0][0])
    refresh(gm, few)
    c = couple(gm)
    groups = [group for group in find_groups(c) if group.reason is None]
    if not groups:
        raise ModelError("the model has no channels that could leave")
    generator = torch.Generator().manual_seed(seed)
    evidence = gather(c, groups, needs(criterion), seen, generator, loss)
    found = []
    meter = _Meter(gm, seen, metrics, loss)
    for group in shown(groups, len(groups), "pruning layers", progress):
        order = torch.argsort(scores(criterion, group, evidence, generator), stable=True).tolist()
        for ratio in ratios:
            count = min(max(round(ratio * len(group)), 1), len(group) - 1)
            units = order[:count]
            smaller = without(c, {group.labels[unit] for unit in units}, few)
            leaving, error = _weights(c, group, units)
            found.append(LayerHarm(group.name, f"{100 * ratio:g}%", leaving, error, meter.harm(smaller)))
    return Sensitivity(tuple(found), tuple(metrics), sum(len(inputs[0]) for inputs, _ in seen), {})


def _usual(seen: Sequence[Batch]) -> tuple[str, ...]:
    """What can be measured on these data."""
    target = seen[0][1]
    classes = target is not None and not torch.as_tensor(target).is_floating_point()
    return PRUNING_METRICS if classes else PRUNING_METRICS[:2]


def _weights(c: Coupling, group: Group, units: Sequence[int]) -> tuple[int, float]:
    """How many parameters leave with some units of a group, and their share of the squares of all of its units."""
    squares = [rows(member, member.slot.tensor).square() for member in parameters(group)]
    leaving = sum(float(each[list(units)].sum()) for each in squares)
    total = sum(float(each.sum()) for each in squares)
    return sum(each[list(units)].numel() for each in squares), leaving / total if total else 0.0


class _Meter:
    """Compares models with a whole one on batches, whose answers are kept."""

    def __init__(
        self, gm: GraphModule, seen: Sequence[Batch], metrics: Sequence[str], loss: Loss | None
    ) -> None:
        self.seen, self.metrics = seen, metrics
        self.loss = _cross_entropy if loss is None else loss
        if set(metrics) & {"loss", "accuracy"} and any(target is None for _, target in seen):
            raise DataError(
                'the data have no labels: measure metrics=("sqnr", "kl"), or give (inputs, labels)'
            )
        with torch.no_grad(), in_eval_mode(gm):
            self.answers = [gm(*inputs) for inputs, _ in seen]
        self.whole = [
            self._labelled(answer, target) for answer, (_, target) in zip(self.answers, seen, strict=True)
        ]

    def harm(self, smaller: GraphModule) -> dict[str, float]:
        """The metrics of a model."""
        noise, sums = SignalToNoise(), {"kl": 0.0, "loss": 0.0, "accuracy": 0.0}
        predictions = samples = 0
        for expected, whole, (inputs, target) in zip(self.answers, self.whole, self.seen, strict=True):
            with torch.no_grad(), in_eval_mode(smaller):
                answer = smaller(*inputs)
            before, after = outputs(expected), outputs(answer)
            for left, right in zip(before, after, strict=True):
                noise.update(left, right)
            if "kl" in self.metrics:
                p = log_probabilities(before[0].double())
                predictions += p.numel() // p.shape[-1]
                sums["kl"] += divergence(p, log_probabilities(after[0].double()))
            count = len(inputs[0])
            samples += count
            loss, accuracy = self._labelled(answer, target)
            sums["loss"] += count * (loss - whole[0])
            sums["accuracy"] += count * (whole[1] - accuracy)
        found = {
            "sqnr": noise.sqnr_db,
            "kl": max(sums["kl"], 0.0) / max(predictions, 1),
            "loss": sums["loss"] / samples,
            "accuracy": sums["accuracy"] / samples,
        }
        return {name: found[name] for name in self.metrics}

    def _labelled(self, answer: object, target: object) -> tuple[float, float]:
        """The loss and the accuracy of one batch, as far as they are asked for."""
        loss = accuracy = 0.0
        if "loss" in self.metrics:
            loss = float(self.loss(answer, target))
        if "accuracy" in self.metrics:
            labels, found = torch.as_tensor(target), outputs(answer)[0].argmax(-1)
            if labels.shape != found.shape:
                raise DataError(
                    f"labels of shape {tuple(labels.shape)} for predictions of shape {tuple(found.shape)} (classes on "
                    'the last axis): leave "accuracy" out of metrics'
                )
            accuracy = float((found == labels).double().mean())
        return loss, accuracy


def _cross_entropy(answer: object, target: object) -> Tensor:
    return cross_entropy(answer, target, torch.Generator())
