"""The report as one HTML page that needs no network: time, memory over the ops, passes, the tape.

report_page.html is its body, report_page.js draws, report_page.css styles; what they share with the
project's other pages is in vibetensor.viz.page. All text reaches the page as JSON and is shown as
text, so no name can be markup.
"""

from __future__ import annotations

import linecache
from pathlib import Path
from typing import Any

from vibetensor.graphs.arena import blocks, live_at, live_bytes
from vibetensor.graphs.dataflow import view_bytes
from vibetensor.graphs.report import bound_text, in_order, memory_by_role, recaptured, running
from vibetensor.graphs.tape import PHASES, Op, Source, Tape
from vibetensor.viz.page import html_page

_FOLDER = Path(__file__).parent
# An optimizer's op may list thousands of tensors.
_MOST_TEXT = 1500
_MOST_BUFFERS = 64


def report_page(name: str, variants: list[Any], latest: Any = None) -> str:
    """The HTML text of a page that shows the captures of a function.

    latest: the one that it shows first; None is the last one made."""
    body, style, script = (
        (_FOLDER / f"report_page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    data = report_data(variants, latest)
    return html_page(f"Capture of {name}", body, data, style=style, script=script)


def report_data(variants: list[Any], latest: Any = None) -> dict[str, Any]:
    """What the page's script reads."""
    variants = in_order(variants)
    lines = _Lines()
    captures = [_capture(variant, variants, lines) for variant in variants]
    shown = next((at for at, v in enumerate(variants) if v is latest), len(variants) - 1)
    return {"phases": PHASES, "captures": captures, "lines": lines.made, "shown": shown}


class _Lines:
    """Lines of the program by number, each with its code: [short, file, line, function, code]."""

    def __init__(self) -> None:
        self.made: list[list[Any]] = []
        self._known: dict[tuple[str, int], int] = {}

    def number(self, source: Source | None) -> int:
        if source is None:
            return -1
        key = (source.file, source.line)
        if key not in self._known:
            self._known[key] = len(self.made)
            code = linecache.getline(source.file, source.line).strip()
            self.made.append([str(source), source.file, source.line, source.function, code])
        return self._known[key]


def _capture(variant: Any, variants: list[Any], lines: _Lines) -> dict[str, Any]:
    tape: Tape = variant.tape
    place = {id(op): at for at, op in enumerate(tape.ops)}
    return {
        "number": variant.course.number,
        "replays": variant.replays,
        "recorded": len(running(variant.recording.tape)),
        "bound": bound_text(tape),
        "memory": memory_by_role(tape),
        "facts": [[name, fact.text] for name, fact in variant.course.facts.items()],
        "again": recaptured(variant, variants),
        "passes": [list(counts) for counts in variant.tape.passes],
        "decisions": [
            [d.by, d.made, d.text, d.op.name, lines.number(d.op.source), place.get(id(d.op), -1)]
            for d in tape.decisions
        ],
        "ops": [_op(op, lines) for op in tape.ops],
        "arenas": [_arena(tape, device, plan) for device, plan in variant.lowered.plans.items()],
        "profile": _profile(variant.profile),
    }


def _op(op: Op, lines: _Lines) -> list[Any]:
    """[name, phase, line, call, is a view, bytes read, bytes written, buffers]"""
    buffers = dict.fromkeys(view.buffer.index for view in (*op.writes(), *op.reads()))
    return [
        op.name,
        PHASES.index(op.phase),
        lines.number(op.source),
        _short(op.text()),
        int(op.is_view),
        0 if op.is_view else sum(map(view_bytes, op.reads())),
        0 if op.is_view else sum(map(view_bytes, op.writes())),
        list(buffers)[:_MOST_BUFFERS],
    ]


def _short(text: str) -> str:
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[:_MOST_TEXT]}… ({len(text) - _MOST_TEXT} characters more)"


def _arena(tape: Tape, device: str, plan: Any) -> dict[str, Any]:
    """blocks: [buffer, name, first op, last op, offset, bytes, the buffer whose place it took].
    at_peak: numbers of those that are live there."""
    found = blocks(tape, plan)
    number = {block.buffer: at for at, block in enumerate(found)}
    return {
        "device": device,
        "nbytes": plan.nbytes,
        "bound": plan.lower_bound,
        "peak": plan.peak_op,
        "live": live_bytes(tape, plan),
        "at_peak": [number[block.buffer] for block in live_at(found, plan.peak_op)],
        "blocks": [
            [
                block.buffer.index,
                block.buffer.name,
                block.first,
                block.last,
                block.offset,
                block.nbytes,
                block.in_place_of.name if block.in_place_of is not None else None,
            ]
            for block in found
        ],
    }


def _profile(profile: Any) -> dict[str, Any] | None:
    """times: [op, microseconds], medians."""
    if profile is None:
        return None
    return {
        "runs": profile.runs,
        "replay": profile.replay * 1e6,
        "total": profile.total * 1e6,
        "times": [
            [at, round(seconds * 1e6, 4)] for at, seconds in zip(profile.indices, profile.medians)
        ],
    }
