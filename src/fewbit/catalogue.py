"""The list of number formats: how many bits and levels, and how well they represent what weights look like."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.charts import save_chart
from fewbit.errors import FormatError
from fewbit.numerics.clipping import search_clipping
from fewbit.numerics.clustering import cluster
from fewbit.numerics.codebooks import shared_table
from fewbit.numerics.format import Format, format_names, get_format
from fewbit.numerics.qtensor import QTensor, fake_quantize_rows
from fewbit.numerics.scheme import Scheme, qparams
from fewbit.tables import text_table

CHANNELS, CHANNEL = (
    256,
    1024,
)  # of the layer that scales and tables are shared out in: its channels, weights in each

_POINTS = 2**14
_REACH = 24.0  # standard deviations
_SAMPLES = 2**17
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class FormatRow:
    """One format.

    ``levels``: how many values it has. ``stored_bits``: bits per weight with scales and tables, in a layer of 256
    channels of 1,024 weights, each with its scale and table where the format does not say otherwise. ``gaussian``,
    ``laplace``: mean squared error over mean square for numbers distributed so, at the scale where that is least
    (microscaling formats: at the scale that their definition gives; without a scale: at variance 1).
    """

    name: str
    bits: int
    levels: int
    stored_bits: float
    gaussian: float
    laplace: float


class FormatTable(Sequence[FormatRow]):
    """All formats; prints as a table, and draws their levels."""

    def __init__(self, rows: Sequence[FormatRow]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[FormatRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        header = ["format", "bits", "levels", "bits stored", "Gaussian", "Laplace"]
        cells = [
            [
                row.name,
                str(row.bits),
                f"{row.levels:,}",
                f"{row.stored_bits:.3f}",
                f"{row.gaussian:.2e}",
                f"{row.laplace:.2e}",
            ]
            for row in self.rows
        ]
        return text_table(header, cells)

    def plot(self, path: str | Path, names: Sequence[str] = ()) -> Path:
        """Draw the levels of formats (by default those of 4 bits) below the density of Gaussian weights, as SVG.

        Each format has the scale that suits that density best, or that of a usual block. Raises ``FormatError`` for
        an unknown name or one of more than 8 bits, ``ArtifactError`` for a path that is no ``.svg`` or not writable.
        """
        chosen = list(names) or [row.name for row in self.rows if row.bits == 4]
        return save_chart(_drawing([(name, levels_for_gaussian(name)) for name in chosen]), path)


def formats() -> FormatTable:
    """The list of all number formats, with their errors on Gaussian and Laplace weights; takes some seconds once."""
    return FormatTable([_row(name) for name in format_names()])


@cache
def _row(name: str) -> FormatRow:
    spec = get_format(name)
    stored = float(spec.bits)
    if spec.scaled:
        stored += spec.scale_bits / (spec.block or CHANNEL) + spec.tensor_bits / (CHANNELS * CHANNEL)
    if spec.learned:
        sharing = CHANNELS * CHANNEL if shared_table(Scheme(name)) else CHANNEL
        stored += 16 * 2**spec.bits / sharing
    return FormatRow(
        name, spec.bits, spec.codes().numel(), stored, _error(spec, "gaussian"), _error(spec, "laplace")
    )


def levels_for_gaussian(name: str) -> list[float]:
    """A format's values at the scale that is best for numbers of variance 1. Raises FormatError for an unknown name."""
    spec = get_format(name)
    x, mass = _density("gaussian")
    if spec.learned:
        return cluster(x, 2**spec.bits, mass)[0].tolist()
    if spec.bits > 8:
        raise FormatError(f"format {name!r} has too many levels to draw: choose formats of 8 bits or fewer")
    scale = _best_scale(spec, x, mass) if spec.block is None else _usual_scale(spec)
    return ((spec.decode(spec.codes()) - _zero_point(spec)) * scale).tolist()


def _error(spec: Format, kind: str) -> float:
    if spec.block is not None:
        x = _sample(kind)
        found = QTensor.quantize(x, Scheme(spec.name, "group", group_size=spec.block)).dequantize()
        return float((found - x).double().square().mean() / x.double().square().mean())
    x, mass = _density(kind)
    if spec.learned:
        values = cluster(x, 2**spec.bits, mass).to(torch.float32)[0]
        place = torch.bucketize(x, (values[1:] + values[:-1]) / 2)
        error = values[place] - x
    else:
        scale = torch.tensor([_best_scale(spec, x, mass)])
        error = _coded(spec, x, scale) - x
    return float((mass * error.double().square()).sum() / (mass * x.double().square()).sum())


