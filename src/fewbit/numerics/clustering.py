"""One-dimensional k-means with one centre at zero, for many rows at once: near the optimum, and fast on long rows.

The start is the optimum for numbers gathered in fine bins, found by dynamic programming (Wang and Song,
"Ckmeans.1d.dp", The R Journal 3/2, 2011, after Fisher 1958); Lloyd's iterations on the numbers themselves follow.
Rows are sorted once, or where they are long gathered in a very fine histogram, and their sums cumulated, so that an
iteration looks up the cells' ends and touches nothing else.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbit.numerics.format import SMALLEST_SCALE

_ITERATIONS = 300
_SETTLED = 1e-7  # relative gain of an iteration that ends the search
_WORK = 3e9  # candidates that dynamic programming may look at, over all rows
_BINS = 192  # on each side of zero at most, or
_BINS_PER_LEVEL = 12  # for each value; more gain little, since Lloyd's iterations follow
_MOST_BINS = 1024
_CELLS = 2**18  # numbers in a table of costs at a time
_LONG = 2**18  # numbers in a row from which on it is gathered in a histogram instead of sorted
_FINE = 2**15  # its cells on each side of zero
_FEW = 32
_PER_BIN = 4  # numbers in a bin where a density is estimated
_FEWEST_PER_LEVEL = 2  # with fewer bins for each level, the bins' ends would decide


@dataclass(frozen=True)
class _Sorted:
    """Rows in ascending order with cumulated sums: of weights, weight * x and weight * x**2, float64 [C, n + 1]."""

    x: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor

    def of(self, rows: Tensor | slice) -> "_Sorted":
        """Some of the rows."""
        return _Sorted(self.x[rows], self.weight[rows], self.first[rows], self.second[rows])


def cluster(rows: Tensor, levels: int, weights: Tensor | None = None, zero: bool = True) -> Tensor:
    """The values that code each row with the least weighted sum of squared errors; one of them is exactly zero.

    Args:
        rows: float32 [C, n], finite.
        levels: how many values, at least 2.
        weights: float [C, n], not negative: how much each number counts; by default all count the same.
        zero: whether zero must be among the values; if not, the best values with zero are only where the search begins.

    Returns:
        float64 [C, levels], ascending. A row with fewer distinct numbers than levels repeats values.
    """
    data = _gathered(rows, weights) if rows.shape[1] > _LONG else _sorted(rows, weights)
    return _lloyd(data, _start(data, levels), zero)


def nearest_value(rows: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of its row's values: uint8 [C, n]; of two equally near, the lower.

    Args:
        rows: float32 [C, n].
        values: float [C, levels], or [1, levels] for all rows; ascending, at most 256.
    """
    middles = ((values[:, 1:].double() + values[:, :-1].double()) / 2).to(rows.dtype)
    if values.shape[1] > _FEW:
        table = middles.contiguous() if len(middles) == len(rows) else middles[0]
        return torch.searchsorted(table, rows.contiguous()).to(torch.uint8)
    index = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
    step = max(1, _CELLS // max(len(rows), 1))
    for part, out in zip(rows.split(step, dim=1), index.split(step, dim=1), strict=True):
        # Counting the middles below a number is three times as fast as searching: it takes vector instructions.
        for middle in middles.unsqueeze(2).unbind(dim=1):
            out += part > middle
    return index


def _gathered(rows: Tensor, weights: Tensor | None) -> _Sorted:
    """Rows as one number, the middle, for each cell of a histogram with cells so fine that nothing else is lost.

    A cell's width is at most the square root of its place times the largest number, over a hundred thousand.
    """
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_SCALE)
    weight = torch.zeros(len(rows), 2 * _FINE, dtype=torch.float64, device=rows.device)
    for row, all_ones, top, total in zip(
        rows, rows if weights is None else weights, largest, weight, strict=True
    ):
        for part, count in zip(row.split(_CELLS), all_ones.split(_CELLS), strict=True):
            place = (part.abs() / top).sqrt_().mul_(_FINE).clamp_(max=_FINE - 1).to(torch.int64)
            place = torch.where(part < 0, _FINE - 1 - place, _FINE + place)
            total += torch.bincount(place, None if weights is None else count, 2 * _FINE)
    middle = (torch.arange(_FINE, dtype=torch.float64, device=rows.device) + 0.5) / _FINE
    middle = torch.cat((-middle.flip(0), middle))
    x = (middle * middle.abs() * largest).to(torch.float32)
    wide = x.to(torch.float64)
    return _Sorted(x, _cumulated(weight), _cumulated(weight * wide), _cumulated(weight * wide * wide))


