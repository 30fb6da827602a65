"""Line charts as SVG, without a plotting library."""

from __future__ import annotations

from html import escape

from bars import OURS, TEXT, THEIRS, svg_text

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 760, 300, 60, 40, 40, 20


def curves(title: str, lines: list[tuple[str, list[tuple[float, float]], bool]]) -> str:
    """Lines through points on common axes, with a legend of their labels.

    lines: (label, [(x, y)], whether it is ours); lines of one label share its entry.
    """
    points = [point for _, line, _ in lines for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        up = (y - low) / ((high - low) or 1)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [svg_text(0, 16, title, bold=True)]
    for i in range(5):
        y = low + (high - low) * i / 4
        x = left + (right - left) * i / 4
        across, up = place(x, y)
        parts.append(
            f'<path d="M{LEFT} {up:.1f}H{WIDTH - RIGHT}" stroke="{TEXT}" stroke-opacity="0.3"/>'
        )
        parts.append(svg_text(LEFT - 6, up + 4, f"{y:.3g}", "end"))
        parts.append(svg_text(across, HEIGHT - BOTTOM + 18, f"{x:g}", "middle"))
    seen: dict[str, str] = {}
    for label, line, ours in lines:
        color = OURS if ours else THEIRS
        seen.setdefault(label, color)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        dashes = "" if ours else ' stroke-dasharray="6 4"'  # where ours lies on it, both show
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dashes}/>'
        )
    for i, (label, color) in enumerate(seen.items()):
        parts.append(
            f'<path d="M{WIDTH - 190} {TOP + 16 * i}h24" stroke="{color}" stroke-width="3"/>'
        )
        parts.append(svg_text(WIDTH - 160, TOP + 4 + 16 * i, label))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12" role="img">\n'
        f"<title>{escape(title)}</title>\n"
    )
    return head + "\n".join([*parts, "</svg>"]) + "\n"
