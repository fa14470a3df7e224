"""Lloyd-Max quantizers: codebooks designed for the density of the weights instead of the weights themselves.

Lloyd, "Least Squares Quantization in PCM" (1957, 1982); Max, "Quantizing for Minimum Distortion" (1960). The density
is a generalised Gaussian (Laplace and Gaussian among them) whose shape and variance are those of the block, or of the
tensor where the table is shared: few numbers then do not decide where values lie, as they do in k-means.
"""

from collections.abc import Mapping
from functools import cache
from math import lgamma
from typing import Any

import torch
from torch import Tensor

from fewbit.numerics.clustering import cluster
from fewbit.numerics.codebooks import fit_codebook
from fewbit.numerics.format import Format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme

STATISTICS: frozenset[str] = frozenset()

BY_DENSITY = True  # weights that are representable already may move

_SHAPES = [2 ** (i / 8) for i in range(-8, 25)]  # 0.5 to 8; 1 is Laplace, 2 is Gaussian
_REACH = 12.0  # standard deviations that a design covers
_POINTS = 8192


def accepts(spec: Format) -> bool:
    """Formats whose values are fitted to the tensor."""
    return spec.learned


def round(weight: Tensor, scheme: Scheme, lo: Tensor, hi: Tensor, statistics: Mapping[str, Any]) -> QTensor:
    """Codes and codebook of a weight; ranges do not matter."""
    return fit_codebook(weight, scheme, fit_density)


def fit_density(rows: Tensor, levels: int, weights: Tensor | None = None) -> Tensor:
    """The best values for each row's fitted density: float64 [C, levels], ascending, one of them zero."""
    x = rows.to(torch.float64)
    mass = torch.ones_like(x) if weights is None else weights.to(torch.float64)
    total = mass.sum(dim=1).clamp(min=1e-300)
    deviation = ((mass * x * x).sum(dim=1) / total).sqrt()
    ratio = (mass * x.abs()).sum(dim=1) / total / deviation.clamp(min=1e-300)
    known = torch.tensor([_ratio(shape) for shape in _SHAPES], dtype=torch.float64, device=x.device)
    nearest = (ratio.unsqueeze(1) - known).abs().argmin(dim=1)
    values = x.new_zeros(len(x), levels)
    for shape in nearest.unique().tolist():
        values[nearest == shape] = _design(_SHAPES[shape], levels).to(x.device)
    # An even number of values, one of them zero, leaves one more on one side: the one that reaches further.
    mirrored = (-rows.amin(dim=1) > rows.amax(dim=1)).unsqueeze(1)
    return torch.where(mirrored, -values.flip(1), values) * deviation.unsqueeze(1)


def _ratio(shape: float) -> float:
    """E|x| / sqrt(E x**2) of a generalised Gaussian, which rises with its shape."""
    logarithm = lgamma(2 / shape) - (lgamma(1 / shape) + lgamma(3 / shape)) / 2
    return float(torch.tensor(logarithm, dtype=torch.float64).exp())


@cache
def _design(shape: float, levels: int) -> Tensor:
    """The best values for exp(-|x / a|**shape) of variance 1, more of them above zero: float64 [levels]."""
    scale = float(torch.tensor((lgamma(1 / shape) - lgamma(3 / shape)) / 2, dtype=torch.float64).exp())
    points = torch.linspace(-1, 1, _POINTS, dtype=torch.float64)
    points = (
        _REACH * points * points.abs()
    )  # closer together near zero, where a density of low shape is steep
    width = torch.gradient(points)[0]
    density = torch.exp(-((points / scale).abs() ** shape))
    values = cluster(points.to(torch.float32).unsqueeze(0), levels, (density * width).unsqueeze(0))[0]
    return values if (values > 0).sum() >= (values < 0).sum() else -values.flip(0)
