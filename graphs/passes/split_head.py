"""Makes the logits of a large vocabulary a part of the rows at a time.

Pattern: `linear`, `_cross_entropy_index_gradient` in the place of its logits, and the two products that
read the gradient, for the linear's input and for its weight: logits and gradients of all rows are live
where the step takes most memory. Rewrite: `PARTS` times the four of them, each for its part of the rows;
the gradient of the weight is the sum of the parts, in float32. Not bitwise: losses and that gradient are
summed in another order, and products of fewer rows may take another algorithm (`reordered`).

Rule: the peak must be at least `LEAST_PEAK` bytes and lie where the logits are live, and these must be
at least `LEAST_SHARE` of it; a part must keep at least `LEAST_ROWS` rows, with which products are as
fast as with all. The parts of the weight's gradient are additional passes over memory.

On a GPU only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.passes.recompute import Live
from vibetensor.graphs.rewrite import Uses, is_dense, make_op, numel, reordered, reshaped
from vibetensor.graphs.tape import Decision, Op, Tape, View

BITWISE = False
DEVICES = ("cuda",)  # where it rewrites
PARTS = 4
LEAST_PEAK = 4 << 30
LEAST_SHARE = 1 / 8
LEAST_ROWS = 4096
_MEAN, _SUM = 1, 2


def run(tape: Tape) -> Tape:
    """The tape with its largest logits made in parts."""
    decisions: list[Decision] = []
    for device in sorted({b.device for b in tape.buffers if b.device.split(":")[0] in DEVICES}):
        live = Live(tape, device)
        if live.peak < LEAST_PEAK:
            continue
        for at, op in enumerate(tape.ops):
            if op.name != "_cross_entropy_index_gradient":
                continue
            buffer = op.args[0].buffer
            if not live.first.get(buffer, len(tape.ops)) <= live.at <= live.last.get(buffer, -1):
                continue
            if buffer.nbytes < LEAST_SHARE * live.peak:
                continue
            made = _split(tape, at, decisions)
            if made is not None:
                before = live.peak
                tape = made
                text = (
                    f"the logits in {PARTS} parts: {Live(tape, device).peak:,} bytes live at most, "
                    f"not {before:,}"
                )
                decisions.append(Decision("split_head", True, text, op))
                break
    return tape.replaced(tape.ops, decisions)


def _split(tape: Tape, at: int, decisions: list[Decision]) -> Tape | None:
    uses, loss = Uses(tape), tape.ops[at]
    logits, target, weight, reduction, ignored, smoothing, grad, dtype = loss.args

    def refuse(why: str) -> None:
        decisions.append(Decision("split_head", False, f"the logits are made at once: {why}", loss))

    rows, classes = logits.sizes
    n = rows // PARTS
    if weight is not None or reduction not in (_MEAN, _SUM):
        return refuse("a loss with weights, or of each row")
    if rows % PARTS or n < LEAST_ROWS:
        return refuse(f"{rows} rows are too few, or do not divide by {PARTS}")
    buffer = logits.buffer
    makers = [i for i in uses.writes(buffer) if i != at]
    readers = sorted({i for i in uses.reads(buffer) if i != at})
    if len(makers) != 1 or makers[0] > at or tape.ops[makers[0]].name != "linear":
        return refuse("no linear makes them")
    if loss.outputs[1].buffer is not buffer or not _whole(logits):
        return refuse("the gradient is not in their place")
    head = tape.ops[makers[0]]
    x, table, bias = head.args
    for_rows = [i for i in readers if _is_product_for_rows(tape.ops[i], logits)]
    for_table = [i for i in readers if _is_product_for_table(tape.ops[i], logits, x)]
    if len(for_rows) != 1 or len(for_table) != 1 or len(readers) != 2:
        return refuse("other ops than two products read the gradient")
    if not _whole(head.outputs[0]) or not is_dense(x):
        return refuse("part of a tensor, or not contiguous")
    d_rows, d_table = tape.ops[for_rows[0]], tape.ops[for_table[0]]
    for view in (*head.reads(), target, grad, *d_rows.reads(), *d_table.reads()):
        if view.buffer is not buffer and uses.written_between(
            view.buffer, makers[0], max(for_rows[0], for_table[0]) + 1
        ):
            return refuse(f"{view} changes in between")
    for one, place in ((d_rows, for_rows[0]), (d_table, for_table[0])):
        out = one.outputs[0]
        touched = (*uses.writes(out.buffer), *uses.reads(out.buffer))
        if min(touched) < place or out.buffer.role == "state" or not _whole(out):
            return refuse(f"the result of {one.name} has memory that is in use before")
    ops = _parts(tape, head, loss, d_rows, d_table, bias)
    gone = {makers[0], for_rows[0], for_table[0]}
    kept: list[Op] = []
    for index, op in enumerate(tape.ops):
        if index == at:
            kept += ops[1:]
        elif index not in gone:
            kept.append(op)
    bound = max(reordered(view) for view in (logits, d_table.outputs[0]))
    return tape.replaced(kept, bound=bound, setup=ops[:1])


def _parts(tape: Tape, head: Op, loss: Op, d_rows: Op, d_table: Op, bias: View | None) -> list[Op]:
    """The ops in their order; the first one runs once."""
    logits, target, _, reduction, ignored, smoothing, grad, dtype = loss.args
    x, table, _ = head.args
    rows, classes = logits.sizes
    n, width = rows // PARTS, x.sizes[-1]
    device = logits.buffer.device

    def new(sizes: tuple[int, ...], dtype: Any, role: str = "scratch") -> View:
        count = dtype.itemsize
        for size in sizes:
            count *= size
        view = View(tape.new_buffer(count, device, role), dtype, sizes, (), 0)
        return reshaped(view, sizes)

    number = new((1,), vt.int64, "constant")
    ops = [make_op("_arange_", (number, ignored, 1), [number], loss)]
    share = grad
    count = None
    if reduction == _MEAN:
        counted = new(target.sizes, vt.bool)
        count, share = new((), vt.int64), new((), grad.dtype)
        ops += [
            make_op("ne", (target, number), [counted], loss),
            make_op("count_nonzero", (counted,), [count], loss),
            make_op("div", (grad, count), [share], loss),
        ]
    x2d = reshaped(x, (rows, width))
    out_rows = d_rows.outputs[0]
    losses, tables = [], []
    for part in range(PARTS):

        def cut(view: View, part: int = part) -> View:
            step = view.strides[0]
            sizes = (n, *view.sizes[1:])
            return replace(view, sizes=sizes, offset=view.offset + part * n * step)

        made = new((n, classes), logits.dtype)
        one = new((), dtype)
        transposed = replace(made, sizes=(classes, n), strides=(1, classes))
        d_part = new(d_table.outputs[0].sizes, d_table.outputs[0].dtype)
        ops += [
            make_op("linear", (cut(x2d), table, bias), [made], head),
            make_op(
                loss.name,
                (made, cut(target), None, _SUM, ignored, smoothing, share, dtype),
                [one, made],
                loss,
            ),
            make_op("mm", (made, d_rows.args[1]), [cut(out_rows)], d_rows),
            make_op("mm", (transposed, cut(x2d)), [d_part], d_table),
        ]
        losses.append(one)
        tables.append(d_part)
    total = losses[0]
    for other in losses[1:]:
        result = new((), dtype)
        ops.append(make_op("add", (total, other), [result], loss))
        total = result
    if count is None:
        ops[-1] = make_op("add", ops[-1].args[:2], [loss.outputs[0]], loss)
    else:
        ops.append(make_op("div", (total, count), [loss.outputs[0]], loss))
    whole = d_table.outputs[0]
    wide = vt.float64 if whole.dtype == vt.float64 else vt.float32
    added = tables[0]
    if added.dtype != wide:
        first = new(whole.sizes, wide)
        ops.append(make_op("_to_dtype", (added, wide), [first], d_table))
        added = first
    for index, other in enumerate(tables[1:], 2):
        last = index == PARTS and whole.dtype == wide
        result = whole if last else new(whole.sizes, wide)
        ops.append(make_op("add", (added, other), [result], d_table))
        added = result
    if whole.dtype != wide:
        ops.append(make_op("_to_dtype", (added, whole.dtype), [whole], d_table))
    return ops


def _whole(view: View) -> bool:
    nbytes = numel(view) * view.dtype.itemsize
    return is_dense(view) and view.offset == 0 and view.buffer.nbytes == nbytes


def _is_product_for_rows(op: Op, logits: View) -> bool:
    return op.name == "mm" and op.args[0] == logits and op.args[1].buffer is not logits.buffer


def _is_product_for_table(op: Op, logits: View, x: View) -> bool:
    """mm of the transposed gradient and the linear's input."""
    if op.name != "mm" or op.args[1].buffer is not x.buffer:
        return False
    left, right = op.args
    rows, classes = logits.sizes
    same = left.buffer is logits.buffer and left.offset == 0 and left.dtype == logits.dtype
    turned = left.sizes == (classes, rows) and left.strides == (1, classes)
    return same and turned and right == reshaped(x, (rows, x.sizes[-1]))
