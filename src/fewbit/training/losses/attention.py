"""Where the teacher looks: Zagoruyko & Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928)."""

import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.errors import RecipeError


class Loss(nn.Module):
    """Squared differences of normalised attention maps: sums of squares over channels. Features are [n, c, ...]."""

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        super().__init__()
        if student[2:] != teacher[2:] or len(student) < 3:
            raise RecipeError(
                f"attention transfer compares maps of one size: the student's features are {student}, the teacher's "
                f"{teacher}; choose layers of the same height and width, or the loss 'hint'"
            )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        found, wanted = (F.normalize(x.float().square().mean(1).flatten(1)) for x in (student, teacher))
        return (found - wanted).square().sum(1).mean()
