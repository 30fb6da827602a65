"""Adds a residual and normalises the sum in one pass over memory, forward and backward.

Pattern: `add` of two tensors of one shape, or of rows and some rows that come again (positions), then
`layer_norm` or `rms_norm` of the sum; or the norm's backward, whose input gradient is then added to
another. Casts of the rows, of the incoming gradient and of the sum of gradients belong to it, as mixed
precision makes them, and so does the sum of up to four incoming gradients in 16 bits (of q, k and v).
Rewrite: one op that writes the sum, the rows and the statistics, or the sum of gradients and those of
weight and bias. Bitwise on the CPU: the arithmetic is that of the ops one after the other, roundings
included.
On CUDA statistics of 16-bit rows, and gradients of weight and bias, are summed in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import Edits, Uses, is_dense, make_op
from vibetensor.graphs.tape import Buffer, Op, Tape, View

BITWISE = False  # on CUDA

_FORWARD = {"native_layer_norm": "_residual_layer_norm", "_rms_norm": "_residual_rms_norm"}
_BACKWARD = {
    "native_layer_norm_backward": "_residual_layer_norm_backward",
    "_rms_norm_backward": "_residual_rms_norm_backward",
}
_HALF = (vt.bfloat16, vt.float16)
_MOST_TERMS = 4  # of a gradient that a norm adds up itself


def run(tape: Tape) -> Tape:
    """The tape with residual adds in the norms beside them."""
    edits, uses = Edits(tape, "residual_norm"), Uses(tape)
    for at, op in enumerate(tape.ops):
        if op.name in _FORWARD:
            _forward(edits, uses, at, op)
        elif op.name in _BACKWARD:
            _backward(edits, uses, at, op)
    return edits.applied()


def _made(edits: Edits, op: Op, new: Op, parts: list[str]) -> None:
    edits.made(f"{' + '.join(parts)} as {new.name}", op)
    for view in new.writes():
        if view.buffer.device != "cpu":
            edits.reorders(view)


def _forward(edits: Edits, uses: Uses, at: int, op: Op) -> None:
    ops = uses.tape.ops
    x, result = op.args[0], op.outputs[0]
    place, self, residual = at, x, None
    found = uses.writer(x, at)
    if found is not None and edits.free(found) and ops[found].name in ("add", "add_"):
        why = _refused(ops[found], x, lambda: uses.can_run_at(at, found), op.args[1])
        if any(v is not None and v.buffer is x.buffer for v in op.inputs[1:]):
            why = "its weight or bias is a part of the sum"
        if why:
            edits.refused(f"add and {op.name} stay two ops: {why}", op)
        else:
            place, (self, residual) = found, ops[found].args[:2]
            if self.sizes != x.sizes:
                self, residual = residual, self
    cast = (
        _cast_of(edits, uses, result, at, place, only=True) if result.dtype == vt.float32 else None
    )
    if residual is None and cast is None:
        return
    if residual is None and not is_dense(x):
        return
    low = result if cast is None else ops[cast].outputs[0]
    _, *statistics = op.outputs
    results = [low, *([x] if residual is not None else []), *statistics]
    made = make_op(
        _FORWARD[op.name], (self, residual, *op.args[1:], low.dtype), results, ops[place]
    )
    edits.replace(place, made, {at, *([cast] if cast is not None else [])} - {place})
    parts = ["add"] * (residual is not None) + [op.name] + ["_to_dtype"] * (cast is not None)
    _made(edits, op, made, parts)


def _backward(edits: Edits, uses: Uses, at: int, op: Op) -> None:
    ops = uses.tape.ops
    grad, x = op.args[:2]
    dx = op.outputs[0]
    if not all(map(is_dense, (grad, x, dx))):
        return
    terms, gone = _terms(edits, uses, grad, at, x.dtype)
    grad = terms[0]
    parts = [*sorted({ops[i].name for i in gone}, reverse=True), op.name]
    residual, total, last = None, dx, at
    add = uses.only_reader(dx.buffer)
    if (
        add is not None
        and edits.free(add)
        and ops[add].name in ("add", "add_")
        and dx in ops[add].args[:2]
    ):
        why = _refused(ops[add], dx, lambda: uses.can_run_at(add, at))
        other = ops[add].args[1 if ops[add].args[0] == dx else 0]
        if not why and other.dtype != dx.dtype:
            why = f"{other} is of another dtype"
        if other.buffer in {v.buffer for v in op.writes()}:
            why = f"{other} comes from the norm as well"
        if ops[add].outputs[0].buffer in {v.buffer for v in (*terms, *op.reads())}:
            why = "the sum takes the place of what the norm reads"
        if why:
            edits.refused(f"{op.name} and add stay two ops: {why}", op)
        else:
            residual, total, last = other, ops[add].outputs[0], add
            gone.add(add)
            parts.append("add")
    cast = _cast_of(edits, uses, total, last, at, only=False) if total.dtype == vt.float32 else None
    if cast is not None:
        gone.add(cast)
        parts.append("_to_dtype")
    if not gone:
        return
    low = None if cast is None else ops[cast].outputs[0]
    results = [total, *(v for v in op.outputs[1:] if v is not None), *([low] if low else [])]
    made = make_op(
        _BACKWARD[op.name],
        (grad, residual, *op.args[1:], low.dtype if low else None, terms[1:], False),
        results,
        op,
    )
    edits.replace(at, made, gone)
    _made(edits, op, made, parts)


def _terms(
    edits: Edits, uses: Uses, grad: View, at: int, dtype: Any
) -> tuple[list[View], set[int]]:
    """What the gradient that `at` reads is the sum of, in order, and the ops that widen and add it,
    which nobody else needs: of the products that mixed precision leaves in 16 bits."""
    ops = uses.tape.ops
    later: list[View] = []
    gone: set[int] = set()
    sums: set[Buffer] = set()
    view, place, widened = grad, at, False
    while len(later) < _MOST_TERMS - 1:
        found = uses.writer(view, place)
        if found is None or not edits.free(found) or ops[found].name not in ("add", "add_"):
            break
        first, second, alpha = ops[found].args
        plain = isinstance(second, View) and not second.number and alpha == 1
        if not plain or first.dtype != dtype or not first.sizes == second.sizes == view.sizes:
            break
        narrow, cast = _narrow(edits, uses, second, found, at)
        if cast and uses.only_reader(second.buffer) != found:
            narrow, cast = second, set()
        if not is_dense(first) or not is_dense(narrow) or narrow.dtype.itemsize > dtype.itemsize:
            break
        if uses.written_between(narrow.buffer, found, at) or narrow.buffer in sums | {view.buffer}:
            break
        gone |= {found} | cast
        sums.add(view.buffer)
        later.insert(0, narrow)
        view, place, widened = first, found, widened or narrow.dtype != dtype
    narrow, cast = _narrow(edits, uses, view, place, at)
    widened = widened or bool(cast)
    if cast:
        sums.add(view.buffer)
    gone |= cast
    since = min(cast, default=place)
    alone = all(
        b.role == "scratch"
        and {i for i in uses.reads(b) if i >= since} <= gone | {at}
        and {i for i in uses.writes(b) if i >= since} <= gone
        for b in sums
    )
    changed = any(place < i < at and i not in gone for i in uses.writes(narrow.buffer))
    if not widened or not alone or changed or grad.dtype != dtype:
        return [grad], set()
    return [narrow, *later], gone


def _narrow(edits: Edits, uses: Uses, view: View, before: int, at: int) -> tuple[View, set[int]]:
    """What a float32 view was in 16 bits, with the cast, if it is still that at `at`; or the view."""
    found = uses.writer(view, before)
    if found is None or not edits.free(found) or uses.tape.ops[found].name != "_to_dtype":
        return view, set()
    source = uses.tape.ops[found].args[0]
    if view.dtype != vt.float32 or source.dtype not in _HALF or not is_dense(source):
        return view, set()
    if uses.written_between(source.buffer, found, at):
        return view, set()
    return source, {found}


def _refused(
    add: Op, like: View, movable: Callable[[], bool], normalized: Sequence[int] = ()
) -> str | None:
    """Why an add is not part of a norm; None if it can be. normalized: the shape of a norm's rows,
    whole numbers of which one operand may have that come again and again."""
    first, second, alpha = add.args
    if alpha != 1:
        return f"it adds {alpha} times its second operand"
    for operand, other in ((first, second), (second, first)):
        if operand.sizes != like.sizes and not (
            normalized and other.sizes == like.sizes and _come_again(operand, like, normalized)
        ):
            return f"{operand} is broadcast"
        if not is_dense(operand):
            return f"{operand} is not contiguous"
        if not operand.dtype.is_floating_point:
            return f"{operand} is no float"
    out = add.outputs[0]
    if out is None or not is_dense(out) or out.sizes != like.sizes:
        return "the sum is not contiguous"
    if vt.promote_types(first.dtype, second.dtype) != out.dtype or out.dtype != like.dtype:
        return f"the sum is rounded to {out.dtype}"
    memory = (first, second, out)
    if any(a.buffer is b.buffer and a != b for a in memory for b in memory):
        return "its operands overlap"
    return None if movable() else "what they use changes between them"


def _come_again(operand: View, like: View, normalized: Sequence[int]) -> bool:
    """Whether it has whole rows and the last dimensions of `like`."""
    last = tuple(operand.sizes)
    while len(last) > len(normalized) and last[0] == 1:
        last = last[1:]
    return len(normalized) <= len(last) and last == like.sizes[len(like.sizes) - len(last) :]


def _cast_of(
    edits: Edits, uses: Uses, view: View, after: int, place: int, *, only: bool
) -> int | None:
    """The cast to a 16-bit float of this float32 view, as it is after `after`, that can run at
    `place`. only: nobody else reads it."""
    ops = uses.tape.ops
    if only:
        reader = uses.only_reader(view.buffer)
        readers = [] if reader is None else [reader]
    else:
        readers = [at for at in uses.reads(view.buffer) if at > after]
    for at in readers:
        if uses.written_between(view.buffer, after, at):
            return None
        op = ops[at]
        if op.name != "_to_dtype" or op.args[0] != view or not edits.free(at):
            continue
        low = op.outputs[0]
        touched = uses.touched_between(low.buffer, place, at)
        if low.dtype in _HALF and is_dense(low) and is_dense(view) and not touched:
            return at
    return None
