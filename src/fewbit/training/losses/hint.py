"""Features themselves: Romero et al., "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation 3.

Where student and teacher have different numbers of channels, a 1x1 convolution learns to translate. With features of
every block this is block-wise distillation (arXiv 1911.12491).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.errors import RecipeError


class Loss(nn.Module):
    """Squared error of features, relative to the teacher's power. Features are [n, c, ...]."""

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        super().__init__()
        if student[2:] != teacher[2:] or len(student) != len(teacher):
            raise RecipeError(
                f"hints compare features of one size: the student's are {student}, the teacher's {teacher}; "
                "choose layers whose sizes beyond the channels agree"
            )
        same = student[1:2] == teacher[1:2]
        self.translate = nn.Identity() if same else nn.Linear(student[1], teacher[1])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if not isinstance(self.translate, nn.Identity):
            student = self.translate(student.movedim(1, -1)).movedim(-1, 1)
        teacher = teacher.float()
        return F.mse_loss(student.float(), teacher) / teacher.square().mean().clamp(min=1e-12)
