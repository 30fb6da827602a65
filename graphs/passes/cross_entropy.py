"""Writes the gradient of cross entropy in the place of its logits, as the loss is computed.

Pattern: `_cross_entropy_index` and its backward, whose logits nobody reads after the loss, and whose
incoming gradient does not depend on what runs between (the constant 1, divided by a number of
micro-steps, or times a loss scale). With logits in a 16-bit float, the casts to float32 and back
belong to it. Rewrite: one op in the place of the first, and whatever reads the gradient reads the
logits' memory. Bitwise on the CPU: the arithmetic is that of the ops one after the other, roundings included. On CUDA
rows of 16-bit logits are summed in another order.
"""

from __future__ import annotations

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import (
    Uses,
    is_dense,
    make_op,
    numel,
    reordered,
    reshaped,
    same_elements,
    with_buffers,
)
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape, View

BITWISE = False  # on CUDA

_HALF = (vt.bfloat16, vt.float16)


def run(tape: Tape) -> Tape:
    """The tape with gradients of logits in the place of the logits."""
    decisions: list[Decision] = []
    for backward in [op for op in tape.ops if op.name == "_cross_entropy_index_backward"]:
        uses = Uses(tape)
        at = next(i for i, op in enumerate(tape.ops) if op is backward)
        made = _rewritten(tape, uses, at, decisions)
        if made is not None:
            tape = made
    return tape.replaced(tape.ops, decisions)


def _rewritten(tape: Tape, uses: Uses, at: int, decisions: list[Decision]) -> Tape | None:
    ops, op = tape.ops, tape.ops[at]
    grad, logits, target, weight, *options, lse, total = op.args
    first = uses.writer(lse, at)
    if first is None or ops[first].name != "_cross_entropy_index":
        return None
    loss = ops[first]

    def refuse(why: str) -> None:
        decisions.append(
            Decision("cross_entropy", False, f"the gradient has memory of its own: {why}", op)
        )

    if loss.args != (logits, target, weight, *options):
        return refuse("the loss is of other arguments")
    for view in (lse, total):
        if uses.only_reader(view.buffer) != at:
            return refuse("what the loss keeps for it is read elsewhere")
    for view in (target, weight):
        if view is not None and uses.written_between(view.buffer, first, at):
            return refuse(f"{view} changes in between")
    result, gone = op.outputs[0], {at}
    readers = sorted(set(uses.reads(logits.buffer)))
    cast = uses.writer(logits, first)
    back = uses.only_reader(result.buffer)
    if (
        cast is not None
        and back is not None
        and ops[cast].name == ops[back].name == "_to_dtype"
        and ops[cast].args[0].dtype in _HALF
        and logits.dtype == vt.float32
        and ops[back].args[0].dtype == vt.float32
        and ops[back].outputs[0].dtype == ops[cast].args[0].dtype
        and same_elements(ops[back].args[0], result)
        and readers == [first, at]
        and logits.buffer.role == "scratch"
        and not uses.written_between(ops[cast].args[0].buffer, cast, first)
    ):
        logits, result = ops[cast].args[0], ops[back].outputs[0]
        gone |= {cast, back}
        readers = sorted(set(uses.reads(logits.buffer)))
    others = [view for view in (grad, target, weight) if view is not None]
    if any(view.buffer in (loss.args[0].buffer, logits.buffer) for view in others):
        return refuse("the logits are its weights or its incoming gradient too")
    late = [i for i in readers if i > first and i not in gone]
    if logits.buffer.role != "scratch":
        return refuse("the logits are read after the step")
    if late:
        return refuse(
            f"{ops[late[0]].name} ({ops[late[0]].source}) reads the logits after the loss"
        )
    if any(i > first for i in uses.writes(logits.buffer)):
        return refuse("the logits are written after the loss")
    whole = numel(logits) * logits.dtype.itemsize == logits.buffer.nbytes
    if not (
        whole and is_dense(logits) and is_dense(result) and logits.offset == result.offset == 0
    ):
        return refuse("the logits are part of a larger tensor, or not contiguous")
    if result.buffer.role != "scratch" or result.buffer.nbytes != logits.buffer.nbytes:
        return refuse("the gradient is kept")
    if uses.writes(result.buffer)[0] < at:
        return refuse("the gradient's memory is in use before")
    moved = _moved(tape, uses, grad, first, at)
    if moved is None:
        return refuse("the loss's gradient depends on what runs after the loss")
    rows = loss.args[0].sizes
    place = reshaped(logits, rows)
    made = make_op(
        "_cross_entropy_index_gradient",
        (place, target, weight, *options, grad, loss.outputs[0].dtype),
        [loss.outputs[0], place],
        loss,
    )
    instead: dict[Buffer, Buffer] = {result.buffer: logits.buffer}
    kept: list[Op] = []
    for index, one in enumerate(ops):
        if index == first:
            kept.extend(ops[i] for i in moved)
            kept.append(made)
        elif index not in gone and index not in moved:
            kept.append(with_buffers(one, instead) if index > at else one)
    parts = "with the casts around it, " if len(gone) > 1 else ""
    decisions.append(
        Decision(
            "cross_entropy",
            True,
            f"loss and gradient in one op, {parts}{logits.buffer.nbytes:,} bytes less",
            op,
        )
    )
    bound = 0.0 if logits.buffer.device == "cpu" else reordered(logits)
    return tape.replaced(kept, bound=bound)


def _moved(tape: Tape, uses: Uses, grad: View, first: int, at: int) -> list[int] | None:
    """The ops after `first` that make `grad`, in order, if all of them can run before it."""
    ops = tape.ops
    chain: set[int] = set()
    wanted = [grad.buffer]
    while wanted:
        buffer = wanted.pop()
        for index in uses.writes(buffer):
            if first < index < at and index not in chain:
                chain.add(index)
                wanted.extend(view.buffer for view in ops[index].reads())
    for index in chain:
        op = ops[index]
        if op.is_random:
            return None
        reads = [view.buffer for view in op.reads()]
        writes = [view.buffer for view in op.writes()]
        for other in range(first, index):
            if other in chain or ops[other].is_view:
                continue
            made = {view.buffer for view in ops[other].writes()}
            used = made | {view.buffer for view in ops[other].reads()}
            if made & set(reads) or used & set(writes):
                return None
    return sorted(chain)
