"""Takes the gradient of a bias from the norm that makes the gradient of its rows.

Pattern: `_residual_layer_norm_backward` or `_residual_rms_norm_backward`, and `sum.dim` over the rows
of its low-precision copy, or else of its total: the gradient of the bias of the layer whose result
the residual was added to. Rewrite: the norm sums its rows as it writes them. Bitwise on the CPU; on
CUDA the sums are taken in another order.
"""

from __future__ import annotations

import math

from vibetensor.graphs.rewrite import Edits, Uses, is_dense, make_op
from vibetensor.graphs.tape import Tape

BITWISE = False  # on CUDA

_NORMS = ("_residual_layer_norm_backward", "_residual_rms_norm_backward")


def run(tape: Tape) -> Tape:
    """The tape with sums over the rows of gradients in the norms that write those."""
    edits, uses = Edits(tape, "bias_gradients"), Uses(tape)
    for at, op in enumerate(tape.ops):
        if op.name == "sum.dim":
            _sum(edits, uses, at)
    return edits.applied()


def _sum(edits: Edits, uses: Uses, at: int) -> None:
    ops = uses.tape.ops
    rows, dims, keep, _ = ops[at].args
    sums = ops[at].outputs[0]
    last = [i for i in uses.writes(rows.buffer) if i < at][-1:]
    if not last or ops[last[0]].name not in _NORMS or not edits.free(last[0]):
        return
    norm = ops[last[0]]
    total, low, taken = norm.outputs[0], *norm.outputs[-2:]
    written = low or total
    n = tuple(norm.args[3])
    if (
        taken is not None
        or keep
        or rows.sizes[-1:] != n
        or sorted(d % len(rows.sizes) for d in dims or ()) != list(range(len(rows.sizes) - 1))
        or sums.sizes != n
        or sums.dtype != written.dtype
        or (rows.buffer, rows.dtype, rows.offset) != (written.buffer, written.dtype, written.offset)
        or math.prod(rows.sizes) != math.prod(written.sizes)
        or not is_dense(rows)
        or not is_dense(sums)
    ):
        return
    why = None
    if any(sums.buffer is v.buffer for v in (*norm.reads(), *norm.writes())):
        why = "the sums are where the norm reads or writes"
    elif uses.touched_between(sums.buffer, last[0], at):
        why = "the sums' memory is in use before"
    if why:
        edits.refused(f"{norm.name} and sum stay two ops: {why}", ops[at])
        return
    results = [v for v in norm.outputs if v is not None]
    made = make_op(norm.name, (*norm.args[:-2], True), [*results, sums], norm)
    edits.replace(last[0], made, {at})
    edits.made(f"{norm.name} + sum as one op", ops[at])
    if sums.buffer.device != "cpu":
        edits.reorders(sums)
