"""Bar charts as SVG, without a plotting library."""

from __future__ import annotations

from html import escape

WIDTH, LABELS, ROW, GAP = 760, 210, 20, 14
OURS, THEIRS, TEXT = "#2f7d5b", "#b9a26b", "#7f8894"  # readable on light and on dark pages


def bars(title: str, groups: list[tuple[str, list[tuple[str, float, str, bool]]]]) -> str:
    """Horizontal bars in groups, each group on a scale of its own.

    groups: (name, [(label, value, text beside the bar, whether it is ours)]).
    """
    parts, y = [], 34
    for name, rows in groups:
        largest = max((value for _, value, _, _ in rows), default=0.0) or 1.0
        parts.append(svg_text(0, y + 14, name, bold=True))
        y += ROW + 2
        for label, value, text, ours in rows:
            length = max(value / largest * (WIDTH - LABELS - 120), 1)
            parts.append(svg_text(LABELS - 8, y + 14, label, anchor="end"))
            parts.append(
                f'<rect x="{LABELS}" y="{y + 2}" width="{length:.1f}" height="{ROW - 5}" rx="2" '
                f'fill="{OURS if ours else THEIRS}"/>'
            )
            parts.append(svg_text(LABELS + length + 6, y + 14, text))
            y += ROW
        y += GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'height="{y}" font-family="sans-serif" font-size="12" role="img">\n'
        f"<title>{escape(title)}</title>\n" + svg_text(0, 16, title, bold=True)
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def svg_text(x: float, y: float, content: str, anchor: str = "start", bold: bool = False) -> str:
    """A text element of a chart."""
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{TEXT}"{weight}>'
        f"{escape(content)}</text>"
    )
