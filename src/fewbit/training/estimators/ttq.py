"""Three values of which two learn: Zhu et al., "Trained Ternary Quantization" (TTQ, arXiv 1612.01064)."""

import torch
from torch import Tensor, nn

from fewbit.numerics.codebooks import as_stored
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import blocks, unblocks
from fewbit.training.estimators import WeightEstimator

_THRESHOLD = 0.05  # of the largest |w|


class Weights(WeightEstimator):
    """Codebooks of 2 bits: a negative value, zero and a positive one of another size; of four places, two are equal.

    A weight's gradient is multiplied by the size of its value, that of zeros by 1.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        super().__init__(weight, q)
        assert q.codebook is not None
        self.register_buffer("scale", q.scale.detach().clone().reshape(-1, 1))
        tables = len(q.codebook)
        v = (blocks(weight.detach(), q.scheme) / self.scale).reshape(tables, -1)
        large = v.abs() > _THRESHOLD * v.abs().amax(1, keepdim=True)
        sizes = [
            (v.abs() * (large & side)).sum(1) / (large & side).sum(1).clamp(min=1) for side in (v < 0, v > 0)
        ]
        self.sizes = nn.Parameter(torch.stack(sizes, dim=1).clamp(min=1e-4))

    @classmethod
    def accepts(cls, spec: Format) -> bool:
        return spec.learned and spec.bits == 2

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self._stored().expand(len(rows), 2)
        v = rows / self.scale
        signs = self._signs(v.detach())
        size = torch.where(signs < 0, sizes[:, :1], sizes[:, 1:])
        slope = torch.where(signs == 0, torch.ones_like(v), size.detach())
        return signs * size + (v - v.detach()) * slope, self.scale

    @torch.no_grad()
    def hard(self, weight: Tensor) -> QTensor:
        sizes = self._stored()
        zero = torch.zeros_like(sizes[:, 0])
        table = torch.stack([-sizes[:, 0], zero, sizes[:, 1], sizes[:, 1]], dim=1)
        signs = self._signs(blocks(weight, self.scheme) / self.scale)
        codes = unblocks(signs + 1, weight.shape, self.scheme).to(self.scheme.spec.code_dtype)
        scale = self.scale.reshape(-1).clone()
        return QTensor(codes, scale, self.zero_point.clone(), self.scheme, tuple(weight.shape), table)

    def _stored(self) -> Tensor:
        sizes = self.sizes.abs().clamp(max=1.0)
        return sizes + (as_stored(sizes.detach()) - sizes).detach()

    def _signs(self, v: Tensor) -> Tensor:
        rows = v.reshape(len(self.sizes), -1)
        threshold = _THRESHOLD * rows.abs().amax(1, keepdim=True)
        return (torch.sign(rows) * (rows.abs() > threshold)).reshape(v.shape)
