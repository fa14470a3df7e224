"""Balanced signs and a gradient that sharpens: Qin et al., "... Information Retention Network" (arXiv 1909.10788).

Weights less their mean are signs times a power of two; the estimator's slope goes from wide to steep with `progress`.
"""

import torch
from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.training.estimators import WeightEstimator
from fewbit.training.estimators._signs import OneBit, decaying, sign


class Weights(WeightEstimator):
    """Binary."""

    @classmethod
    def accepts(cls, spec: Format) -> bool:
        return spec.name == "binary"

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        centred = rows - rows.mean(1, keepdim=True)
        normal = centred / centred.std(1, keepdim=True).clamp(min=1e-12)
        size = torch.exp2(torch.round(torch.log2(self.limited(centred.abs().mean(1, keepdim=True), rows))))
        return sign(normal, decaying(normal.detach(), self.progress)), size.detach()


class Activations(OneBit):
    """One bit, with that slope."""

    def slope(self, v: Tensor) -> Tensor:
        return decaying(v, self.progress)
