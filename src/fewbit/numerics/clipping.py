"""The search for clipping bounds that minimise a loss, from coarse to fine, for all blocks at once."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Loss of candidate ranges lo, hi, both float64 [C, K]: float64 [C, K]."""

_SHRINK_ONE = 0.85  # ratio of neighbouring coarse candidates where one bound moves,
_STEPS_ONE = 48  # down to 0.0005 of the range
_SHRINK_TWO = 0.62  # and where two bounds move
_STEPS_TWO = 16
_STEPS_AT_ONCE = 4
_ROUNDS = 4


def search_clipping(
    loss: Loss, lo: Tensor, hi: Tensor, symmetric: bool, hopeless: float = torch.inf, rounds: int = _ROUNDS
) -> tuple[Tensor, Tensor]:
    """The bounds within lo..hi that give each block its least loss; of equal losses, the widest range wins.

    Candidates are the extremes times a fraction: first fractions from 1 down to 0.0005 in geometric steps,
    then finer and finer steps about the best. A symmetric range has one fraction, as has a range on one side
    of zero.

    Args:
        loss: the loss of candidate ranges.
        lo, hi: float32 [C], extremes, with lo <= 0 <= hi.
        symmetric: whether only max(|lo|, |hi|) matters.
        hopeless: where all blocks lose so many times their least loss, still narrower ranges are not tried.
        rounds: of refinement, each 3 times finer.

    Returns:
        lo, hi: float64 [C].
    """
    lo, hi = lo.to(torch.float64), hi.to(torch.float64)
    # A symmetric range is still cut to what was seen: unsigned formats must see that nothing is below zero.
    least_lo, most_hi = lo, hi
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi

    def bounds(fractions: Tensor) -> tuple[Tensor, Tensor]:
        low, high = lo.unsqueeze(1) * fractions[..., 0], hi.unsqueeze(1) * fractions[..., 1]
        return torch.maximum(low, least_lo.unsqueeze(1)), torch.minimum(high, most_hi.unsqueeze(1))

    single = symmetric or bool((lo == 0).all()) or bool((hi == 0).all())
    shrink, steps = (_SHRINK_ONE, _STEPS_ONE) if single else (_SHRINK_TWO, _STEPS_TWO)
    grid = shrink ** torch.arange(steps, dtype=torch.float64, device=lo.device)
    # With one bound to move, the best so far need not be tried again.
    steps_about = [2.0, 1.0, -1.0, -2.0] if single else [2.0, 1.0, 0.0, -1.0, -2.0]
    fine = torch.tensor(steps_about, dtype=torch.float64, device=lo.device)
    best = torch.ones(lo.numel(), 2, dtype=torch.float64, device=lo.device)
    least = torch.full_like(lo, torch.inf)
    for turn in range(rounds + 1):
        spread = grid if turn == 0 else shrink ** (-fine / 3.0**turn)
        factors = torch.stack((spread, spread), 1) if single else torch.cartesian_prod(spread, spread)
        # The grid is tried from wide to narrow, until it is hopeless for all blocks.
        centre = best
        for part in factors.split(_STEPS_AT_ONCE if single else len(factors)):
            fractions = (centre.unsqueeze(1) * part).clamp(max=1.0)
            losses = loss(*bounds(fractions))
            value, index = losses.min(dim=1)
            better = value < least
            chosen = fractions[torch.arange(lo.numel(), device=lo.device), index]
            best = torch.where(better.unsqueeze(1), chosen, best)
            least = torch.where(better, value, least)
            if bool((losses[:, -1] > hopeless * least).all()):
                break
    low, high = bounds(best.unsqueeze(1))
    return low.squeeze(1), high.squeeze(1)
