"""Latency of several candidates, timed in turn: medians, quartiles and paired ratios on a noisy machine."""

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fewbit.errors import FewbitError

Name = TypeVar("Name", bound=Hashable)

_SLOT = 0.02  # seconds: calls are repeated within a round until a slot is at least this long
_MAX_CALLS = 200


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median and quartiles over `n` rounds, of which `rounds` has each median."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    n: int
    rounds: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Median, quartiles and number of rounds."""
        return {"median_ms": self.median_ms, "q1_ms": self.q1_ms, "q3_ms": self.q3_ms, "n": self.n}

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.q1_ms:.3g} to {self.q3_ms:.3g}, {self.n} rounds)"


@dataclass(frozen=True)
class Ratio:
    """How many times longer one candidate took than another: median and quartiles over rounds."""

    median: float
    q1: float
    q3: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self).copy()

    def __str__(self) -> str:
        return f"{self.median:.2f} x ({self.q1:.2f} to {self.q3:.2f})"


def latency(
    candidates: Mapping[Name, Callable[[], object]],
    *,
    repeat: int = 30,
    warmup: int = 3,
    seconds: float | None = None,
    pause: float = 0.05,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[Iterable[int], int], Iterable[int]] | None = None,
) -> dict[Name, Latency]:
    """Time functions of no arguments against each other.

    Each of `repeat` rounds visits all candidates in a new random order. Before each visit comes a pause of
    `pause` seconds, since a runtime's worker threads spin for tens of milliseconds after their work and
    would steal from the next candidate, and one call that is not counted, since the pause let caches go
    cold. What is counted is the median call of a visit; what is given is the median and the quartiles of
    those over the rounds.

    seconds: stop after the round in which this time is over, but not before 3 rounds (warm-up is not
    counted). warmup: calls of each candidate before the first round. progress: wraps the rounds to show
    progress, called with them and their number.

    Raises FewbitError where there is nothing to time or a count makes no sense; what a candidate raises
    goes through.
    """
    if not candidates:
        raise FewbitError("there is nothing to time: give at least one candidate")
    if repeat < 1 or warmup < 1:
        raise FewbitError(
            f"latency needs at least one round and one warm-up call, found {repeat} and {warmup}"
        )
    calls = {name: _calls_per_round(run, warmup, clock) for name, run in candidates.items()}
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    rounds: dict[Name, list[float]] = {name: [] for name in candidates}
    start = clock()
    for done in progress(range(repeat), repeat) if progress else range(repeat):
        if seconds is not None and done >= 3 and clock() - start >= seconds:
            break
        shuffle(order)
        for name in order:
            sleep(pause)
            candidates[name]()
            rounds[name].append(1000.0 * _median_call(candidates[name], calls[name], clock))
    return {name: _summary(rounds[name]) for name in candidates}


def ratio(candidate: Latency, reference: Latency) -> Ratio:
    """How many times as long as `reference` the candidate took, by round: disturbances of a round cancel.

    Both must come from one call of `latency`; raises FewbitError otherwise.
    """
    if len(candidate.rounds) != len(reference.rounds) or not candidate.rounds:
        raise FewbitError(
            f"latencies of {len(candidate.rounds)} and {len(reference.rounds)} rounds cannot be paired: "
            "time both candidates in one call"
        )
    pairs = zip(candidate.rounds, reference.rounds, strict=True)
    # A clock too coarse for the reference gives 0: the ratio is then unbounded, not an error.
    ratios = sorted(a / b if b > 0 else math.inf for a, b in pairs)
    q1, median, q3 = _quartiles(ratios)
    return Ratio(median, q1, q3, len(ratios))


def _calls_per_round(run: Callable[[], object], warmup: int, clock: Callable[[], float]) -> int:
    fastest = math.inf
    for _ in range(warmup):
        begin = clock()
        run()
        fastest = min(fastest, clock() - begin)
    return _MAX_CALLS if fastest <= _SLOT / _MAX_CALLS else max(1, math.ceil(_SLOT / fastest))


def _median_call(run: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(calls):
        begin = clock()
        run()
        times.append(clock() - begin)
    return statistics.median(times)


def _summary(rounds: list[float]) -> Latency:
    q1, median, q3 = _quartiles(sorted(rounds))
    return Latency(median, q1, q3, len(rounds), tuple(rounds))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of sorted values, interpolated linearly."""

    def at(fraction: float) -> float:
        position = fraction * (len(values) - 1)
        low = math.floor(position)
        high = math.ceil(position)
        if values[low] == values[high]:  # also where both are infinite
            return values[low]
        return values[low] + (position - low) * (values[high] - values[low])

    return at(0.25), at(0.5), at(0.75)
