"""Removes ops whose results nobody reads.

Pattern: an op that writes scratch buffers only, none of which is read later. Rewrite: nothing
takes its place. Random ops keep their counters, so the numbers of the others stay. Bitwise.
"""

from __future__ import annotations

from vibetensor.graphs.tape import Buffer, Op, Tape

BITWISE = True


def run(tape: Tape) -> Tape:
    """The tape without dead ops."""
    wanted: set[Buffer] = set()
    kept: list[Op] = []
    for op in reversed(tape.ops):
        outputs = list(op.writes())
        lives = not outputs or any(
            view.buffer.role != "scratch" or view.buffer in wanted for view in outputs
        )
        if not lives:
            continue
        kept.append(op)
        wanted.update(view.buffer for view in op.reads())
    kept.reverse()
    return tape.replaced(kept)
