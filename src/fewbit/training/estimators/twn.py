"""Three values by a threshold: Li et al., "Ternary Weight Networks" (TWN, arXiv 1605.04711), equations 5 and 6."""

import torch
from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.training.estimators import WeightEstimator

_THRESHOLD = 0.7  # of the mean of |w|


class Weights(WeightEstimator):
    """Ternary: weights within 0.7 mean |w| are zero, the others signs times their mean magnitude; straight through."""

    @classmethod
    def accepts(cls, spec: Format) -> bool:
        return spec.name == "ternary"

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        size = rows.detach().abs()
        large = size > _THRESHOLD * size.mean(1, keepdim=True)
        mean = (rows.abs() * large).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp(min=1)
        scale = self.limited(mean, rows)
        v = rows / scale.detach()
        signs = torch.sign(rows.detach()) * large
        return v + (signs - v).detach(), scale
