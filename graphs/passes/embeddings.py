"""Leaves out the search in embeddings whose rows are known, and adds the gradient of a table where it
is wanted.

Patterns and rewrites:
- `embedding` and `embedding_dense_backward` by `arange` from 0 in steps of 1, as positions are: a copy
  of the first rows of the table, and of the gradient. What `copies` does with those is its own affair.
- On an accelerator `embedding_dense_backward` of a large table that is then added to another gradient,
  as a table that is the last layer's weight too has it: rows are added to where they belong, without a
  table of zeros and a sum over all of it.

Bitwise but for the sign of zeros; on an accelerator rows may be summed in another order.
"""

from __future__ import annotations

import dataclasses

from vibetensor.graphs.rewrite import Edits, Uses, is_dense, make_op, numel, reshaped, same_elements
from vibetensor.graphs.tape import Op, Tape, View

BITWISE = False  # on an accelerator
# Smaller tables have a kernel of their own for many indices to a row.
_LEAST_ROWS = 2048


def run(tape: Tape) -> Tape:
    """The tape with embeddings of known rows as copies and gradients of tables added in place."""
    edits, uses = Edits(tape, "embeddings"), Uses(tape)
    for at, op in enumerate(tape.ops):
        if op.name == "embedding":
            _rows(edits, uses, at, op)
        elif op.name == "embedding_dense_backward" and not _known_gradient(edits, uses, at, op):
            _added(edits, uses, at, op)
    return edits.applied()


def _counts_up(uses: Uses, indices: View, at: int) -> bool:
    """Whether the indices are 0, 1, … in order."""
    writes = uses.writes(indices.buffer)
    if indices.buffer.role != "scratch" or len(writes) != 1 or writes[0] > at:
        return False
    op = uses.tape.ops[writes[0]]
    if op.name != "_arange_" or not is_dense(indices):
        return False
    return tuple(op.args[1:]) == (0, 1) and same_elements(indices, op.outputs[0])


def _rows(edits: Edits, uses: Uses, at: int, op: Op) -> None:
    weight, indices = op.args[:2]
    out = op.outputs[0]
    count = numel(indices)
    if not 0 < count <= weight.sizes[0] or not is_dense(weight) or not is_dense(out):
        return
    if weight.buffer is out.buffer or not _counts_up(uses, indices, at):
        return
    first = dataclasses.replace(weight, sizes=(count, weight.sizes[1]))
    edits.replace(at, make_op("clone", (reshaped(first, out.sizes),), [out], op))
    edits.made("rows in order are copied", op)


def _known_gradient(edits: Edits, uses: Uses, at: int, op: Op) -> bool:
    grad, indices, rows, padding, _ = op.args
    out = op.outputs[0]
    if padding >= 0 or rows != numel(indices) or not _counts_up(uses, indices, at):
        return False
    if not is_dense(grad) or not is_dense(out) or grad.dtype != out.dtype:
        return False
    edits.replace(at, make_op("clone", (reshaped(grad, out.sizes),), [out], op))
    edits.made("gradients of rows in order are copied", op)
    return True


def _added(edits: Edits, uses: Uses, at: int, op: Op) -> None:
    grad, indices, rows, padding, by_count = op.args
    table = op.outputs[0]
    add = uses.only_reader(table.buffer)
    if table.buffer.device == "cpu" or rows < _LEAST_ROWS or add is None:
        return
    found = uses.tape.ops[add]
    if found.name != "add_" or found.args[1] != table or found.args[2] != 1:
        return
    target = found.args[0]
    alike = target.sizes == table.sizes and target.dtype == table.dtype == grad.dtype
    why = None
    if padding >= 0 or by_count:
        why = "not all rows are sums"
    elif not alike or not all(map(is_dense, (target, grad, indices))):
        why = "layouts or dtypes differ"
    elif target.buffer in (grad.buffer, indices.buffer):
        why = "the sum takes the place of what is read"
    elif any(uses.written_between(v.buffer, at, add) for v in (grad, indices)):
        why = "what is read changes before the sum"
    if why:
        edits.refused(f"{op.name} and add_ stay two ops: {why}", op)
        return
    count = numel(indices)
    sources = reshaped(grad, (count, table.sizes[1]))
    args = (target, 0, reshaped(indices, (count,)), sources)
    edits.replace(add, make_op("index_add_", args, [target], found, alpha=1), {at})
    edits.reorders(target)
    edits.made(f"{op.name} + add_ as index_add_", op)
