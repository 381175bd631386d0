"""Curves as an SVG file that stands alone."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_COLOURS = ("#2f6db3", "#cf6f1b", "#2f8f63", "#97458a", "#8a6d2f", "#5f6b78")
_WIDTH, _HEIGHT, _LEFT, _TOP = 640, 300, 52, 34
_LEGEND = 16


@dataclass(frozen=True)
class Curve:
    """A named line of points."""

    name: str
    points: Sequence[tuple[float, float]]


def curves(
    series: Sequence[Curve], *, title: str = "", x: str = "", y: str = "", logarithmic: bool = False
) -> str:
    """Draw curves on common axes, with a legend below.

    Args:
        series: the curves.
        title: above the picture.
        x: what the horizontal axis counts.
        y: what the vertical axis counts.
        logarithmic: whether the vertical axis is; values of zero and below are left out then.
    """
    kept = [(c.name, [p for p in c.points if p[1] > 0 or not logarithmic]) for c in series]
    points = [point for _, line in kept for point in line]
    left, right = _range([px for px, _ in points])
    low, high = _range([_scaled(py, logarithmic) for _, py in points] + ([] if logarithmic else [0.0]))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - left) / (right - left)
        up = (_scaled(point[1], logarithmic) - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - 12), _TOP + (1 - up) * (_HEIGHT - _TOP - 40)

    drawn = [f'<text x="{_LEFT}" y="18" font-weight="600">{html.escape(title)}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        value = 10**value if logarithmic else value
        _, py = place((left, value))
        drawn.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{py:.1f}" y2="{py:.1f}" stroke="#dfe3e7"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    base = _HEIGHT - 22
    drawn.append(f'<text x="{_LEFT}" y="{base}">{left:g}</text>')
    drawn.append(f'<text x="{_WIDTH - 12}" y="{base}" text-anchor="end">{right:g}</text>')
    axes = " against ".join(html.escape(name) for name in (y, x) if name)
    drawn.append(f'<text x="{(_WIDTH + _LEFT) / 2:.0f}" y="{base}" text-anchor="middle">{axes}</text>')
    for number, (name, line) in enumerate(kept):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = ' stroke-dasharray="6 3"' if number // len(_COLOURS) % 2 else ""
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(place, line))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        top = _HEIGHT + number * _LEGEND
        drawn.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + 24}" y1="{top - 4}" y2="{top - 4}" '
            f'stroke="{colour}" stroke-width="2"{dash}/>'
        )
        drawn.append(f'<text x="{_LEFT + 32}" y="{top}">{html.escape(name)}</text>')
    height = _HEIGHT + len(kept) * _LEGEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#1d2126">'
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>{"".join(drawn)}</svg>\n'
    )


def _scaled(value: float, logarithmic: bool) -> float:
    return math.log10(value) if logarithmic else value


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low, low + 1.0)
