"""A loss curve as an SVG file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 40, 46

_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #333 }
.title { font-size: 15px; font-weight: 600 }
.grid { stroke: #8884; stroke-width: 1 }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.raw { fill: none; stroke-width: 1; opacity: .25 }
.level { stroke-width: 1.4; stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .paper { fill: #161616 } }"""

Points = Sequence[tuple[float, float]]


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most about `count` round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def smoothed(points: Points, weight: float = 0.95) -> list[tuple[float, float]]:
    """Exponential moving average of the y values, corrected for its start."""
    average = norm = 0.0
    out = []
    for x, y in points:
        average = weight * average + (1 - weight) * y
        norm = weight * norm + (1 - weight)
        out.append((x, average / norm))
    return out


def loss_curve(
    train: Points, validation: Points, title: str = "loss", level: tuple[str, float] | None = None
) -> str:
    """SVG text of training loss (raw, and smoothed on top) and validation loss against the step.

    `level` is a named horizontal line. Points that are not finite are left out.
    """
    train = [p for p in train if math.isfinite(p[1])]
    validation = [p for p in validation if math.isfinite(p[1])]
    shown = [*train, *validation]
    xs = [x for x, _ in shown] or [0.0, 1.0]
    ys = [y for _, y in shown] + ([level[1]] if level else []) or [0.0, 1.0]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(ys), max(ys)
    margin = 0.05 * (y_high - y_low) or 0.5
    y_low, y_high = y_low - margin, y_high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for value in nice_ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in nice_ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">step</text>')
    legend: list[tuple[str, str]] = []

    def draw(points: Points, color: str, kind: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
        parts.append(f'<polyline class="{kind}" stroke="{color}" points="{path}"/>')

    if train:
        draw(train, "#3b7dd8", "raw")
        draw(smoothed(train), "#3b7dd8", "line")
        legend.append(("train", "#3b7dd8"))
    if validation:
        draw(validation, "#d8743b", "line")
        for point in validation:
            x, y = place(*point)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="#d8743b"/>')
        legend.append((f"validation {validation[-1][1]:.3f}", "#d8743b"))
    if level:
        _, y = place(x_low, level[1])
        parts.append(
            f'<line class="level" stroke="#7a7a7a" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        legend.append((f"{level[0]} {level[1]:.3f}", "#7a7a7a"))
    x = _WIDTH - _RIGHT - sum(34 + 6.6 * len(name) for name, _ in legend)
    for name, color in legend:
        parts.append(f'<rect x="{x:.1f}" y="16" width="16" height="4" fill="{color}"/>')
        parts.append(f'<text x="{x + 20:.1f}" y="22">{escape(name)}</text>')
        x += 34 + 6.6 * len(name)
    return "\n".join([*parts, "</svg>", ""])


def write_loss_curve(
    path: str | os.PathLike[str],
    train: Points,
    validation: Points,
    title: str = "loss",
    level: tuple[str, float] | None = None,
) -> None:
    """Writes `loss_curve` to `path`."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(loss_curve(train, validation, title, level))
