"""Casts a value from where it first was instead of from a wider copy of it.

Pattern: `_to_dtype` of the result of `_to_dtype`, whose dtype holds every value of its source's
(bfloat16 to float32, int32 to float64); the source is not written between. Rewrite: one cast from the
source, or its copy where it comes back to its own dtype; the first cast goes if nobody else reads it.
A narrowing cast first stays: it rounds. Bitwise, but for which NaN a NaN is.
On an accelerator a cast to float32 that only `cat` reads goes as well, if another piece is float32
anyway: `cat` widens what it joins.
"""

from __future__ import annotations

from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import Edits, Uses, make_op
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape, View

BITWISE = True

_FLOATS = {  # bits of the mantissa and of the exponent
    vt.float8_e4m3fn: (4, 4), vt.float8_e5m2: (3, 5), vt.float16: (11, 5), vt.bfloat16: (8, 8),
    vt.float32: (24, 8), vt.float64: (53, 11),
}  # fmt: skip
_INTEGERS = {  # bits of a value, whether negative ones are among them
    vt.bool: (1, False), vt.uint8: (8, False), vt.int8: (7, True), vt.int16: (15, True),
    vt.int32: (31, True), vt.int64: (63, True),
}  # fmt: skip


def run(tape: Tape) -> Tape:
    """The tape without casts that lead nowhere new."""
    uses = Uses(tape)
    makers: dict[Buffer, int] = {}  # the cast that makes a buffer which nothing else writes
    ops: list[Op] = []
    decisions: list[Decision] = []
    for at, op in enumerate(tape.ops):
        made = op
        if op.name == "_to_dtype" and not op.is_view:
            first = makers.get(op.args[0].buffer)
            if first is not None:
                made, decision = _folded(uses, ops[first], op, first, at)
                decisions.append(decision)
            (out,) = made.writes()
            if made.name == "_to_dtype" and uses.writes(out.buffer) == [at]:
                makers[out.buffer] = at
        ops.append(made)
    return _joined(tape.replaced(ops, decisions))


def _joined(tape: Tape) -> Tape:
    """The tape with pieces of `cat` as they were before they were widened for it."""
    edits, uses = Edits(tape, "casts"), Uses(tape)
    for at, op in enumerate(tape.ops):
        if op.name != "cat" or op.outputs[0].buffer.device == "cpu":
            continue
        pieces: list[View] = list(op.args[0])
        casts = {i: c for i, v in enumerate(pieces) if (c := _widening(uses, v, at)) is not None}
        wide = op.outputs[0].dtype
        if not casts or all(v.dtype != wide or i in casts for i, v in enumerate(pieces)):
            continue
        narrow = [tape.ops[casts[i]].args[0] if i in casts else v for i, v in enumerate(pieces)]
        edits.replace(at, make_op("cat", (narrow, op.args[1]), [op.outputs[0]], op), casts.values())
        edits.made(f"{len(casts)} pieces are cast as they are joined", op)
    return edits.applied()


def _widening(uses: Uses, piece: View, at: int) -> int | None:
    """The cast of a 16-bit float to float32 that makes what only the op at `at` reads."""
    found = uses.writer(piece, at)
    if found is None or uses.only_reader(piece.buffer) != at:
        return None
    cast = uses.tape.ops[found]
    if cast.name != "_to_dtype" or piece.dtype != vt.float32:
        return None
    source = cast.args[0]
    if source.dtype not in (vt.float16, vt.bfloat16) or source.number:
        return None
    return None if uses.written_between(source.buffer, found, at) else found


def _folded(uses: Uses, first: Op, op: Op, at_first: int, at: int) -> tuple[Op, Decision]:
    """The second of two casts as one from the source of the first, if that may be."""
    (middle,) = first.writes()
    (out,) = op.writes()
    source = first.args[0]
    names = " to ".join(_name(dtype) for dtype in (source.dtype, middle.dtype, out.dtype))
    why_not = ""
    if op.args[0] != middle:
        why_not = "only a part is cast"
    elif not _holds(middle.dtype, source.dtype):
        why_not = f"{_name(middle.dtype)} rounds"
    elif uses.written_between(source.buffer, at_first, at):
        why_not = "the source changes between"
    else:
        try:
            if source.dtype == out.dtype:
                made = make_op("clone", (source,), [out], op)
            else:
                made = make_op("_to_dtype", (source, out.dtype), [out], op)
            return made, Decision("casts", True, f"{names} is one step", made)
        except ValueError:
            why_not = "the layouts differ"
    return op, Decision("casts", False, f"{names} stays: {why_not}", op)


def _name(dtype: Any) -> str:
    return str(dtype).rsplit(".", 1)[-1]


def _holds(wide: Any, narrow: Any) -> bool:
    """Whether every value of one dtype is one of the other."""
    if wide == narrow:
        return True
    if narrow in _FLOATS:
        return wide in _FLOATS and all(a >= b for a, b in zip(_FLOATS[wide], _FLOATS[narrow]))
    bits, signed = _INTEGERS[narrow]
    if wide in _FLOATS:
        # float16's exponent ends at 2**15: no integer dtype but the smallest fits.
        return _FLOATS[wide][0] >= bits and (wide != vt.float16 or bits <= 8)
    more, wide_signed = _INTEGERS[wide]
    return more >= bits and (wide_signed or not signed)
