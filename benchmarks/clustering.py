"""Bar 4 of few-bit formats: k-means of ten million weights into 16 levels, beside scikit-learn and the optimum."""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import table
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from fewbit.numerics.clustering import cluster, nearest_value

LEVELS = 16
GRID = 4000  # cells of the histogram on which the optimum is found


def weights(kind: str, count: int) -> np.ndarray:
    """Numbers as weights are distributed: the seed is fixed."""
    generator = np.random.default_rng(0)
    return getattr(generator, kind)(size=count).astype(np.float32)


def ours(x: np.ndarray) -> np.ndarray:
    """Codes and values by fewbit, zero among the values; gives the values."""
    rows = torch.from_numpy(x).unsqueeze(0)
    values = cluster(rows, LEVELS)
    nearest_value(rows, values)
    return values[0].numpy()


def ours_free(x: np.ndarray) -> np.ndarray:
    """As above, but zero need not be among the values: the task that scikit-learn is given."""
    rows = torch.from_numpy(x).unsqueeze(0)
    values = cluster(rows, LEVELS, zero=False)
    nearest_value(rows, values)
    return values[0].numpy()


def scikit_learn(x: np.ndarray) -> np.ndarray:
    """The same by scikit-learn with its defaults: k-means++ once, at most 300 iterations, tolerance 0.0001."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = KMeans(LEVELS, random_state=0).fit(x.reshape(-1, 1))
    return np.sort(model.cluster_centers_[:, 0])


def distortion(x: np.ndarray, values: np.ndarray) -> float:
    """Mean squared error of coding each number by its nearest value."""
    ends = (values[1:] + values[:-1]) / 2
    total = 0.0
    for part in np.array_split(x, max(1, len(x) // 2**20)):
        wide = part.astype(np.float64)
        total += float(np.square(wide - values[np.searchsorted(ends, wide)]).sum())
    return total / len(x)


def optimum(x: np.ndarray) -> tuple[float, float]:
    """The least mean squared error with zero among the values, and without: dynamic programming over a histogram.

    What is in a cell is known exactly, so these are errors of actual codings, whose cells end where histogram cells
    end: above the true optimum, but with cells this fine by less than a ten-thousandth.
    """
    spread = np.linspace(-1, 1, GRID + 1)
    edges = np.abs(x).max() * spread * np.abs(spread)  # finer towards zero
    cell = np.searchsorted(edges, x, side="right").clip(1, GRID) - 1
    wide = x.astype(np.float64)
    sums = [np.bincount(cell, w, GRID) for w in (None, wide, wide * wide)]
    filled = sums[0] > 0
    count, first, second = (torch.from_numpy(np.concatenate(([0.0], np.cumsum(s[filled])))) for s in sums)

    def between(of: Tensor) -> Tensor:
        return of.unsqueeze(1) - of  # at [end, begin]

    cost = between(second) - between(first).square_() / between(count)
    cost = torch.where(torch.ones_like(cost).tril(-1) > 0, cost, torch.inf)
    plain = torch.full_like(count, torch.inf)
    plain[0] = 0
    with_zero = torch.full_like(plain, torch.inf)
    for _ in range(LEVELS):
        # A run coded as zero costs its sum of squares, which adds up: its best begin is a running minimum.
        closed = torch.cummin(plain - second, 0).values + second
        with_zero = torch.minimum((with_zero + cost).amin(dim=1), closed)
        plain = (plain + cost).amin(dim=1)
    return float(with_zero[-1]) / len(x), float(plain[-1]) / len(x)


def timed(what: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    values = what(x)
    return time.perf_counter() - start, values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="for both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        return compare(args.count, args.rounds, args.threads)


def compare(count: int, rounds: int, threads: int) -> int:
    """Prints a table and bars for each distribution; 1 where a bar is missed."""
    bars = []
    for kind in ("normal", "laplace"):
        x = weights(kind, count)
        routes = {"fewbit": ours, "fewbit, zero not kept": ours_free, "scikit-learn KMeans": scikit_learn}
        runs: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in routes}
        for _ in range(rounds):
            for name, route in routes.items():
                runs[name].append(timed(route, x))
        with_zero, free = optimum(x)
        print(
            f"\n{count:,} numbers ({kind}) into {LEVELS} levels; rounds: {rounds}, interleaved; threads: {threads}"
        )
        print(f"{'route':24}{'seconds':>10}{'squared error':>16}{'over the optimum':>18}")
        seconds, excess = {}, {}
        for name, found in runs.items():
            seconds[name] = median(each for each, _ in found)
            error, best = distortion(x, found[0][1]), with_zero if name == "fewbit" else free
            excess[name] = error / best - 1
            print(f"{name:24}{seconds[name]:10.2f}{error:16.8f}{excess[name]:18.4%}")
        print(f"{'optimum with zero':24}{'':10}{with_zero:16.8f}\n{'optimum':24}{'':10}{free:16.8f}")
        for name in ("fewbit", "fewbit, zero not kept"):
            text = f"{name}, {kind}: within 0.1 % of the optimum"
            bars.append(table.bar(text, excess[name] <= 0.001, f"{excess[name]:.4%}"))
        ratio = seconds["scikit-learn KMeans"] / seconds["fewbit"]
        bars.append(table.bar(f"{kind}: at least 20 times as fast", ratio >= 20, f"{ratio:.1f} times"))
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
