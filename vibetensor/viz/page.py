"""What the project's pages share: one HTML file with its data, style and scripts, no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent

# Scripts and styles of the page itself run, and nothing may be loaded.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


def bytes_text(nbytes: int) -> str:
    """A size for people: 512 B, 1.50 MiB."""
    value, unit = float(nbytes), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    while abs(value) >= 1024 and unit + 1 < len(units):
        value, unit = value / 1024, unit + 1
    return f"{value:.2f} {units[unit]}" if unit else f"{nbytes} B"


def embedded_json(value: Any) -> str:
    """JSON text that is safe inside a script element: it holds no "<", so nothing ends the element
    or starts a comment, whatever the strings are."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are escaped, a cell of several lines is kept as it is."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    parts = [f"<table><thead><tr>{cells}</tr></thead><tbody>"]
    for row in rows:
        texts = (f"<pre>{escape(c)}</pre>" if "\n" in c else escape(c) for c in row)
        parts.append("<tr>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    return "\n".join([*parts, "</tbody></table>"])


def html_page(title: str, body: str, data: Any, *, style: str = "", script: str) -> str:
    """A whole page. body is HTML; `data` goes into the element of id "data" as JSON; `style` and
    `script` are added to what all pages have (page.css, page.js)."""
    shared_style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    shared_script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{shared_style}{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
<div id="tip"></div>
<script type="application/json" id="data">{embedded_json(data)}</script>
<script>
{shared_script}{script}</script>
</body>
</html>
"""
