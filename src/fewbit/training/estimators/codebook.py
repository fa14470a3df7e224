"""Tables of values that learn: Han et al., "Deep Compression" (arXiv 1510.00149); weights may change to other values.

A value that is zero stays zero. Tables are float16 numbers, as they are stored.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbit.numerics.clustering import nearest_value
from fewbit.numerics.codebooks import as_stored
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import blocks, unblocks
from fewbit.training.estimators import WeightEstimator


class Weights(WeightEstimator):
    """Codebooks of any size; gradients pass straight through to weights, and to the value that each weight has."""

    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        super().__init__(weight, q)
        assert q.codebook is not None
        self.register_buffer("scale", q.scale.detach().clone().reshape(-1, 1))
        self.register_buffer("zero", q.codebook == 0)
        self.table = nn.Parameter(q.codebook.detach().clone())

    @classmethod
    def accepts(cls, spec: Format) -> bool:
        return spec.learned

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        table = self.values()
        v = rows / self.scale
        codes = nearest_value(v.detach(), table.detach()).long()
        values = table.expand(len(v), -1).gather(1, codes)
        return values + (v - v.detach()), self.scale

    @torch.no_grad()
    def hard(self, weight: Tensor) -> QTensor:
        table = self.values()
        rows = blocks(weight, self.scheme) / self.scale
        codes = unblocks(nearest_value(rows, table), weight.shape, self.scheme).to(
            self.scheme.spec.code_dtype
        )
        scale = self.scale.reshape(-1).clone()
        return replace(
            QTensor(codes, scale, self.zero_point.clone(), self.scheme, tuple(weight.shape)), codebook=table
        )

    def values(self) -> Tensor:
        """The table as it is stored, ascending; differentiable."""
        table = torch.where(self.zero, 0.0, self.table).sort(dim=1).values
        return table + (as_stored(table.detach()) - table).detach()
