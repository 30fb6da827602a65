"""A tape as a graph in DOT, the language of Graphviz: `dot -Tsvg tape.dot -o tape.svg`.

A box is an op that runs, an arrow what it reads, with the buffer and its bytes. Phases are
clusters; what lives before or after the step stands outside them.
"""

from __future__ import annotations

from vibetensor.graphs.dataflow import edges
from vibetensor.graphs.tape import PHASES, Buffer, Op, Tape
from vibetensor.viz.page import bytes_text

_COLOURS = {"forward": "#3b7dd8", "backward": "#d8743b", "optimizer": "#4c9f70"}


def to_dot(tape: Tape, name: str = "tape") -> str:
    """The tape as DOT text."""
    lines = [
        f"digraph {_quoted(name)} {{",
        "  rankdir=TB;",
        '  node [shape=box, fontname="sans-serif", fontsize=10];',
        '  edge [fontname="sans-serif", fontsize=8, color="#888888"];',
    ]
    running = [(at, op) for at, op in enumerate(tape.ops) if not op.is_view]
    for phase in PHASES:
        ops = [(at, op) for at, op in running if op.phase == phase]
        if not ops:
            continue
        lines.append(f"  subgraph cluster_{phase} {{")
        lines.append(f'    label="{phase}"; color="{_COLOURS[phase]}";')
        lines += [f"    op{at} [label={_quoted(_label(at, op))}];" for at, op in ops]
        lines.append("  }")
    ends: dict[str, str] = {}
    arrows = []
    for edge in edges(tape):
        source = f"op{edge.writer}" if edge.writer is not None else _end(edge.buffer, "in", ends)
        target = f"op{edge.reader}" if edge.reader is not None else _end(edge.buffer, "out", ends)
        label = _quoted(f"{edge.buffer.name} {bytes_text(edge.nbytes)}")
        arrows.append(f"  {source} -> {target} [label={label}];")
    return "\n".join([*lines, *ends.values(), *arrows, "}", ""])


def _end(buffer: Buffer, side: str, ends: dict[str, str]) -> str:
    """The node of memory before ("in") or after ("out") the step."""
    name = f"{side}{buffer.index}"
    if name not in ends:
        kind = "result" if buffer.role == "output" else buffer.role
        text = f"{kind} {buffer.name}\n{bytes_text(buffer.nbytes)} on {buffer.device}"
        ends[name] = f"  {name} [label={_quoted(text)}, shape=ellipse, style=dashed];"
    return name


def _label(at: int, op: Op) -> str:
    results = ", ".join(map(str, op.writes()))
    return "\n".join(part for part in (f"{at} {op.name}", str(op.source or ""), results) if part)


def _quoted(text: str) -> str:
    """A string of DOT: quotes and backslashes stand for themselves, a newline for a new line."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
