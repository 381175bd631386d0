"""One plot: points with their spread, a line for each series, as an SVG file that stands alone."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 670, 360, 56, 34, 220
_COLOURS = (
    "#555555",
    "#d62728",
    "#1f77b4",
    "#2ca02c",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#ff7f0e",
    "#17becf",
    "#bcbd22",
)


@dataclass(frozen=True)
class Series:
    """One method: its name, its colour's number, and for each point its place, its value and the value's spread."""

    title: str
    colour: int
    points: tuple[tuple[float, float, float], ...]


def scatter(series: Sequence[Series], title: str, x_label: str, y_label: str) -> str:
    """Draw all series; the horizontal axis is logarithmic."""
    points = [point for one in series for point in one.points]
    across = _Axis([math.log2(x) for x, _, _ in points], LEFT, WIDTH - LEGEND)
    up = _Axis([y + sign * s for _, y, s in points for sign in (-1, 1)], HEIGHT - 44, TOP)
    drawn = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="11"><rect width="100%" height="100%" fill="white"/>'
        ),
        f'<text x="{LEFT}" y="18" font-size="13">{html.escape(title)}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 8}">{html.escape(x_label)} (logarithmic)</text>',
        f'<text x="4" y="{TOP - 4}">{html.escape(y_label)}</text>',
    ]
    for value in up.ticks():
        y = up.at(value)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - LEGEND}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in (1, 2, 3, 4, 6, 9, 16):
        if across.low <= math.log2(value) <= across.high:
            x = across.at(math.log2(value))
            drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 28}" text-anchor="middle">{value}x</text>')
    for place, one in enumerate(series):
        drawn += _drawn(one, across, up, place)
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _drawn(one: Series, across: _Axis, up: _Axis, place: int) -> list[str]:
    colour = _COLOURS[one.colour % len(_COLOURS)]
    places = [
        (across.at(math.log2(x)), up.at(y), up.at(y - s), up.at(y + s)) for x, y, s in sorted(one.points)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
    for x, y, low, high in places:
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
    y = TOP + 10 + 18 * place
    drawn.append(f'<circle cx="{WIDTH - LEGEND + 14}" cy="{y - 4}" r="4" fill="{colour}"/>')
    drawn.append(f'<text x="{WIDTH - LEGEND + 24}" y="{y}">{html.escape(one.title)}</text>')
    return drawn


class _Axis:
    """Where values come to lie between two edges of the picture."""

    def __init__(self, values: Iterable[float], first: float, last: float) -> None:
        found = list(values)
        margin = 0.06 * (max(found) - min(found)) or 0.5
        self.low, self.high = min(found) - margin, max(found) + margin
        self.first, self.last = first, last

    def at(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Return four to eight round values within the axis."""
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]
