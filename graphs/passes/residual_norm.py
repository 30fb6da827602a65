"""Adds a residual and normalises the sum in one pass over memory, forward and backward.

Pattern: `add` of two tensors of one shape, then `layer_norm` or `rms_norm` of the sum; or the
norm's backward, whose input gradient is then added to another. Casts of the rows, of the incoming
gradient and of the sum of gradients belong to it, as mixed precision makes them. Rewrite: one op
that writes the sum, the rows and the statistics, or the sum of gradients and those of weight and
bias. Bitwise on the CPU: the arithmetic is that of the ops one after the other, roundings included.
On CUDA statistics of 16-bit rows, and gradients of weight and bias, are summed in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import Edits, Uses, is_dense, make_op
from vibetensor.graphs.tape import Op, Tape, View

BITWISE = False  # on CUDA

_FORWARD = {"native_layer_norm": "_residual_layer_norm", "_rms_norm": "_residual_rms_norm"}
_BACKWARD = {
    "native_layer_norm_backward": "_residual_layer_norm_backward",
    "_rms_norm_backward": "_residual_rms_norm_backward",
}
_HALF = (vt.bfloat16, vt.float16)


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
        why = _refused(ops[found], x, lambda: uses.can_run_at(at, found))
        if any(v is not None and v.buffer is x.buffer for v in op.inputs[1:]):
            why = "its weight or bias is a part of the sum"
        if why:
            edits.refused(f"add and {op.name} stay two ops: {why}", op)
        else:
            place, (self, residual) = found, ops[found].args[:2]
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
    gone: set[int] = set()
    parts = [op.name]
    widened = uses.writer(grad, at)
    if (
        widened is not None
        and edits.free(widened)
        and ops[widened].name == "_to_dtype"
        and ops[widened].args[0].dtype in _HALF
        and grad.dtype == vt.float32
        and is_dense(ops[widened].args[0])
        and uses.only_reader(grad.buffer) == at
        and not uses.written_between(ops[widened].args[0].buffer, widened, at)
    ):
        gone.add(widened)
        grad = ops[widened].args[0]
        parts.insert(0, "_to_dtype")
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
        if ops[add].outputs[0].buffer in {grad.buffer, *(v.buffer for v in op.reads())}:
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
        (grad, residual, *op.args[1:], low.dtype if low else None),
        results,
        op,
    )
    edits.replace(at, made, gone)
    _made(edits, op, made, parts)


def _refused(add: Op, like: View, movable: Callable[[], bool]) -> str | None:
    """Why an add is not part of a norm; None if it can be."""
    first, second, alpha = add.args
    if alpha != 1:
        return f"it adds {alpha} times its second operand"
    for operand in (first, second):
        if operand.sizes != like.sizes:
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
