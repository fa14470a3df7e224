"""Codebook tensors: values fitted to rows of numbers become a float16 table with codes and scales."""

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.numerics.clustering import nearest_value
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, block_count, blocks, unblocks

Fit = Callable[[Tensor, int, Tensor | None], Tensor]
"""Values for rows float32 [C, n], their number, and weights [C, n] or None: float64 [C, levels], one of them zero."""

_ROUNDS = 10  # of fitting scales to a shared table and the table to the scales, in turn


def check_codebook(shape: tuple[int, ...] | torch.Size, scheme: Scheme) -> None:
    """Raises FormatError where a table would have more values than there are numbers that share it."""
    numbers = torch.Size(shape).numel()
    if not shared_table(scheme):
        numbers //= max(block_count(shape, scheme), 1)
    if numbers < 2**scheme.spec.bits:
        coarser = (
            "another format" if shared_table(scheme) else "a coarser granularity, or a '_shared' codebook"
        )
        raise FormatError(
            f"{scheme.format} has tables of {2**scheme.spec.bits} values, and here {numbers} numbers share one: "
            f"use fewer bits, {coarser}"
        )


def shared_table(scheme: Scheme) -> bool:
    """Whether one table serves all blocks of a tensor of this learned format."""
    return scheme.format.endswith("_shared")


def fit_codebook(weight: Tensor, scheme: Scheme, fit: Fit, importance: Tensor | None = None) -> QTensor:
    """A tensor coded by the values that `fit` finds.

    Args:
        weight: float tensor that the scheme fits, finite.
        scheme: of a learned format.
        fit: finds the values of rows.
        importance: float, in the weight's shape: how much each number's squared error counts.

    Raises:
        FormatError: more values than numbers.
    """
    check_codebook(weight.shape, scheme)
    rows = blocks(weight.detach().to(torch.float32), scheme)
    counts = None if importance is None else blocks(importance.reshape(weight.shape), scheme)
    one_each = _table_for_all if shared_table(scheme) else _table_each
    codes, scale, table = one_each(rows, scheme, fit, counts)
    tensor = unblocks(codes, weight.shape, scheme)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return QTensor.from_codes(tensor, scale, zero_point, scheme, table)


def _table_each(
    rows: Tensor, scheme: Scheme, fit: Fit, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    values = fit(rows, 2**scheme.spec.bits, counts)
    scale = scheme.spec.scales(values.abs().amax(dim=1), 1.0)
    table = as_stored(values / scale.double().unsqueeze(1))
    return nearest_value(rows / scale.unsqueeze(1), table), scale, table


def _table_for_all(
    rows: Tensor, scheme: Scheme, fit: Fit, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The better of two starts: blocks of equal root mean square share a table, or blocks of equal maximum."""
    counts = torch.ones_like(rows) if counts is None else counts.to(torch.float32)
    starts = (rows.double().square().mean(dim=1).sqrt(), rows.abs().amax(dim=1).double())
    found = [_in_turn(rows, scheme, fit, counts, scheme.spec.scales(start, 1.0)) for start in starts]
    losses = [
        float(
            (counts * (rows - table[0][codes.int()] * scale.unsqueeze(1)).square_()).sum(dtype=torch.float64)
        )
        for codes, scale, table in found
    ]
    return found[losses.index(min(losses))]


def _in_turn(
    rows: Tensor, scheme: Scheme, fit: Fit, counts: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A shared table for given scales, then scales for the table, and so on: each step lowers the error."""
    levels = 2**scheme.spec.bits
    v = rows / scale.unsqueeze(1)
    table = fit(v.reshape(1, -1), levels, (counts * scale.square().unsqueeze(1)).reshape(1, -1))
    for _ in range(_ROUNDS):
        codes = nearest_value(v, table)
        value = table.to(torch.float32)[0][codes.int()]
        over, under = (counts * rows * value).double().sum(1), (counts * value * value).double().sum(1)
        scale = torch.where((over > 0) & (under > 0), over / under, scale.double()).to(torch.float32)
        mass = (counts * scale.square().unsqueeze(1)).reshape(-1).double()
        v = rows / scale.unsqueeze(1)
        total = torch.bincount(codes.reshape(-1), mass, levels)
        first = torch.bincount(codes.reshape(-1), mass * v.reshape(-1), levels)
        table = torch.where((table != 0) & (total > 0), first / total, table)
    top = table.abs().max()
    top = torch.where(top > 0, top, 1.0)
    scale = scheme.spec.scales(scale.double() * top, 1.0)
    table = as_stored(table / top)
    return nearest_value(rows / scale.unsqueeze(1), table), scale, table


def as_stored(table: Tensor) -> Tensor:
    """The values that a float16 table can hold: float32."""
    return table.to(torch.float16).to(torch.float32) + 0.0  # no minus zero
