"""Computes a value once that a step computes twice (common subexpressions).

Pattern: two ops of one name with equal arguments, whose inputs have not been written in between and
whose first result is not written later. Rewrite: readers of the second read the first. Ops that
draw random numbers, write in place or alias their input stay. Bitwise.
"""

from __future__ import annotations

from typing import Any

from vibetensor.graphs.rewrite import with_buffers
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape, View

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
    decisions: list[Decision] = []
    earlier: dict[Any, tuple[Op, Any]] = {}  # by calls without the versions of what they read
    for op in tape.ops:
        op = with_buffers(op, instead)
        if op.is_view:
            kept.append(op)
            continue
        key = _key(op, version)
        pure = _pure(op, writes)
        if pure:
            first = known.get(key)
            if first is not None and _same_geometry(first, op):
                for old, new in zip(op.writes(), first.writes()):
                    instead[old.buffer] = new.buffer
                text = f"{op.name} once more on the same values is the first one's result"
                decisions.append(Decision("repeated", True, text, op))
                continue
            known[key] = op
        if not _in_place(op):
            call = _key(op, {})[:-1]  # under any switches
            if call in earlier:
                why_not = _why_not(op, key, *earlier[call], writes)
                text = f"{op.name} once more on the same tensors stays: {why_not}"
                decisions.append(Decision("repeated", False, text, op))
            earlier[call] = (op, key)
        for view in op.writes():
            version[view.buffer] = version.get(view.buffer, 0) + 1
        kept.append(op)
    return tape.replaced(kept, decisions)


def _in_place(op: Op) -> bool:
    """Whether it changes what it reads: again is not the same."""
    read = {view.buffer for view in op.reads()}
    return not op.outputs or any(view.buffer in read for view in op.writes())


def _why_not(op: Op, key: Any, first: Op, first_key: Any, writes: dict[Buffer, int]) -> str:
    """Why an op is not left out that is called as an earlier one was."""
    if op.is_random:
        return "it draws random numbers"
    if op.call.switches != first.call.switches:
        return "it is computed under other switches of kernels (TF32, cuDNN's)"
    if key != first_key:
        return "what it reads has changed in between"
    for one in (first, op):
        for view in one.writes():
            if view.buffer.role != "scratch":
                return "a result lives on after the step"
            if writes[view.buffer] != 1:
                return "a result is changed afterwards"
    return "the results lie differently in memory"


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
    return (op.name, tuple(part(arg) for arg in op.args), outputs, op.call.switches)


def _same_geometry(a: Op, b: Op) -> bool:
    return all(
        (x is None) == (y is None)
        and (x is None or (x.offset == y.offset and x.buffer.nbytes == y.buffer.nbytes))
        for x, y in zip(a.outputs, b.outputs)
    )
