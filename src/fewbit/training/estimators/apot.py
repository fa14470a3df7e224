"""Normalised weights, a learned clip: Li et al., "Additive Powers-of-Two Quantization" (arXiv 1909.13144), section 2.3.

Made for the format `apot_<N>`; any other with fixed values serves. The clip's gradient is that of clipped values and,
inside, of the rounding error, as in the paper's reparameterised clipping function.
"""

from torch import Tensor, nn

from fewbit.numerics.qtensor import QTensor
from fewbit.training.estimators import WeightEstimator


class Weights(WeightEstimator):
    """Weights less their mean, over their standard deviation; the deviation that they began with scales them back."""

    spread: Tensor

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        super().__init__(weight, q)
        spread = weight.detach().std().clamp(min=1e-12)
        self.register_buffer("spread", spread)
        self.clip = nn.Parameter((q.scale.detach() / spread).reshape(-1, 1).clone())
        self._grad_scale = float(
            (max(weight.numel() // q.scale.numel(), 1) * max(self.scheme.qmax, 1.0)) ** -0.5
        )

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        clip = self.clip * self._grad_scale + (self.clip * (1 - self._grad_scale)).detach()
        scale = self.limited(clip, rows)
        normal = (rows - rows.mean()) / rows.std().clamp(min=1e-12)
        return self.rounded(normal / scale), scale * self.spread
