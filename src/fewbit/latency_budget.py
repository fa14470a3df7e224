"""Latency as a budget of pruning: what a channel saves is measured in ONNX Runtime, and so is each choice of channels.

A table of times, layer by layer and width by width, stands for the model while channels are chosen, as in "NetAdapt"
(arXiv 1804.03230); the model that was chosen is then timed as a whole, and the choice made again until that fits.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule

from fewbit import stopwatch
from fewbit.errors import RecipeError
from fewbit.evaluation.latency import ratio
from fewbit.model.graph import in_eval_mode, module_of, refresh
from fewbit.progress import shown
from fewbit.pruned import Timed
from fewbit.pruning.allocation import Bounds, Scope, allocate, smallest
from fewbit.pruning.coupling import Coupling
from fewbit.pruning.groups import Group, find_groups, work_without
from fewbit.pruning.slicing import without

MULTIPLE = 8  # of channels that kernels compute at once; the next one less saves nothing
_WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.125)
_TRIES = 8
_CLOSE = 0.05  # of the budget: a model that is faster than it by less is good enough
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}

Layers = dict[str, tuple[GraphModule, tuple[Tensor, ...]]]  # each by its node's name, alone, with its inputs


def seconds_of(latency: str | float | None) -> float | None:
    """Seconds of a text such as "3 ms", "250 us" or "0.1 s"; a number is seconds already. RecipeError for others."""
    if not isinstance(latency, str):
        return latency
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*([a-zµ]+)\s*", latency)
    try:
        return float(found[1]) * _UNITS[found[2]]  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise RecipeError(
            f'latency={latency!r}: expected a number and a unit, such as "3 ms", "250 us" or "0.1 s"'
        ) from None


class LatencyBudget:
    """Chooses channels until the model that is left is as fast as asked.

    ``whole``: seconds of the model on ``inputs``, against which every choice is timed in turn, so that a machine that
    is slower for a while slows both.
    """

    def __init__(self, c: Coupling, inputs: tuple[Tensor, ...], bounds: Bounds, progress: bool) -> None:
        self.inputs, self.progress = inputs, progress
        self.model = without(c, set(), inputs)  # a copy with the sizes on these inputs
        self.whole = stopwatch.timed({"whole": (self.model, inputs)}, rounds=21)["whole"].median_ms / 1e3
        self.latency = self.whole  # of what was chosen last
        self.table = _measured(c, inputs, bounds, progress)

    def choose(
        self,
        c: Coupling,
        groups: Sequence[Group],
        scores: Mapping[int, Tensor],
        budget: float,
        scope: Scope,
        bounds: Bounds,
        comparable: bool,
    ) -> set[int]:
        """The labels that leave, so that the model without them takes at most ``budget`` seconds.

        Raises RecipeError where even the smallest model takes longer.
        """

        def cost(gone: set[int]) -> float:
            return sum(self._time(node.name, macs) for node, macs in work_without(c, gone).items())

        best = smallest(groups, scores, bounds)
        fits, exceeds = (cost(best), self.seconds(c, best)), (cost(set()), self.seconds(c, set()))
        if fits[1] > budget:
            raise RecipeError(
                f"the budget of {1e3 * budget:.3g} ms is out of reach: with {bounds.least:.0%} of a group's channels "
                f"(in multiples of {bounds.multiple}) the model still takes {1e3 * fits[1]:.3g} ms "
                f"({stopwatch.RUNS_ON}); ask for less, or allow more with least= and multiple="
            )
        self.latency = fits[1]
        for _ in shown(range(_TRIES), _TRIES, "timing what is left", self.progress):
            wanted = _between(fits, exceeds, budget)
            gone = allocate(groups, scores, cost, wanted, scope, bounds, comparable)
            if gone == best:  # channels leave in steps: nothing lies between this and what was wanted
                fits = wanted, fits[1]
                continue
            found = cost(gone), self.seconds(c, gone)
            if found[1] > budget:
                exceeds = found
                continue
            best, fits, self.latency = gone, found, found[1]
            if found[1] >= (1 - _CLOSE) * budget:
                break
        return best

    def seconds(self, c: Coupling, gone: set[int]) -> float:
        """Of one call of the model without these labels."""
        smaller = without(c, gone, self.inputs)
        times = stopwatch.timed(
            {"whole": (self.model, self.inputs), "smaller": (smaller, self.inputs)}, rounds=9
        )
        return self.whole * ratio(times["smaller"], times["whole"]).median

    def report(self) -> Timed:
        """The whole model beside what was chosen last."""
        return Timed(1e3 * self.whole, 1e3 * self.latency, len(self.inputs[0]))

    def _time(self, node: str, macs: int) -> float:
        """Nanoseconds of a layer that has so many multiply-accumulates left, between what was measured."""
        points = self.table.get(node) or self.table[""]
        place = bisect_left(points, (macs, 0.0))
        if place == len(points):
            return points[-1][1] * macs / points[-1][0]
        (low, before), (high, after) = points[place - 1] if place else (0, points[0][1]), points[place]
        return before + (after - before) * (macs - low) / (high - low)


def _between(fits: tuple[float, float], exceeds: tuple[float, float], budget: float) -> float:
    """Which cost to try next: where a line through what fits and what exceeds comes to just below the budget."""
    wanted = (1 - _CLOSE / 2) * budget - fits[1]
    share = wanted / (exceeds[1] - fits[1]) if exceeds[1] > fits[1] else 0.5
    return fits[0] + (exceeds[0] - fits[0]) * min(max(share, 0.1), 0.9)


def _measured(
    c: Coupling, inputs: tuple[Tensor, ...], bounds: Bounds, progress: bool
) -> dict[str, list[tuple[int, float]]]:
    """For each node that multiplies pairs of multiply-accumulates and nanoseconds, from narrow to wide, never falling.

    Under "" is what nodes get that cannot be run alone: the usual nanoseconds of a multiply-accumulate.
    """
    widths: list[tuple[dict[str, int], Layers]] = []
    for share in _WIDTHS:
        gone = _narrow(c, share, bounds)
        macs = {node.name: count for node, count in work_without(c, gone).items()}
        if macs not in [known for known, _ in widths]:
            widths.append((macs, _alone(without(c, gone, inputs), inputs, list(macs))))
    keys: dict[str, Any] = {}
    distinct: dict[Any, dict[int, tuple[GraphModule, tuple[Tensor, ...]]]] = {}
    for name in widths[0][0]:
        variants = {macs[name]: layers[name] for macs, layers in widths if name in layers}
        keys[name] = tuple((macs, _signature(*each)) for macs, each in variants.items())
        distinct[keys[name]] = variants
    runs = {(key, macs): each for key, variants in distinct.items() for macs, each in variants.items()}
    times = stopwatch.timed(runs, rounds=5, skip=True, progress=partial(_bar, shows=progress))
    points: dict[Any, list[tuple[int, float]]] = {}
    for (key, count), time in times.items():
        points.setdefault(key, []).append((count, 1e6 * time.median_ms))
    table = {name: _rising(points[key]) for name, key in keys.items() if key in points}
    usual = median([found[-1][1] / found[-1][0] for found in table.values()] or [1.0])
    return table | {"": [(1, usual)]}


def _bar(rounds: Iterable[int], count: int, shows: bool) -> Iterable[int]:
    return shown(rounds, count, "timing layers", shows)


def _rising(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """In order of work, with times that never fall: where a wider layer seems faster, that is noise."""
    found: list[tuple[int, float]] = []
    for macs, time in sorted(points):
        found.append((macs, max(time, found[-1][1] if found else 0.0)))
    return found


def _narrow(c: Coupling, share: float, bounds: Bounds) -> set[int]:
    """What leaves when every group keeps this share."""
    gone: set[int] = set()
    for group in find_groups(c):
        if group.reason is None:
            kept = Bounds(0.0, bounds.multiple).kept(group, math.ceil(share * len(group)))
            gone.update(group.labels[kept:])
    return gone


class _Recorder(fx.Interpreter):
    """Keeps what some nodes read."""

    def __init__(self, gm: GraphModule, names: Sequence[str]) -> None:
        super().__init__(gm)
        self.nodes = [node for node in gm.graph.nodes if node.name in names]
        self.found: dict[fx.Node, Tensor] = {}
        self.wanted = {source for node in self.nodes for source in node.all_input_nodes}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted and isinstance(result, Tensor):
            self.found[n] = result.detach().clone()
        return result


def _alone(gm: GraphModule, inputs: tuple[Tensor, ...], names: Sequence[str]) -> Layers:
    """Some nodes, each as a graph of its own on what it reads there."""
    recorder = _Recorder(gm, names)
    with torch.no_grad(), in_eval_mode(gm):
        recorder.run(*inputs)
    found: Layers = {}
    for node in recorder.nodes:
        sources = [each for each in node.all_input_nodes if each.op != "get_attr"]
        if all(source in recorder.found for source in sources):
            found[node.name] = _one(gm, node, sources), tuple(recorder.found[each] for each in sources)
    for each, values in found.values():
        refresh(each, values)
    return found


def _one(gm: GraphModule, node: fx.Node, sources: Sequence[fx.Node]) -> GraphModule:
    graph, twins = fx.Graph(), {}
    for source in sources:
        twins[source] = graph.placeholder(source.name)
    for source in node.all_input_nodes:
        if source not in twins:
            twins[source] = graph.node_copy(source)
    result = graph.node_copy(node, twins.__getitem__)
    part = next((user for user in node.users if "getitem" in getattr(user.target, "__name__", "")), None)
    if part is not None and "shape" not in node.meta:  # a recurrent layer gives its states as well
        result = graph.node_copy(part, lambda _: result)
    graph.output(result)
    return GraphModule(gm, graph)


def _signature(gm: GraphModule, inputs: tuple[Tensor, ...]) -> Any:
    """What two nodes that take the same time have in common."""
    calls = [
        repr(module_of(node, gm))
        if node.op == "call_module"
        else f"{node.target} {fx.map_arg(node.args, lambda _: None)}"
        for node in gm.graph.nodes
        if node.op.startswith("call")
    ]
    return tuple(calls), tuple((tuple(x.shape), x.dtype) for x in inputs)