@cache
def _density(kind: str) -> tuple[Tensor, Tensor]:
    """Points, float32 [1, n], and how much each counts, float64 [1, n], of a density of variance 1.

    The points' distances are irregular, so that they do not all sit in the same place of a format's step.
    """
    order = torch.arange(_POINTS, dtype=torch.float64)
    place = 2 * (order + (order * _GOLDEN).frac()) / _POINTS - 1
    x = _REACH * place * place.abs()  # closer together near zero
    width = place.abs()
    mass = torch.exp(-x.square() / 2) if kind == "gaussian" else torch.exp(-(2**0.5) * x.abs())
    return x.to(torch.float32).unsqueeze(0), (mass * width).unsqueeze(0)


@cache
def _sample(kind: str) -> Tensor:
    """Random numbers of variance 1, one channel: float32 [1, n]."""
    generator = torch.Generator().manual_seed(0)
    if kind == "gaussian":
        return torch.randn(1, _SAMPLES, generator=generator)
    uniform = torch.rand(1, _SAMPLES, generator=generator) * 2 - 1
    return -uniform.sign() * torch.log1p(-uniform.abs()) / 2**0.5


def _best_scale(spec: Format, x: Tensor, mass: Tensor) -> float:
    scheme = Scheme(spec.name)
    if not spec.scaled:
        return 1.0

    def loss(low: Tensor, high: Tensor) -> Tensor:
        scale, _ = qparams(low.reshape(-1), high.reshape(-1), scheme)
        error = _coded(spec, x.expand(len(scale), -1), scale) - x
        return (mass * error.double().square()).sum(dim=1).reshape(low.shape)

    most = torch.tensor([_REACH])
    low, high = search_clipping(loss, -most, most, symmetric=True)
    return float(qparams(low, high, scheme)[0])


def _usual_scale(spec: Format) -> float:
    """Of a format that says itself how scales follow from blocks: that of a block with a median maximum."""
    assert spec.block is not None
    span = _sample("gaussian").reshape(-1, spec.block).abs().amax(dim=1).median().double().reshape(1)
    return float(spec.scales(span, spec.qmax))


def _coded(spec: Format, rows: Tensor, scale: Tensor) -> Tensor:
    zero_point = torch.full_like(scale, _zero_point(spec), dtype=torch.int32)
    return fake_quantize_rows(rows, scale, zero_point, Scheme(spec.name))


def _zero_point(spec: Format) -> int:
    """Of numbers on both sides of zero."""
    return 2 ** (spec.bits - 1) if spec.integer and spec.qmin == 0 else 0


def _drawing(lines: list[tuple[str, list[float]]]) -> str:
    """A picture as SVG: the density on top, below it a line for each format with a stroke at each level."""
    left, top, width, high, step, reach = 110, 20, 640, 120, 22, 4.0

    def across(value: float) -> float:
        return left + width * (value + reach) / (2 * reach)

    curve = [(v / 50, float(torch.exp(torch.tensor(-((v / 50) ** 2) / 2)))) for v in range(-200, 201)]
    points = " ".join(f"{across(x):.1f},{top + high * (1 - y):.1f}" for x, y in curve)
    parts = [f'<polyline points="{points}" fill="none" stroke="#1f77b4"/>']
    for number, (name, levels) in enumerate(lines):
        y = top + high + step * (number + 1)
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{name}</text>')
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="#ddd"/>')
        for level in levels:
            if abs(level) <= reach:
                x = f"{across(level):.1f}"
                parts.append(f'<line x1="{x}" y1="{y - 7}" x2="{x}" y2="{y + 7}" stroke="#d62728"/>')
    bottom = top + high + step * (len(lines) + 1)
    for tick in range(-4, 5):
        parts.append(f'<text x="{across(tick):.1f}" y="{bottom + 6}" text-anchor="middle">{tick}</text>')
    size = f'width="{left + width + 20}" height="{bottom + 20}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
