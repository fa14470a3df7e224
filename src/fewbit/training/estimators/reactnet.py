"""Signs with a polynomial's slope: Liu et al., "ReActNet" (arXiv 2003.03488), after Bi-Real Net (arXiv 1808.00278).

ReActNet's learned thresholds are what a batch norm's bias in front already learns.
"""

from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.training.estimators import WeightEstimator
from fewbit.training.estimators._signs import OneBit, polynomial, sign


class Weights(WeightEstimator):
    """Binary: signs times the mean of |w|, which gradients do not see; straight through within -1 .. 1."""

    @classmethod
    def accepts(cls, spec: Format) -> bool:
        return spec.name == "binary"

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.limited(rows.abs().mean(1, keepdim=True), rows).detach()
        inside = (rows.detach().abs() <= 1.0).to(rows.dtype)
        return sign(rows, inside / mean), mean


class Activations(OneBit):
    """One bit, with that slope."""

    def slope(self, v: Tensor) -> Tensor:
        return polynomial(v)
