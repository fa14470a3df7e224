"""Codes and table of a codebook weight as numbers that gradients move.

Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding"
(arXiv 1510.00149) train the table; here weights may also change to a neighbouring value, passed straight through.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.numerics.clustering import nearest_value
from fewbit.numerics.codebooks import as_stored
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import blocks, unblocks


class TunedCodebook:
    """A weight of a learned format: latent weights and the table learn; zeros stay zero, in the table and the weight.

    Both are counted in steps, two over the number of values, so that they learn at the rates of integers' codes.

    Args:
        weight: float32, the weight before rounding; latent values begin there.
        q: its codes, scales and table.
    """

    def __init__(self, weight: Tensor, q: QTensor) -> None:
        assert q.codebook is not None
        self.q, self.table = q, q.codebook
        self.step = 2 / q.codebook.shape[1]
        rows = blocks(weight.detach().to(torch.float32), q.scheme) / q.scale.reshape(-1, 1)
        coded = blocks(q.dequantize(), q.scheme) / q.scale.reshape(-1, 1)
        self.zero = rows == 0
        same = nearest_value(rows, q.codebook) == blocks(q.codes, q.scheme)
        self.v = (torch.where(same, rows, coded) / self.step).requires_grad_()
        self.change = torch.zeros_like(q.codebook).requires_grad_()

    def weight(self) -> Tensor:
        """The rounded weight: float32, differentiable in ``v`` (straight through) and in ``change``."""
        table, v = self._values(), (self.v * self.step).masked_fill(self.zero, 0.0)
        codes = nearest_value(v.detach(), table.detach()).long()
        rows = table.expand(len(v), -1).gather(1, codes) + (v - v.detach())
        return unblocks(rows * self.q.scale.reshape(-1, 1), self.q.shape, self.q.scheme)

    def hard(self) -> QTensor:
        """The weight as codes, and its table as it is stored."""
        with torch.no_grad():
            table = as_stored(self._values())
            rows = (self.v * self.step).masked_fill(self.zero, 0.0)
            codes = unblocks(nearest_value(rows, table), self.q.shape, self.q.scheme)
            return replace(self.q, codes=codes.to(self.q.scheme.spec.code_dtype), codebook=table)

    def _values(self) -> Tensor:
        """The table as it is now, ascending."""
        moved = self.table + torch.where(self.table == 0, 0.0, self.change * self.step)
        return moved.sort(dim=1).values
