"""AdaRound: which way each weight rounds is learned, so that the layer's output error is small.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound, arXiv 2004.10568), equation 20:
of the data, the layer's output error needs only the second moments of the inputs.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import CalibrationError
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.numerics.soft_rounding import SoftRounding

STATISTICS: frozenset[str] = frozenset({"hessian"})

_STEPS = 500
_RATE = 1e-2
# Weight of the term that makes codes decide, in units of the nearest codes' loss a weight. It rises, since without it
# the soft weight is the float one, and with all of it at once every code decides alone.
_FIRST, _LAST = 0.01, 10.0


def accepts(spec: Format) -> bool:
    """Up or down are the choices between integers."""
    return spec.integer


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Codes that minimise tr(E H E^T), E the error of the weight, row by row never worse than the nearest codes.

    Args:
        weight: [outputs, ...]; the other dimensions, flattened, are the inputs that the Hessian is of.
        scheme, lo, hi: the scheme and the range of each of its blocks; values outside saturate.
        statistics: "hessian", float [inputs, inputs], or [groups, inputs, inputs] for a grouped convolution.

    Raises:
        CalibrationError: a Hessian of another shape.
    """
    nearest = QTensor.quantize(weight, scheme, lo, hi)
    hessian: Tensor = statistics["hessian"].to(torch.float32)
    hessian = hessian if hessian.dim() == 3 else hessian.unsqueeze(0)
    groups, inputs = hessian.shape[:2]
    if hessian.shape[2] != inputs or len(weight) % groups or weight.numel() != len(weight) * inputs:
        raise CalibrationError(
            f"a Hessian of shape {tuple(hessian.shape)} does not belong to a weight of shape {tuple(weight.shape)}"
        )
    float_weight = weight.detach().to(torch.float32)

    def losses(value: Tensor) -> Tensor:
        """By output."""
        error = (value - float_weight).reshape(groups, -1, inputs)
        return ((error @ hessian) * error).sum(dim=2).reshape(-1)

    plain = losses(nearest.dequantize())
    soft = SoftRounding(float_weight, nearest)
    _learn(soft, losses, plain.sum() / weight.numel())
    found = soft.hard()
    worse = (losses(found.dequantize()) > plain).reshape(-1, *[1] * (weight.dim() - 1))
    return replace(nearest, codes=torch.where(worse, nearest.codes, found.codes))


def _learn(soft: SoftRounding, losses: Any, unit: Tensor) -> None:
    """Adam on the loss in units of the nearest codes' loss a weight, and the term that makes codes decide."""
    unit = unit.clamp(min=torch.finfo(torch.float32).tiny)
    optimizer = torch.optim.Adam([soft.v], lr=_RATE)
    with torch.enable_grad():
        for step in range(_STEPS):
            done = step / _STEPS
            loss = losses(soft.weight()).sum() / unit
            decide = _FIRST * (_LAST / _FIRST) ** done
            loss = loss + decide * soft.undecided(2 + 18 * 0.5 * (1 + math.cos(math.pi * done)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
