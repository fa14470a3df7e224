"""Signs with the mean of |w| as their scale: Rastegari et al., "XNOR-Net" (arXiv 1603.05279), equation 6."""

from torch import Tensor

from fewbit.numerics.format import Format
from fewbit.training.estimators import WeightEstimator


class Weights(WeightEstimator):
    """Binary. Gradients pass straight through within three mean magnitudes; weights begin well inside."""

    @classmethod
    def accepts(cls, spec: Format) -> bool:
        return spec.name == "binary"

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.limited(rows.abs().mean(1, keepdim=True), rows)
        return self.rounded(rows / (3 * mean.detach())), mean
