"""Adds up the parts of many sums over rows in one op.

Pattern: sums over the rows of large matrices, which a device takes in two stages: blocks sum their rows,
a second launch adds up the blocks' parts. They are gradients of weights and biases of norms
(`_residual_layer_norm_backward`, `_residual_rms_norm_backward`), the sums of `_mm_row_sums`, and `sum.dim`
over the first dimensions, or over the rows of a batch. Rewrite: they leave their parts in memory, and one
`_add_parts_` adds up those of all, where the first of the results is needed. Bitwise on the CPU; on CUDA
some sums are taken in another number of parts (`reordered`).

Rule: the parts wait in memory, at most `MOST_BYTES` of them: then those so far are added up. A sum that
finds no others stays as it is. Sums of fewer than `LEAST_ELEMENTS` stay, and those of matrices so wide or
so many that each is one part: they are one stage. So do sums in a dtype that is neither the rows' nor
float32.

On a GPU only. Runs when `chains` and `weight_gradients` have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import (
    Uses,
    is_dense,
    make_op,
    numel,
    reordered,
    reshaped,
    transposed,
)
from vibetensor.graphs.tape import Decision, Op, Tape, View

BITWISE = False  # on CUDA
DEVICES = ("cuda",)  # where it rewrites
MOST_BYTES = 128 << 20
LEAST_ELEMENTS = 1 << 16
LEAST_ROWS = 64
_ROWS_OF_A_PART = 16
_NORMS = {  # where their outputs have sums
    "_residual_layer_norm_backward": (1, 2, 4),
    "_residual_rms_norm_backward": (1, 3),
}


@dataclass
class _Sum:
    """Sums at one place of the tape. parts: how many rows each is left in. n: their columns. matrix: what
    `_row_parts` is to sum, None for a norm's."""

    at: int
    results: list[View]
    parts: int
    n: int
    batch: int
    matrix: View | None
    dtype: Any

    @property
    def nbytes(self) -> int:
        return len(self.results) * self.batch * self.parts * self.n * self.dtype.itemsize


def run(tape: Tape) -> Tape:
    """The tape with the second stages of its sums in as few ops as may be."""
    uses, decisions = Uses(tape), []
    groups: list[tuple[int, list[_Sum]]] = []  # before which op, and what
    waiting: list[_Sum] = []
    first_use = len(tape.ops)
    for at, op in enumerate(tape.ops):
        if waiting and at == first_use:
            groups.append((at, waiting))
            waiting, first_use = [], len(tape.ops)
        found = None if op.is_view else _sum_of(uses, at)
        if isinstance(found, str):
            text = f"{op.name} finishes its sums: {found}"
            decisions.append(Decision("late_sums", False, text, op))
        if not isinstance(found, _Sum):
            continue
        if waiting and sum(one.nbytes for one in waiting) + found.nbytes > MOST_BYTES:
            groups.append((at, waiting))
            waiting, first_use = [], len(tape.ops)
        waiting.append(found)
        for view in found.results:
            first_use = min(first_use, _next_use(uses, view, at))
    if waiting:
        groups.append((first_use, waiting))
    new: dict[int, list[Op]] = {}
    before: dict[int, Op] = {}
    bound = 0.0
    for place, sums in groups:
        if sum(one.batch for one in sums) < 2:
            continue
        targets: list[View] = []
        parts: list[View] = []
        for one in sums:
            made = _unfinished(tape, one)
            new[one.at] = made.ops
            targets += made.targets
            parts += made.parts
            bound = max(bound, made.bound)
        like = tape.ops[sums[-1].at]
        before[place] = make_op("_add_parts_", (targets, parts), targets, like)
        nbytes = sum(one.nbytes for one in sums)
        text = f"the parts of {len(targets)} sums added up by one op: {nbytes:,} bytes wait"
        decisions.append(Decision("late_sums", True, text, like))
    if not before:
        return tape.replaced(tape.ops, decisions)
    ops: list[Op] = []
    for at, op in enumerate([*tape.ops, None]):
        if at in before:
            ops.append(before[at])
        if op is not None:
            ops += new.get(at, [op])
    return tape.replaced(ops, decisions, bound)


def _next_use(uses: Uses, view: View, at: int) -> int:
    touched = (*uses.reads(view.buffer), *uses.writes(view.buffer))
    return min((i for i in touched if i > at), default=len(uses.tape.ops))


def _sum_of(uses: Uses, at: int) -> _Sum | str | None:
    """The sums at a place; why they stay as they are; None if there are none."""
    op = uses.tape.ops[at]
    outputs = op.outputs
    if op.name in _NORMS:
        if op.args[-1] != 0:
            return None
        places = [i for i in _NORMS[op.name] if outputs[i] is not None]
        if not places:
            return None
        found = _of_norm(at, op, places)
    elif op.name == "sum.dim":
        found = _of_dimensions(at, op)
    elif op.name == "_mm_row_sums":
        found = _of_matrix(at, outputs[1], transposed(op.args[0]))
    else:
        return None
    if found is None or found.results[0].buffer.device.split(":")[0] not in DEVICES:
        return None
    others = [view.buffer for view in op.reads()]
    others += [view.buffer for view in op.writes() if view not in found.results]
    if any(view.buffer in others for view in found.results):
        return "they are where it reads or writes"
    if not all(is_dense(view) for view in found.results):
        return "their results are not contiguous"
    if found.nbytes > MOST_BYTES:
        return f"their parts take more than {MOST_BYTES:,} bytes"
    return found


