"""A memory snapshot as one HTML file that needs no network: memory over time, segments, pools."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vibetensor.viz.memory_timeline import Stacks, Timeline, places_at_peak, pool_rows, timeline
from vibetensor.viz.page import bytes_text, html_page, table

_FOLDER = Path(__file__).parent


def _segment(segment: dict[str, Any], stacks: Stacks) -> dict[str, Any]:
    pool = tuple(segment.get("segment_pool_id", (0, 0)))
    address, blocks = segment["address"], []
    for block in segment["blocks"]:
        requested = block.get("requested_size", block["size"])
        frames = stacks.number(block.get("frames"))
        blocks.append([block["size"], requested, block["state"], frames, address])
        address += block["size"]
    used = sum(b["size"] for b in segment["blocks"] if b["state"] == "active_allocated")
    label = (
        f"{segment['address']:#x}, {bytes_text(segment['total_size'])}, "
        f"{segment.get('segment_type', '')}, {bytes_text(used)} allocated, "
        f"stream {segment['stream']:#x}" + ("" if pool == (0, 0) else f", pool {pool}")
    )
    return {
        "device": segment.get("device", 0),
        "size": segment["total_size"],
        "label": label,
        "blocks": blocks,
    }


def _pools(segments: list[dict[str, Any]]) -> str:
    rows = [
        (
            str(row["device"]),
            "default" if row["pool"] == (0, 0) else str(row["pool"]),
            *(
                bytes_text(row[key])
                for key in ("reserved", "allocated", "pending", "free", "largest_free")
            ),
            str(row["segments"]),
            f"{row['stream']:#x}",
        )
        for row in pool_rows(segments)
    ]
    names = ("device", "pool", "reserved", "allocated", "pending", "free", "largest free")
    return table((*names, "segments", "stream"), rows)


def _peaks(lines: list[Timeline], stacks: Stacks) -> str:
    parts = []
    for device, line in enumerate(lines):
        peak, rows = places_at_peak(line)
        if not rows:
            continue
        parts.append(f"<p>Device {device}: {bytes_text(peak)} at the peak.</p>")
        parts.append(
            table(
                ("bytes", "allocations", "from"),
                (
                    (bytes_text(b), str(n), "\n".join(stacks.text(stack)[:6]) or "(no stack)")
                    for b, n, stack in rows
                ),
            )
        )
    return "\n".join(parts) or '<p class="note">Nothing was allocated.</p>'


def _ooms(lines: list[Timeline], stacks: Stacks) -> str:
    rows = [
        (
            str(device),
            str(position),
            bytes_text(size),
            bytes_text(free),
            "\n".join(stacks.text(stack)) or "(no stack)",
        )
        for device, line in enumerate(lines)
        for position, size, free, stack in line.ooms
    ]
    if not rows:
        return ""
    shown = table(("device", "event", "asked for", "free on the device", "from"), rows)
    return f"<h2>Out of memory</h2>\n{shown}"


def memory_page(snapshot: dict[str, Any], title: str = "CUDA memory") -> str:
    """The HTML text of a page that shows a snapshot (see `load_snapshot`).

    Memory over time is a stack of the allocations live at each event, coloured by the place they
    were made at, under the line of what the allocator held; the mouse shows sizes and call stacks,
    dragging zooms. Below are segments with their blocks, pools, out-of-memory errors, and who held
    the memory at its peak.
    """
    stacks = Stacks()
    segments = list(snapshot["segments"])
    traces = list(snapshot.get("device_traces", ()))
    count = max([len(traces), *(s.get("device", 0) + 1 for s in segments)], default=0) or 1
    lines = []
    for device in range(count):
        own = [s for s in segments if s.get("device", 0) == device]
        lines.append(timeline(traces[device] if device < len(traces) else (), own, stacks))
    data = {
        "timelines": [vars(line) for line in lines],
        "segments": [_segment(segment, stacks) for segment in segments],
        "lines": stacks.lines,
        "stacks": stacks.stacks,
    }
    busiest = max(range(count), key=lambda n: len(lines[n].allocations))
    options = "".join(
        f'<option value="{n}"{" selected" if n == busiest else ""}>{n}</option>'
        for n in range(count)
    )
    settings = snapshot.get("allocator_settings") or {}
    body = f"""<p>Device <select id="device">{options}</select>
by <select id="axis"><option value="event">event</option><option value="time">time</option></select>
<span id="scale" class="note"></span></p>
<canvas id="timeline" width="1200" height="380"></canvas>
<p class="note">Each colour is a place that allocates; the grey line is what the allocator holds.
Drag to zoom, double-click to see all.</p>
{_ooms(lines, stacks)}
<h2>Who held the memory at its peak</h2>
{_peaks(lines, stacks)}
<h2>Pools</h2>
{_pools(segments)}
<h2>Segments</h2>
<div id="segments"></div>
<h2>Settings</h2>
{table(("setting", "value"), ((str(k), str(v)) for k, v in settings.items()))}"""
    script = (_FOLDER / "memory.js").read_text(encoding="utf-8")
    style = (_FOLDER / "memory.css").read_text(encoding="utf-8")
    return html_page(title, body, data, style=style, script=script)


def write_memory_page(
    path: str | os.PathLike[str], snapshot: dict[str, Any], title: str = "CUDA memory"
) -> None:
    """Writes `memory_page` to `path`."""
    page = memory_page(snapshot, title)
    # A file name that is not UTF-8 has lone surrogates in Python; the page shows them as "?".
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(page)
