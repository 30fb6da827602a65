"""Removes ops whose results nobody reads.

Pattern: an op that writes scratch buffers only, none of which is read later. Rewrite: nothing
takes its place. Random ops keep their counters, so the numbers of the others stay. Bitwise.
"""

from __future__ import annotations

from vibetensor.graphs.tape import Buffer, Decision, Op, Tape

BITWISE = True


def run(tape: Tape) -> Tape:
    """The tape without dead ops."""
    wanted: set[Buffer] = set()
    kept: list[Op] = []
    decisions: list[Decision] = []
    for op in reversed(tape.ops):
        outputs = list(op.writes())
        lives = not outputs or any(
            view.buffer.role != "scratch" or view.buffer in wanted for view in outputs
        )
        if not lives:
            if not op.is_view:
                text = f"{op.name} goes: nobody reads its results"
                decisions.append(Decision("dead_code", True, text, op))
            continue
        unread = [
            view for view in outputs if view.buffer.role == "scratch" and view.buffer not in wanted
        ]
        if unread and not op.is_view:
            text = f"{op.name} stays: nobody reads {len(unread)} of its {len(outputs)} results, but the others"
            decisions.append(Decision("dead_code", False, text, op))
        kept.append(op)
        wanted.update(view.buffer for view in op.reads())
    kept.reverse()
    return tape.replaced(kept, reversed(decisions))
