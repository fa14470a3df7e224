"""Plain line charts as SVG: one line a series, one place on the x axis a name; no package is needed to draw them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from fewbit.errors import ArtifactError

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_LEFT, _TOP, _HEIGHT, _STEP = 70, 40, 240, 26
_TICKS = 5


def line_chart(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    log: bool = False,
    low: float | None = None,
) -> str:
    """An SVG picture of the series over the names; a value that is None or not finite leaves a gap.

    ``log``: a logarithmic axis; values of zero and below are gaps there. ``low``: where the axis begins, by
    default at the lowest value.
    """
    placed = {key: [_height(value, log) for value in values] for key, values in series.items()}
    shown = [value for values in placed.values() for value in values if value is not None]
    high = max(shown, default=1.0)
    low = min(shown, default=0.0) if low is None else _height(low, log) or 0.0
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    width = _LEFT + _STEP * max(len(names), 8) + 20
    below = 12 + 6 * max((len(name) for name in names), default=0)
    parts = [f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>']
    for tick in range(_TICKS):
        value = low + (high - low) * tick / (_TICKS - 1)
        y = _y(value, low, high)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{width - 10}" y2="{y:.1f}" stroke="#ddd"/>')
        label = f"{10.0**value if log else value:.3g}"
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for n, name in enumerate(names):
        x, y = _x(n), _TOP + _HEIGHT + 12
        parts.append(
            f'<text x="{x}" y="{y}" text-anchor="end" transform="rotate(-90 {x} {y})">{escape(name)}</text>'
        )
    for n, (key, heights) in enumerate(placed.items()):
        parts += _line(key, heights, _COLOURS[n % len(_COLOURS)], low, high)
        x = _LEFT + 90 * n
        colour = _COLOURS[n % len(_COLOURS)]
        parts.append(f'<text x="{x}" y="34" fill="{colour}">{escape(key)}</text>')
    size = f'width="{width}" height="{_TOP + _HEIGHT + 12 + below}"'
    style = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def save_chart(svg: str, path: str | Path) -> Path:
    """Write a chart to an ``.svg`` file. Raises ``ArtifactError`` for another suffix or an impossible path."""
    file = Path(path)
    if file.suffix != ".svg":
        raise ArtifactError(f"{file}: charts are drawn as SVG: give a name that ends in .svg")
    try:
        file.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{file}: the chart cannot be written ({error.strerror or error})") from error
    return file


def _line(key: str, heights: list[float | None], colour: str, low: float, high: float) -> list[str]:
    points = [(_x(n), _y(value, low, high)) for n, value in enumerate(heights) if value is not None]
    joined = " ".join(f"{x},{y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return [f'<polyline points="{joined}" fill="none" stroke="{colour}"/>', *dots]


def _height(value: float | None, log: bool) -> float | None:
    if value is None or not math.isfinite(value) or (log and value <= 0):
        return None
    return math.log10(value) if log else value


def _x(n: int) -> int:
    return _LEFT + 14 + _STEP * n


def _y(value: float, low: float, high: float) -> float:
    return _TOP + _HEIGHT * (high - value) / (high - low)