def _of_norm(at: int, op: Op, places: list[int]) -> _Sum | None:
    results = [view for i in places if (view := op.outputs[i]) is not None]
    x, rstd = op.args[2], op.args[5 if op.name == "_residual_layer_norm_backward" else 4]
    n = math.prod(op.args[3])
    if numel(x) < max(LEAST_ELEMENTS, 1):
        return None
    rows = numel(x) // n
    parts = min(_multiprocessors(x.buffer.device), rows)
    return _Sum(at, results, parts, n, 1, None, rstd.dtype)


def _of_dimensions(at: int, op: Op) -> _Sum | None:
    """A sum over the first dimensions, or over the rows of each matrix of a batch."""
    x, dims, _, _ = op.args
    out = op.outputs[0]
    dims = sorted(d % len(x.sizes) for d in dims or ()) if x.sizes else []
    if dims and dims == list(range(len(dims))) and is_dense(x):
        rows = math.prod(x.sizes[: len(dims)])
        return _of_matrix(at, out, reshaped(x, (rows, numel(x) // max(rows, 1))))
    if dims == [1] and len(x.sizes) == 3:
        return _of_matrix(at, out, x)
    return None


def _of_matrix(at: int, out: View | None, matrix: View) -> _Sum | None:
    *batches, rows, n = matrix.sizes
    batch = batches[0] if batches else 1
    if out is None or matrix.strides[-1] != 1 or matrix.strides[-2] < n or rows < LEAST_ROWS:
        return None
    if batch * rows * n < max(LEAST_ELEMENTS, 1) or not 1 < matrix.dtype.itemsize <= 4:
        return None
    # Into other dtypes elements are converted before they are added up, not the sums of parts after.
    if not matrix.dtype.is_floating_point or out.dtype not in (matrix.dtype, vt.float32):
        return None
    # Two blocks a multiprocessor; one has 512 threads across, of 16 bytes each.
    strips = batch * -(-n * matrix.dtype.itemsize // (16 * 512))
    parts = min(-(-2 * _multiprocessors(out.buffer.device) // strips), -(-rows // _ROWS_OF_A_PART))
    if parts == 1:  # wide matrices, or many of a batch, fill the device: one stage
        return None
    return _Sum(at, [out], parts, n, batch, matrix, vt.float32)


def _multiprocessors(device: str) -> int:
    """The blocks that fill a device; 16 for those that are none."""
    from vibetensor.torch import cuda
    from vibetensor.torch.cuda import _backend

    if not device.startswith("cuda") or _backend.native() is None:
        return 16
    index = int(device.partition(":")[2] or 0)
    return int(cuda.get_device_properties(index).multi_processor_count)


@dataclass
class _Unfinished:
    """Ops that leave parts, and which results these make."""

    ops: list[Op]
    targets: list[View]
    parts: list[View]
    bound: float


def _unfinished(tape: Tape, one: _Sum) -> _Unfinished:
    op = tape.ops[one.at]
    device = one.results[0].buffer.device

    def room(*batch: int) -> View:
        sizes = (*batch, one.parts, one.n)
        buffer = tape.new_buffer(math.prod(sizes) * one.dtype.itemsize, device)
        return reshaped(View(buffer, one.dtype, sizes, (), 0), sizes)

    if one.matrix is None:
        rooms = {id(view): room() for view in one.results}
        views = [view for view in op.outputs if view is not None]
        made = make_op(
            op.name, (*op.args[:-1], one.parts), [rooms.get(id(v), v) for v in views], op
        )
        # Norms whose rows are not streamed take more parts than are asked for, where they finish.
        bound = 0.0 if device == "cpu" else max(map(reordered, one.results))
        return _Unfinished([made], one.results, [rooms[id(v)] for v in one.results], bound)
    parts = room(*one.matrix.sizes[:-2])
    ops = [make_op("_row_parts", (one.matrix, one.parts), [parts], op)]
    if op.name == "_mm_row_sums":
        ops.append(make_op("mm", op.args, op.outputs[:1], op))
    result = reshaped(one.results[0], (one.batch, one.n))
    step = one.parts * one.n
    targets = [
        replace(result, sizes=(one.n,), strides=(1,), offset=result.offset + b * one.n)
        for b in range(one.batch)
    ]
    rows = [
        replace(parts, sizes=(one.parts, one.n), strides=(one.n, 1), offset=parts.offset + b * step)
        for b in range(one.batch)
    ]
    reorders = 0.0 if device == "cpu" else reordered(one.results[0])
    return _Unfinished(ops, targets, rows, reorders)
