"""Computes once what is the same in every replay.

Pattern: ops whose inputs are numbers of the program, or results of such ops (`arange`, `zeros`,
masks made from them, their casts); all that write one scratch buffer, with no other op that reads it
before they are done. Rewrite: they run once, when the capture is made, and what others read of them
stays in memory of its own: at most 16 MiB a buffer and 64 MiB in all. Random ops, inputs, learning
rates and whatever somebody else holds are no constants. Bitwise.
"""

from __future__ import annotations

from vibetensor.graphs.rewrite import with_buffers
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape

BITWISE = True
MOST_BYTES = 16 << 20
MOST_BYTES_IN_ALL = 64 << 20


def run(tape: Tape) -> Tape:
    """The tape with its constants made by `setup`."""
    constant = {
        buffer
        for buffer in tape.buffers
        if buffer.role in ("scratch", "constant") or (buffer.role == "state" and buffer.fixed)
    }
    decisions: list[Decision] = []
    while True:
        _drop_changing(tape, constant)
        too_large = _too_large(tape, constant)
        if not too_large:
            break
        constant -= too_large.keys()
        decisions += [
            Decision("constants", False, f"{buffer.nbytes:,} bytes are too many to keep", op)
            for buffer, op in too_large.items()
        ]
    once = [op for op in tape.ops if _is_constant(op, constant)]
    if not once:
        return tape.replaced(tape.ops, decisions)
    kept = [op for op in tape.ops if not _is_constant(op, constant)]
    made = {view.buffer: None for op in once for view in op.writes()}
    instead = {b: tape.new_buffer(b.nbytes, b.device, "constant") for b in made}
    decisions += [Decision("constants", True, f"{op.name} runs once", op) for op in once]
    return tape.replaced(
        [with_buffers(op, instead) for op in kept],
        decisions,
        setup=[with_buffers(op, instead) for op in once],
    )


def _is_constant(op: Op, constant: set[Buffer]) -> bool:
    """Whether the op writes constants only, given what they are."""
    return not op.is_view and any(view.buffer in constant for view in op.writes())


def _drop_changing(tape: Tape, constant: set[Buffer]) -> None:
    """Takes out the buffers that depend on others, until none is left that does."""
    users: dict[Buffer, list[int]] = {}  # the ops that read or write a buffer
    last_writer: dict[Buffer, int] = {}
    for at, op in enumerate(tape.ops):
        if op.is_view:
            continue
        for view in (*op.reads(), *op.writes()):
            users.setdefault(view.buffer, []).append(at)
        last_writer.update((view.buffer, at) for view in op.writes())
    seen: set[int] = set()
    waiting = [
        at for at, op in enumerate(tape.ops) if not op.is_view and not _may_run_once(op, constant)
    ]
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        op = tape.ops[at]
        changing = {view.buffer for view in op.writes()}
        # It runs in every replay: a value that another op still changes would be read too late.
        changing.update(view.buffer for view in op.reads() if last_writer.get(view.buffer, -1) > at)
        changing &= constant
        constant -= changing
        for buffer in changing:
            waiting += users[buffer]


def _may_run_once(op: Op, constant: set[Buffer]) -> bool:
    return (
        any(True for _ in op.writes())
        and not op.is_random
        and op.capture_class not in ("opaque", "optimizer")
        and all(view.buffer in constant for view in (*op.reads(), *op.writes()))
    )


def _too_large(tape: Tape, constant: set[Buffer]) -> dict[Buffer, Op]:
    """What would have to stay in memory and is too much, each with the op that writes it."""
    writers: dict[Buffer, Op] = {}
    read: dict[Buffer, None] = {}
    for op in tape.ops:
        if _is_constant(op, constant):
            for view in op.writes():
                writers.setdefault(view.buffer, op)
        elif not op.is_view:
            read.update((view.buffer, None) for view in op.reads())
    total, found = 0, {}
    for buffer in sorted(writers.keys() & read.keys(), key=lambda b: (b.nbytes, b.index)):
        total += buffer.nbytes
        if buffer.nbytes > MOST_BYTES or total > MOST_BYTES_IN_ALL:
            found[buffer] = writers[buffer]
    return found
