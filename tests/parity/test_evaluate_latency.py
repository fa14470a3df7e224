"""Latency on a clock that the test moves: what is counted, in which order, and what the summary says."""

import json
import statistics
from collections.abc import Callable

import numpy as np
import pytest

from fewbit.errors import FewbitError
from fewbit.evaluation.latency import Latency, latency, ratio


class Machine:
    """A fake clock moved by pauses and candidates; the first call after a pause is slow (cold caches)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cold = False
        self.log: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.cold = True
        self.log.append("pause")

    def candidate(self, name: str, times: Callable[[int], float]) -> Callable[[], None]:
        count = 0

        def run() -> None:
            nonlocal count
            self.now += times(count) + (10.0 if self.cold else 0.0)
            self.cold = False
            count += 1
            self.log.append(name)

        return run

    def __call__(self) -> float:
        return self.now


def test_steady_candidates_measure_exactly_and_the_cold_call_is_not_counted() -> None:
    machine = Machine()
    pair = {"a": machine.candidate("a", lambda _: 0.5), "b": machine.candidate("b", lambda _: 0.125)}
    result = latency(pair, repeat=6, warmup=2, clock=machine, sleep=machine.sleep)
    assert result["a"] == Latency(500.0, 500.0, 500.0, 6, (500.0,) * 6)
    assert result["b"] == Latency(125.0, 125.0, 125.0, 6, (125.0,) * 6)
    assert ratio(result["a"], result["b"]).median == 4.0


def test_candidates_take_turns_with_a_pause_before_each_and_in_changing_order() -> None:
    machine = Machine()
    names = ("a", "b", "c")
    latency(
        {name: machine.candidate(name, lambda _: 1.0) for name in names},
        repeat=8,
        warmup=1,
        clock=machine,
        sleep=machine.sleep,
    )
    assert machine.log[:3] == ["a", "b", "c"]  # warm-up
    visits = [machine.log[i : i + 3] for i in range(3, len(machine.log), 3)]
    assert len(visits) == 8 * 3
    assert all(visit[0] == "pause" and visit[1] == visit[2] for visit in visits)
    orders = ["".join(visit[1] for visit in visits[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(set(orders)) > 2


def test_median_and_quartiles_of_rounds_are_numpys() -> None:
    machine = Machine()
    # Call 0 is the warm-up; then each round has an uncounted call and a counted one of 1 s or more.
    times = [1 + ((7 * i) % 11) / 10 for i in range(40)]
    run = machine.candidate("a", lambda i: times[i])
    result = latency({"a": run}, repeat=10, warmup=1, clock=machine, sleep=machine.sleep)["a"]
    counted = [1000 * times[2 + 2 * i] for i in range(10)]
    assert result.rounds == pytest.approx(counted)
    expected = np.quantile(counted, [0.25, 0.5, 0.75])
    assert (result.q1_ms, result.median_ms, result.q3_ms) == pytest.approx(tuple(expected))


def test_short_calls_are_repeated_within_a_round_and_their_median_taken() -> None:
    machine = Machine()
    # 2 ms, with every fourth call disturbed: 10 calls a round, whose median is undisturbed.
    run = machine.candidate("a", lambda i: 0.5 if i % 4 == 3 else 0.002)
    result = latency({"a": run}, repeat=4, warmup=3, clock=machine, sleep=machine.sleep)["a"]
    assert len(machine.log) == 3 + 4 * (1 + 1 + 10)
    assert result.rounds == pytest.approx([2.0] * 4)
    instant = Machine()
    latency({"a": instant.candidate("a", lambda _: 0.0)}, repeat=1, clock=instant, sleep=instant.sleep)
    assert len(instant.log) == 3 + 2 + 200


def test_a_slow_round_hits_both_candidates_and_cancels_in_their_ratio() -> None:
    machine = Machine()

    def drifting(base: float) -> Callable[[int], float]:
        return lambda i: base * (1 + i)  # the machine gets slower and slower

    pair = {"a": machine.candidate("a", drifting(3.0)), "b": machine.candidate("b", drifting(1.0))}
    result = latency(pair, repeat=9, warmup=1, clock=machine, sleep=machine.sleep)
    assert result["a"].q3_ms > 2 * result["a"].q1_ms
    paired = ratio(result["a"], result["b"])
    assert (paired.q1, paired.median, paired.q3, paired.n) == pytest.approx((3.0, 3.0, 3.0, 9))
    assert str(paired) == "3.00 x (3.00 to 3.00)"


def test_time_budget_stops_after_a_round_but_not_before_three() -> None:
    for seconds, rounds in ((0.0, 3), (35.0, 4), (1e9, 20)):
        machine = Machine()
        run = machine.candidate("a", lambda _: 0.5)
        result = latency(
            {"a": run}, repeat=20, warmup=1, seconds=seconds, pause=0.0, clock=machine, sleep=machine.sleep
        )
        assert result["a"].n == rounds, seconds


def test_a_clock_too_coarse_gives_an_unbounded_ratio() -> None:
    a, b = Latency(1, 1, 1, 3, (1.0, 1.0, 1.0)), Latency(0, 0, 0, 3, (0.0, 0.0, 1.0))
    assert ratio(a, b).median == float("inf") and ratio(a, b).q1 == float("inf") and ratio(b, a).median == 0.0


def test_real_clock_sees_the_slower_candidate() -> None:
    def work(n: int) -> Callable[[], object]:
        data = list(range(n))
        return lambda: statistics.fmean(data)

    result = latency({"small": work(200), "large": work(20_000)}, repeat=3, warmup=1, pause=0.0)
    assert result["large"].median_ms > result["small"].median_ms > 0
    assert json.loads(json.dumps(result["small"].to_json()))["n"] == 3
    assert "rounds" in str(result["small"])


def test_what_cannot_be_timed_says_why() -> None:
    with pytest.raises(FewbitError, match="there is nothing to time: give at least one candidate"):
        latency({})
    with pytest.raises(FewbitError, match="at least one round and one warm-up call, found 0 and 3"):
        latency({"a": lambda: None}, repeat=0)
    one, two = Latency(1, 1, 1, 1, (1.0,)), Latency(1, 1, 1, 2, (1.0, 1.0))
    with pytest.raises(FewbitError, match="latencies of 1 and 2 rounds cannot be paired: time both"):
        ratio(one, two)

    def fails() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        latency({"a": fails})
