"""Which op's result an op reads: the edges of a tape, through views and changes in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vibetensor.graphs.tape import Buffer, Tape, View


@dataclass(frozen=True)
class Edge:
    """writer and reader are places on the tape. writer is None for what was there before the step,
    reader None for what is there after it. nbytes: of the view that is read (or was written)."""

    writer: int | None
    reader: int | None
    buffer: Buffer
    nbytes: int


def view_bytes(view: View) -> int:
    """Bytes of a view's elements."""
    count = 1
    for size in view.sizes:
        count *= size
    return count * view.dtype.itemsize


def edges(tape: Tape) -> Iterator[Edge]:
    """Every edge between ops that run, and from and to what outlives the step, by reader."""
    # By buffer: who wrote which bytes, as far as nobody has written over them.
    written: dict[Buffer, list[tuple[int, int, int]]] = {}
    for at, op in enumerate(tape.ops):
        if op.is_view:
            continue
        known: set[tuple[int | None, Buffer]] = set()
        for view in op.reads():
            low, high = _span(view)
            over = [w for w in written.get(view.buffer, ()) if w[0] < high and low < w[1]]
            writers: list[int | None] = [writer for _, _, writer in over]
            if not over and view.buffer.role not in ("scratch", "output"):
                writers.append(None)
            for writer in writers:
                if (writer, view.buffer) not in known:
                    known.add((writer, view.buffer))
                    yield Edge(writer, at, view.buffer, view_bytes(view))
        for view in op.writes():
            low, high = _span(view)
            kept = written.setdefault(view.buffer, [])
            if view_bytes(view) == high - low:
                # All of it is new: whoever wrote inside is seen no more.
                kept[:] = [w for w in kept if not (low <= w[0] and w[1] <= high)]
            kept.append((low, high, at))
    for buffer, kept in written.items():
        if buffer.role != "scratch":
            for writer in dict.fromkeys(writer for _, _, writer in kept):
                yield Edge(writer, None, buffer, buffer.nbytes)


def _span(view: View) -> tuple[int, int]:
    """The first byte of a view and the one after its last."""
    if 0 in view.sizes:
        return (0, 0)
    item = view.dtype.itemsize
    last = sum((size - 1) * stride for size, stride in zip(view.sizes, view.strides))
    return (view.offset * item, (view.offset + last + 1) * item)
