"""Takes the gradient of a bias from the attention that makes the gradient of its rows.

Pattern: `_attention_backward`, and a sum over the rows of a matrix whose columns are its gradients:
those of query, key and value side by side, as `copies` leaves them of one projection, or one alone.
The sum is `sum.dim`, or part of `_mm_row_sums`. Rewrite: the attention sums what it writes. Bitwise on
the CPU; on CUDA kernels that hold the rows add them up in another order, see `reordered`. Those of wide
floats there add nothing up, so that such sums stay, which `late_sums` may finish with others.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import Edits, Uses, is_dense, make_op, reshaped, transposed
from vibetensor.graphs.tape import Op, Tape, View

BITWISE = False  # on CUDA
WIDE_ON = ("cpu",)  # where it takes sums of float32 and float64

_MAKER = "_attention_backward"
_JOINERS = ("cat", "clone", "copy_")


@dataclass
class _Taken:
    """What one attention is to sum: by the gradient's place, where to; the ops that did."""

    sums: dict[int, View] = field(default_factory=dict)
    ops: list[int] = field(default_factory=list)


def run(tape: Tape) -> Tape:
    """The tape with sums over the rows of gradients in the attention that writes those."""
    edits, uses = Edits(tape, "attention_sums"), Uses(tape)
    taken: dict[int, _Taken] = {}
    for at, op in enumerate(tape.ops):
        if op.name in ("sum.dim", "_mm_row_sums"):
            _take(edits, uses, taken, at)
    for maker, what in taken.items():
        _rewrite(edits, tape, maker, what)
    return edits.applied()


def _take(edits: Edits, uses: Uses, taken: dict[int, _Taken], at: int) -> None:
    ops = uses.tape.ops
    op = ops[at]
    rows, sums = op.args[0], op.outputs[-1]
    before = [i for i in uses.writes(rows.buffer) if i < at]
    if not any(ops[i].name == _MAKER for i in _sources(uses, before)):
        return
    maker = before[-1]
    why: str | None = None
    if ops[maker].name in _JOINERS:
        why = f"{ops[maker].name} is between"
    elif ops[maker].name != _MAKER:
        why = f"{ops[maker].name} changes the rows first"
    elif rows.dtype.itemsize > 2 and rows.buffer.device.split(":")[0] not in WIDE_ON:
        why = "its kernels of wide floats add nothing up"
    elif (matrix := _matrix(op)) is None:
        why = "it sums something else than all rows"
    elif sums.dtype not in (rows.dtype, vt.float32) or sums.dtype.itemsize < rows.dtype.itemsize:
        why = f"sums in {str(sums.dtype).rpartition('.')[2]}"
    elif isinstance(found := _columns(ops[maker], matrix), str):
        why = found
    elif not is_dense(sums):
        why = "the sums have gaps"
    elif any(sums.buffer is v.buffer for v in (*ops[maker].reads(), *ops[maker].writes())):
        why = "the sums are where attention reads or writes"
    elif uses.touched_between(sums.buffer, maker, at):
        why = "the sums' memory is in use before"
    else:
        what = taken.get(maker, _Taken())
        if any(v.dtype != sums.dtype for v in what.sums.values()):
            why = "other sums are in another dtype"
        elif not found.keys().isdisjoint(what.sums):
            why = "another sum has them"
        else:
            for place, first in found.items():
                grad = ops[maker].outputs[place]
                what.sums[place] = _part(sums, first, grad.sizes[1] * grad.sizes[3])
            what.ops.append(at)
            taken[maker] = what
    if why:
        edits.refused(f"{_MAKER} and sum stay two ops: {why}", op)


def _sources(uses: Uses, writers: list[int]) -> list[int]:
    """The ops that wrote what the last of these joins or copies, or else these."""
    ops = uses.tape.ops
    if not writers or ops[writers[-1]].name not in _JOINERS:
        return writers
    last = writers[-1]
    return [i for v in ops[last].reads() for i in uses.writes(v.buffer) if i < last]


def _matrix(op: Op) -> View | None:
    """The rows that an op sums, as a matrix."""
    rows: View = op.args[0]
    if op.name == "_mm_row_sums":
        return transposed(rows)
    rank = len(rows.sizes)
    if rank < 2 or sorted(d % rank for d in op.args[1] or ()) != list(range(rank - 1)):
        return None
    # From the inside out: each dimension begins where the one inside of it would go on.
    count, step = 1, 0
    for size, stride in zip(reversed(rows.sizes[:-1]), reversed(rows.strides[:-1])):
        if size == 1:
            continue
        step = step or stride
        if stride != count * step:
            return None
        count *= size
    count = math.prod(rows.sizes[:-1])
    return dataclasses.replace(
        rows, sizes=(count, rows.sizes[-1]), strides=(step, rows.strides[-1])
    )


def _columns(maker: Op, matrix: View) -> dict[int, int] | str:
    """Of each gradient in the matrix its first column; why they are not all of it."""
    found: dict[int, int] = {}
    count, n = matrix.sizes
    step, width = matrix.strides[0], 0
    if count * n == 0:
        return "there are no rows"
    for place, grad in enumerate(maker.outputs):
        if grad is None or grad.buffer is not matrix.buffer:
            continue
        b, h, t, d = grad.sizes
        wanted = (t * step, d, step, 1)
        first = grad.offset - matrix.offset
        if grad.dtype != matrix.dtype or b * t != count or not 0 <= first <= n - h * d:
            return "it sums part of them, or more"
        if any(size > 1 and a != w for size, a, w in zip(grad.sizes, grad.strides, wanted)):
            return "heads are not one after the other in a row"
        found[place] = first
        width += h * d
    if width != n or (n > 1 and matrix.strides[1] != 1):
        return "it sums other columns, too"
    return found


def _part(sums: View, first: int, count: int) -> View:
    whole = reshaped(sums, (math.prod(sums.sizes),))
    return dataclasses.replace(whole, sizes=(count,), offset=whole.offset + first)


def _rewrite(edits: Edits, tape: Tape, maker: int, what: _Taken) -> None:
    op = tape.ops[maker]
    dtype = next(iter(what.sums.values())).dtype
    flags = [place in what.sums for place in range(3)]
    same = dtype == op.outputs[0].dtype
    arguments: tuple[Any, ...] = (*op.args, *flags, None if same else dtype)
    outputs = [*op.outputs, *(what.sums[place] for place in sorted(what.sums))]
    made = make_op(f"{_MAKER}_sums", arguments, outputs, op, any_strides=True)
    gone = set()
    for at in what.ops:
        summing = tape.ops[at]
        if summing.name == "sum.dim":
            gone.add(at)
        else:
            edits.replace(at, make_op("mm", summing.args, [summing.outputs[0]], summing))
        edits.made(f"{_MAKER} + sum as one op", summing)
    edits.replace(maker, made, gone)
    for view in what.sums.values():
        if view.buffer.device != "cpu":
            edits.reorders(view)
