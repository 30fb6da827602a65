"""Computes a value once that a step computes twice (common subexpressions).

Pattern: two ops of one name with equal arguments, whose inputs have not been written in between and
whose first result is not written later. Rewrite: readers of the second read the first. Ops that
draw random numbers, write in place or alias their input stay. Bitwise.
"""

from __future__ import annotations

from typing import Any

from vibetensor.graphs.rewrite import with_buffers
from vibetensor.graphs.tape import Buffer, Op, Tape, View

BITWISE = True


def run(tape: Tape) -> Tape:
    """The tape with repeated ops left out."""
    writes: dict[Buffer, int] = {}
    for op in tape.ops:
        for view in op.writes():
            if not op.is_view:
                writes[view.buffer] = writes.get(view.buffer, 0) + 1
    version: dict[Buffer, int] = {}
    known: dict[Any, Op] = {}
    instead: dict[Buffer, Buffer] = {}
    kept: list[Op] = []
    for op in tape.ops:
        op = with_buffers(op, instead)
        if op.is_view:
            kept.append(op)
            continue
        if _pure(op, writes):
            key = _key(op, version)
            first = known.get(key) if key is not None else None
            if first is not None and _same_geometry(first, op):
                for old, new in zip(op.writes(), first.writes()):
                    instead[old.buffer] = new.buffer
                continue
            if key is not None:
                known[key] = op
        for view in op.writes():
            version[view.buffer] = version.get(view.buffer, 0) + 1
        kept.append(op)
    return tape.replaced(kept)


def _pure(op: Op, writes: dict[Buffer, int]) -> bool:
    """Its outputs are scratch that it alone writes, and depend on its arguments only."""
    return (
        not op.is_random
        and bool(op.outputs)
        and all(view.buffer.role == "scratch" and writes[view.buffer] == 1 for view in op.writes())
    )


def _key(op: Op, version: dict[Buffer, int]) -> Any:
    def part(arg: Any) -> Any:
        if isinstance(arg, View):
            return (arg, version.get(arg.buffer, 0))
        if isinstance(arg, list | tuple):
            return tuple(part(item) for item in arg)
        # 1, 1.0 and True are equal and not the same argument; neither are 0.0 and -0.0.
        return (type(arg), repr(arg))

    # What an op reads of its output's dtype is no argument: compare it too.
    outputs = tuple((v.dtype, v.sizes, v.strides) if v else None for v in op.outputs)
    return (op.name, tuple(part(arg) for arg in op.args), outputs)


def _same_geometry(a: Op, b: Op) -> bool:
    return all(
        (x is None) == (y is None)
        and (x is None or (x.offset == y.offset and x.buffer.nbytes == y.buffer.nbytes))
        for x, y in zip(a.outputs, b.outputs)
    )
