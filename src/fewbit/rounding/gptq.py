"""GPTQ rounding: the layer's output error, not the weight's, is kept small by second moments of its inputs.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with the order of falling second moments ("act-order") and scales that stay as they were
observed, so that groups may have any size.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics.gptq import Nearest, factor, losses, round_inputs
from fewbit.numerics.qtensor import QTensor, encode
from fewbit.numerics.scheme import Scheme, unblocks

STATISTICS: frozenset[str] = frozenset({"hessian"})


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Codes that minimise tr(E H E^T), E the error of the weight, row by row never worse than the nearest codes.

    Args:
        weight: [outputs, ...]; the other dimensions, flattened, are the inputs that the Hessian is of.
        scheme, lo, hi: the scheme and the range of each of its blocks; values outside saturate.
        statistics: "hessian", float32 or float64 [inputs, inputs], or [groups, inputs, inputs] for a grouped
            convolution, whose outputs come group by group. It may be singular; the arithmetic has its dtype.

    Raises:
        CalibrationError: a Hessian of another shape, or with numbers that are not finite.
    """
    plain = QTensor.quantize(weight, scheme, lo, hi)
    hessian: Tensor = statistics["hessian"]
    hessian = hessian if hessian.dim() == 3 else hessian.unsqueeze(0)
    groups, inputs = hessian.shape[:2]
    if hessian.shape[2] != inputs or len(weight) % groups or weight.numel() != len(weight) * inputs:
        raise CalibrationError(
            f"a Hessian of shape {tuple(hessian.shape)} does not belong to a weight of shape {tuple(weight.shape)}"
        )

    def by_group(x: Tensor) -> Tensor:
        """[groups, inputs, outputs of a group]."""
        return x.reshape(groups, -1, inputs).to(hessian.dtype).mT

    parts = (
        weight.detach(),
        plain.dequantize(),
        *(_spread(x, plain) for x in (plain.scale, plain.zero_point)),
    )
    found = [_round(scheme, h, *group) for h, *group in zip(hessian, *map(by_group, parts), strict=True)]
    values = torch.stack(found).mT.reshape(weight.shape).to(torch.float32)
    return replace(plain, codes=encode(values, plain.scale, plain.zero_point, scheme))


def _round(
    scheme: Scheme, hessian: Tensor, weight: Tensor, plain: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """Rounded weights [I, O] of outputs that share their inputs; weight and what follows are [I, O]."""
    factored = factor(hessian)
    weight, plain, scale, zero_point = (x[factored.order] for x in (weight, plain, scale, zero_point))
    nearest = _integer(scale, zero_point, scheme) if scheme.spec.integer else _table(scale, scheme)
    rounded, loss = round_inputs(weight, factored, nearest)
    worse = loss > losses(weight - plain, factored)
    rounded[:, worse] = plain[:, worse]
    return rounded[factored.order.argsort()]


def _integer(scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Nearest:
    """The quantizer of an integer format. Rounding to an integer after clamping to integers is the same as before."""
    least, most = scheme.qmin - zero_point, scheme.qmax - zero_point
    # Adding this rounds to a whole number, ties to even. torch.round divides even 4,096 numbers among threads,
    # and then waits: up to a thousand times longer where the machine is busy.
    whole = 1.5 * 2.0 ** (52 if scale.dtype == torch.float64 else 23)

    def nearest(x: Tensor, index: int) -> Tensor:
        v = (x / scale[index]).clamp_(least[index], most[index])
        return v.add_(whole).sub_(whole).mul_(scale[index])

    return nearest


def _table(scale: Tensor, scheme: Scheme) -> Nearest:
    """The quantizer of a format with values of its own."""

    def nearest(x: Tensor, index: int) -> Tensor:
        v = (x / scale[index]).clamp_(scheme.qmin, scheme.qmax)
        return scheme.spec.nearest(v.to(torch.float32)) * scale[index]

    return nearest


def _spread(per_block: Tensor, q: QTensor) -> Tensor:
    """A value per block, for each weight: in the weight's shape."""
    size = q.codes.numel() // per_block.numel()
    return unblocks(per_block.reshape(-1, 1).expand(-1, size), q.shape, q.scheme)
