"""Where zeros may lie among a weight's numbers: anywhere, N of every M inputs left, or in blocks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import RecipeError

STRUCTURES = ("channels", "unstructured", "2:4", "4:8", "block")
_N_M = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """What is kept or set to zero together.

    Attributes:
        structure: "unstructured", "block" or "N:M", of which a weight keeps N of every M inputs in a row.
        block: outputs and inputs of a block.
    """

    structure: str
    block: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        if self.structure in ("unstructured", "block"):
            block = self.block
            if (
                not isinstance(block, tuple | list)
                or len(block) != 2
                or not all(type(n) is int and n > 0 for n in block)
            ):
                raise RecipeError(f"block={self.block!r}: expected how many outputs and inputs make a block")
            return
        found = _N_M.fullmatch(self.structure)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise RecipeError(
                f"structure={self.structure!r:.40}: expected one of {', '.join(STRUCTURES)}, or another N:M"
            )

    @property
    def ratio(self) -> tuple[int, int] | None:
        """N and M of "N:M"; None for what has no such ratio."""
        found = _N_M.fullmatch(self.structure)
        return None if found is None else (int(found[1]), int(found[2]))

    def obstacle(self, weight: Tensor) -> str | None:
        """Why a weight [outputs, inputs, ...] has no such zeros; None where it can have them."""
        outputs, inputs = weight.shape[:2]
        if self.ratio is not None and inputs % self.ratio[1]:
            return f"{inputs} inputs are no multiple of {self.ratio[1]}"
        if self.structure == "block" and (outputs % self.block[0] or inputs % self.block[1]):
            return f"{outputs} x {inputs} are no multiple of {self.block[0]} x {self.block[1]}"
        return None

    def units(self, scores: Tensor) -> Tensor:
        """Scores of what leaves together, float64 [units], from those of the numbers [outputs, inputs, ...]: means."""
        if self.structure != "block":
            return scores.reshape(-1)
        return _blocks(scores, self.block).mean(-1).reshape(-1)

    def mask(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """Bool in a weight's shape, from which units are kept: bool [units]."""
        if self.structure != "block":
            return kept.reshape(shape)
        a, b = self.block
        rest = shape[2:]
        grid = kept.reshape(shape[0] // a, shape[1] // b, *rest)
        return grid.repeat_interleave(a, 0).repeat_interleave(b, 1)

    def strongest(self, scores: Tensor) -> Tensor:
        """Bool in the scores' shape: the N of every M inputs with the highest scores."""
        assert self.ratio is not None
        n, m = self.ratio
        groups = scores.movedim(1, -1)
        groups = groups.reshape(*groups.shape[:-1], -1, m)
        best = groups.topk(n, dim=-1).indices
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
        return kept.flatten(-2).movedim(-1, 1)


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[outputs, inputs, ...] as [outputs / a, inputs / b, ..., a * b]."""
    a, b = block
    x = x.reshape(x.shape[0] // a, a, x.shape[1] // b, b, *x.shape[2:])
    return x.movedim(1, -1).movedim(2, -1).flatten(-2)


def thresholded(scores: list[Tensor], share: float, together: bool) -> list[Tensor]:
    """Which units stay so that ``share`` of all leave: the lowest of all together, or of each tensor.

    ``scores``: float64 [units] each; those that are infinite stay, and so does one of each tensor, or of all together.
    Gives bool [units] each; ties are decided by position.
    """
    if not together:
        return [_highest(each, round(share * len(each))) for each in scores]
    kept = _highest(torch.cat(scores), round(share * sum(map(len, scores))))
    return list(kept.split([len(each) for each in scores]))


def _highest(scores: Tensor, leave: int) -> Tensor:
    kept = torch.ones(len(scores), dtype=torch.bool)
    leave = min(leave, len(scores) - max(int(torch.isposinf(scores).sum()), 1))
    kept[scores.argsort(stable=True)[:leave]] = False
    return kept


def reached(start: float, end: float, step: int, steps: int, schedule: str) -> float:
    """The share of zeros after so many of all steps.

    "cubic": fast at first, slow at the end (Zhu and Gupta, arXiv 1710.01878); "linear"; "geometric": each step takes
    the same share of what is left (Frankle and Carbin, arXiv 1803.03635). Raises RecipeError for another name.
    """
    done = step / steps
    if schedule == "cubic":
        return end + (start - end) * (1 - done) ** 3
    if schedule == "linear":
        return start + (end - start) * done
    if schedule == "geometric":
        return 1 - (1 - start) * math.pow((1 - end) / (1 - start), done) if end < 1 else end
    raise RecipeError(f"schedule={schedule!r:.40}: expected cubic, linear or geometric")