def _sorted(rows: Tensor, weights: Tensor | None) -> _Sorted:
    if weights is None:
        # NumPy's sort of float32 uses vector instructions: ten times as fast as torch's on a CPU.
        x = torch.from_numpy(np.sort(rows.detach().cpu().numpy(), axis=1)).to(rows.device)
        count = torch.arange(x.shape[1] + 1, dtype=torch.float64, device=x.device)
        wide = x.to(torch.float64)
        return _Sorted(x, count.expand(x.shape[0], -1), _cumulated(wide), _cumulated(wide.square_()))
    x, order = rows.sort(dim=1)
    weight = weights.to(torch.float64).gather(1, order)
    wide = x.to(torch.float64)
    return _Sorted(x, _cumulated(weight), _cumulated(weight * wide), _cumulated(weight * wide * wide))


def _cumulated(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[1] + 1)
    torch.cumsum(x, dim=1, out=out[:, 1:])
    return out


def _start(data: _Sorted, levels: int) -> Tensor:
    """Values to begin with: float64 [C, levels], ascending, one of them zero."""
    parts, count = [], len(data.x)
    most = min(max(_BINS, _BINS_PER_LEVEL * levels), _MOST_BINS)
    bins = min(int((_WORK / (2 * count * levels)) ** 0.5), most)
    one_side = int(torch.maximum((data.x < 0).sum(dim=1), (data.x > 0).sum(dim=1)).max())
    optimal = bins >= min(one_side, _FEWEST_PER_LEVEL * levels)
    bins = max(min(bins, one_side), 1) if optimal else max(one_side // _PER_BIN, 1)
    step = max(1, _CELLS // (2 * (bins + 1) ** 2)) if optimal else count
    for begin in range(0, count, step):
        part = data.of(slice(begin, begin + step))
        side = _sides(part, bins, by_rank=not optimal)
        found = _optimal(side, levels - 1) if optimal else _by_density(side, levels - 1)
        negative, positive = found.chunk(2)
        either = torch.cat((-negative, positive), dim=1)
        largest = either.gather(1, either.abs().topk(levels - 1, dim=1).indices)
        parts.append(torch.cat((largest, largest.new_zeros(len(largest), 1)), dim=1).sort(dim=1).values)
    return torch.cat(parts)


@dataclass(frozen=True)
class _Sides:
    """The negative numbers of each row, then the positive ones, as magnitudes in bins from the largest down.

    Edges and cumulated sums: float64 [2 * C, bins + 1]. Numbers that are few have a bin each.
    """

    edges: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor


def _sides(data: _Sorted, bins: int, by_rank: bool) -> _Sides:
    """Both sides in bins of equal weight; unless `by_rank`, half of the bins' ends lie ever closer towards zero.

    Equal weights suit densities with narrow humps; narrowing towards zero suits outliers.
    """
    n, zero = data.x.shape[1], data.x.new_zeros(len(data.x), 1)
    below = torch.searchsorted(data.x, zero)
    above = n - torch.searchsorted(data.x, zero, right=True)
    ranks = bins if by_rank else bins // 2
    shares = torch.arange(1, ranks + 1, dtype=torch.float64, device=data.x.device) / max(ranks, 1)
    steps = torch.arange(bins - ranks + 1, dtype=data.x.dtype, device=data.x.device) / max(bins - ranks, 1)
    shrink = (1 - steps) ** 2
    far = torch.searchsorted(data.x, data.x[:, :1] * shrink).minimum(below)
    weight = data.weight.contiguous()  # rows that count their numbers share one memory
    mass = weight.gather(1, below) * shares
    low = torch.cat((torch.searchsorted(weight, mass).minimum(below), far), dim=1).sort(dim=1).values
    far = torch.searchsorted(data.x, data.x[:, -1:] * shrink, right=True).maximum(n - above)
    mass = weight[:, -1:] * (1 - shares) + weight.gather(1, n - above) * shares
    near = torch.searchsorted(weight, mass, right=True) - 1
    high = torch.cat((near.maximum(n - above), far), dim=1).sort(dim=1, descending=True).values
    each = torch.arange(bins + 1, device=data.x.device)
    low = torch.where(below <= bins, torch.minimum(each, below), low)
    high = torch.where(above <= bins, n - torch.minimum(each, above), high)
    low[:, 0], low[:, -1:], high[:, 0], high[:, -1:] = 0, below, n, n - above
    edges = torch.cat((-data.x.gather(1, low.clamp(max=n - 1)), data.x.gather(1, (high - 1).clamp(min=0))))

    def sums(cumulated: Tensor, sign: float) -> Tensor:
        return torch.cat((sign * cumulated.gather(1, low), cumulated[:, -1:] - cumulated.gather(1, high)))

    return _Sides(
        edges.double().clamp(min=0), sums(data.weight, 1), sums(data.first, -1), sums(data.second, 1)
    )


def _optimal(side: _Sides, most: int) -> Tensor:
    """The best values of both sides, `most` on a row's two sides together: float64 [2 * C, most], unused ones zero."""
    weight, first, second = side.weight, side.first, side.second
    between = weight.unsqueeze(2) - weight.unsqueeze(1)  # [.., j, i]: of the bins i to j
    cost = (first.unsqueeze(2) - first.unsqueeze(1)).square_().div_(between.clamp(min=1e-300))
    cost = (second.unsqueeze(2) - second.unsqueeze(1)).sub_(cost).clamp_(min=0)
    cost = (cost / second[:, -1:].clamp(min=1e-300).unsqueeze(2)).to(torch.float32)
    cost += torch.full(cost.shape[1:], torch.inf, device=cost.device).triu(1)
    rest = second[:, -1:] - second  # what it costs to code the bins from j on as zero
    least = [torch.full_like(rest, torch.inf, dtype=torch.float32)]
    least[0][:, 0] = 0  # no bins, no values
    sums = torch.empty_like(
        cost
    )  # one for all: for fresh memory, page faults take longer than the arithmetic
    for _ in range(most):
        least.append(torch.add(least[-1].unsqueeze(1), cost, out=sums).amin(dim=2))
    losses = torch.stack([(each * second[:, -1:] + rest).amin(dim=1) for each in least], dim=1)
    return _traced(side, cost, least, rest, _shares(losses))


def _shares(losses: Tensor) -> Tensor:
    """How many values each side gets, from its losses with 0, 1, 2 ... [2 * C, most + 1]: int64 [2 * C]."""
    low, high = losses.chunk(2)
    share = (low + high.flip(1)).argmin(dim=1)
    return torch.cat((share, losses.shape[1] - 1 - share))


def _traced(side: _Sides, cost: Tensor, least: list[Tensor], rest: Tensor, share: Tensor) -> Tensor:
    """The means of the cells that led to the best end: float64 [2 * C, values].

    Only the least costs were kept, not where they came from: that is looked up again for the few cells that count.
    """
    row = torch.arange(len(share), device=share.device)
    last = torch.stack(least, dim=1)[row, share] * side.second[:, -1:] + rest
    end, means = last.argmin(dim=1), []
    for value in range(len(least) - 1, 0, -1):
        begin = (least[value - 1] + cost[row, end]).argmin(dim=1)
        begin = torch.where(share >= value, begin, end)
        weight = side.weight[row, end] - side.weight[row, begin]
        first = side.first[row, end] - side.first[row, begin]
        means.append(torch.where(weight > 0, first / weight, 0.0))
        end = begin
    return torch.stack(means, dim=1)


def _by_density(side: _Sides, most: int) -> Tensor:
    """Values as dense as the cube root of the numbers' density: best for many values (Panter and Dite 1951)."""
    width = -side.edges.diff(dim=1)
    dense = _cumulated((side.weight.diff(dim=1) * width.square()).pow(1 / 3))
    low, high = dense[:, -1].chunk(2)
    share = torch.round(most * low / (low + high).clamp(min=1e-300)).clamp(0, most)
    share = torch.cat((share, most - share)).unsqueeze(1)
    order = torch.arange(most, device=dense.device).expand(len(dense), -1)
    target = (order + 0.5) / share.clamp(min=1) * dense[:, -1:]
    place = (torch.searchsorted(dense, target) - 1).clamp(0, width.shape[1] - 1)
    middle = side.edges.gather(1, place) - width.gather(1, place) / 2
    return torch.where(order < share, middle, 0.0)


def _lloyd(data: _Sorted, values: Tensor, zero: bool) -> Tensor:
    """Moves values to the means of their cells until nothing is gained; values of empty cells stay, and zero may."""
    best, rows = values.clone(), torch.arange(len(values), device=values.device)
    least = data.second.new_full((len(values),), torch.inf)
    for _ in range(_ITERATIONS):
        ends = _cell_ends(data, values)
        weight, first = data.weight.gather(1, ends).diff(dim=1), data.first.gather(1, ends).diff(dim=1)
        loss = data.second[:, -1] + (weight * values.square() - 2 * values * first).sum(dim=1)
        gains = loss < least * (1 - _SETTLED)
        best[rows[loss < least]] = values[loss < least]
        values = torch.where(((values != 0) | (not zero)) & (weight > 0), first / weight, values)
        least = torch.minimum(loss, least)
        going = int(gains.sum())
        if going == 0:
            break
        if going < len(rows) / 2:  # leave the settled rows behind
            rows, values, least, data = rows[gains], values[gains], least[gains], data.of(gains)
    return best


def _cell_ends(data: _Sorted, values: Tensor) -> Tensor:
    """Where each value's cell begins and the last one ends, as indices of cumulated sums: int64 [C, levels + 1]."""
    middles = ((values[:, 1:] + values[:, :-1]) / 2).to(torch.float32)
    inner = torch.searchsorted(data.x, middles.contiguous(), right=True)
    zeros = inner.new_zeros(len(values), 1)
    return torch.cat((zeros, inner, zeros + data.x.shape[1]), dim=1)
