"""Plots as inline SVG for `etp_deploy.html`: bars, distributions, lines over time, channel maps.

Drawn narrow (400 units) and scaled up, so that the lettering stays readable on a phone.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.html import Html

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH = 400
COLOURS = 6
_BINS = 48


def bars(rows: Sequence[tuple[str, Mapping[str, float]]], *, unit: str = "", caption: str = "") -> Html:
    """Draw horizontal bars: for each label one bar for each series.

    Args:
        rows: label and values by series; every value is at least zero.
        unit: written after the numbers.
        caption: what is shown.
    """
    series = list(dict.fromkeys(name for _, values in rows for name in values))
    largest = max((v for _, values in rows for v in values.values()), default=0) or 1.0
    drawn, y = [], 0
    for label, values in rows:
        drawn.append(f'<text x="0" y="{y + 12}">{_text(label, 58)}</text>')
        y += 18
        for name, value in values.items():
            length = max((WIDTH - 90) * value / largest, 1.0)
            drawn.append(_box(0, y, length, 10, series.index(name)))
            drawn.append(
                f'<text class="quiet" x="{length + 6:.1f}" y="{y + 9}">{_number(value)} {_text(unit)}</text>'
            )
            y += 14
        y += 6
    return _figure(drawn, max(y, 1), caption, series if len(series) > 1 else ())


def distribution(samples: Mapping[str, Sequence[float]], *, unit: str = "ms", caption: str = "") -> Html:
    """Draw a histogram for each series on one shared axis, with ticks at the median and the 95th percentile.

    The slowest one percent lies beyond the right edge where it would squeeze the rest.
    """
    arrays = {name: np.asarray(values, dtype=float) for name, values in samples.items() if len(values)}
    if not arrays:
        return Html("")
    low = min(float(a.min()) for a in arrays.values())
    high = max(float(np.percentile(a, 99)) for a in arrays.values())
    high = high if high > low else low + abs(low) * 0.01 + 1e-9
    edges = np.linspace(low, high, _BINS + 1)
    drawn, y = [], 0
    for at, (name, array) in enumerate(arrays.items()):
        counts, _ = np.histogram(array, edges)
        tallest = max(int(counts.max()), 1)
        drawn.append(f'<text x="0" y="{y + 12}">{_text(name, 58)}</text>')
        base = y + 62
        step = WIDTH / _BINS
        for place, count in enumerate(counts):
            if count:
                height = 42 * count / tallest
                drawn.append(_box(place * step, base - height, step - 0.8, height, at))
        drawn.append(f'<line class="line" x1="0" x2="{WIDTH}" y1="{base}" y2="{base}"/>')
        for percentile in (50, 95):
            drawn += _tick(float(np.percentile(array, percentile)), f"p{percentile}", low, high, base)
        y = base + 22
    drawn.append(f'<text class="quiet" x="0" y="{y + 8}">{_number(low)} {_text(unit)}</text>')
    drawn.append(
        f'<text class="quiet" x="{WIDTH}" y="{y + 8}" text-anchor="end">{_number(high)} {_text(unit)}</text>'
    )
    return _figure(drawn, y + 14, caption, ())


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_unit: str = "s",
    y_unit: str = "",
    caption: str = "",
) -> Html:
    """Draw one line of points for each series, the vertical axis starting at zero."""
    points = [point for values in series.values() for point in values]
    if not points:
        return Html("")
    right = max(x for x, _ in points) or 1.0
    top = max(y for _, y in points) or 1.0
    height, drawn = 150, []
    for share in (0.0, 0.5, 1.0):
        y = 14 + (height - 14) * (1 - share)
        drawn.append(f'<line class="line" x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f"{_number(top * share)} {_text(y_unit)}" if share else "0"
        drawn.append(f'<text class="quiet" x="0" y="{y - 3:.1f}">{label}</text>')
    for at, values in enumerate(series.values()):
        places = [(WIDTH * x / right, 14 + (height - 14) * (1 - y / top)) for x, y in values]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        colour = f"var(--s{at % COLOURS})"
        drawn.append(f'<polyline points="{path}" fill="none" style="stroke:{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" style="fill:{colour}"/>' for x, y in places]
    drawn.append(f'<text class="quiet" x="0" y="{height + 14}">0 {_text(x_unit)}</text>')
    end = f"{_number(right)} {_text(x_unit)}"
    drawn.append(f'<text class="quiet" x="{WIDTH}" y="{height + 14}" text-anchor="end">{end}</text>')
    return _figure(drawn, height + 20, caption, tuple(series))


def channel_map(rows: Sequence[tuple[str, Sequence[bool]]], *, caption: str = "") -> Html:
    """Draw for each axis a strip of its channels, kept ones solid and removed ones faint.

    Strips of many channels show in each place the share kept of the channels that fall there.
    """
    drawn, y = [], 0
    for label, kept in rows:
        total, alive = len(kept), sum(bool(k) for k in kept)
        drawn.append(f'<text x="0" y="{y + 12}">{_text(label, 44)}</text>')
        drawn.append(
            f'<text class="quiet" x="{WIDTH}" y="{y + 12}" text-anchor="end">{alive} of {total}</text>'
        )
        y += 17
        places = min(total, 100)
        for place in range(places):
            part = kept[place * total // places : (place + 1) * total // places]
            share = sum(bool(k) for k in part) / len(part)
            step = WIDTH / places
            drawn.append(
                f'<rect x="{place * step:.2f}" y="{y}" width="{max(step - 0.5, 0.5):.2f}" height="12" '
                f'style="fill:var(--s0);fill-opacity:{0.12 + 0.88 * share:.2f}"/>'
            )
        y += 22
    return _figure(drawn, max(y, 1), caption, ())


def _tick(value: float, name: str, low: float, high: float, base: float) -> list[str]:
    """Mark a value below an axis; the lettering stays inside the picture."""
    x = WIDTH * min(max((value - low) / (high - low), 0.0), 1.0)
    anchor = "start" if x < 60 else "end" if x > WIDTH - 60 or name == "p50" else "start"
    top, bottom, text = base - 44, base + 4, f"{name} {_number(value)}"
    return [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" style="stroke:var(--ink)"/>',
        f'<text class="quiet" x="{x:.1f}" y="{base + 14:.1f}" text-anchor="{anchor}">{text}</text>',
    ]


def _box(x: float, y: float, width: float, height: float, colour: int) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'style="fill:var(--s{colour % COLOURS})"/>'
    )


def _figure(drawn: Sequence[str], height: float, caption: str, legend: Sequence[str]) -> Html:
    keys = "".join(
        f'<span><i style="background:var(--s{at % COLOURS})"></i>{_text(name)}</span>'
        for at, name in enumerate(legend)
    )
    above = f'<div class="legend">{keys}</div>' if keys else ""
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    label = _text(caption or "plot")
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
    )
    return Html(f"<figure>{above}{picture}{below}</figure>")


def _text(value: str, longest: int = 10**6) -> str:
    shown = value if len(value) <= longest else value[: longest // 2 - 1] + "\u2026" + value[-longest // 2 :]
    return html.escape(shown, quote=True)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e5 or (value and abs(value) < 1e-3):
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
