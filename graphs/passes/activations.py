"""Takes an activation that is computed again from the product that has its slope at the same place.

Pattern: `gelu` of a tensor, and `_mm_activation_backward` that multiplies with gelu's slope there: what
`recompute` leaves of a layer whose activation is not kept, since the backward needs both. Rewrite: the
product, which has read the tensor, writes the activation too. It is the one that the forward's product
made, where a kernel has that: not bit for bit that of the op (`reordered`).

Rule: a CuTe kernel that does both is chosen for the product. On a GPU only.
"""

from __future__ import annotations

from vibetensor.graphs.passes.epilogues import activation_of, chosen_kernel
from vibetensor.graphs.rewrite import Edits, Uses, is_dense, make_op, reshaped, same_elements
from vibetensor.graphs.tape import Op, Tape

BITWISE = False
DEVICES = ("cuda",)  # where it rewrites
KERNELS = {"gelu": "gemm_slope_gelu_again_nn", "gelu_tanh": "gemm_slope_gelu_tanh_again_nn"}


def run(tape: Tape) -> Tape:
    """The tape with activations as results of products."""
    edits, uses = Edits(tape, "activations"), Uses(tape)
    for at, op in enumerate(tape.ops):
        if op.name == "gelu" and op.outputs[0].buffer.device.split(":")[0] in DEVICES:  # type: ignore[union-attr]
            product = _product(uses, op)
            if product is not None and edits.free(product):
                _join(edits, uses, at, product)
    return edits.applied()


def _product(uses: Uses, op: Op) -> int | None:
    """The product with the slope at what the activation reads."""
    for at in uses.reads(op.args[0].buffer):
        other = uses.tape.ops[at]
        if other.name != "_mm_activation_backward" or other.outputs[2] is not None:
            continue
        _, _, saved, activation, _, _ = other.args
        if activation == activation_of(op) and same_elements(saved, op.args[0]):
            return at
    return None


def _join(edits: Edits, uses: Uses, at: int, product: int) -> None:
    op, other = uses.tape.ops[at], uses.tape.ops[product]
    left, right, saved, activation, sums, _ = other.args
    activated, result = op.outputs[0], other.outputs[0]
    first, last = min(at, product), max(at, product)
    assert activated is not None and result is not None
    why = None
    if activated.dtype != saved.dtype or not is_dense(activated):
        why = "another dtype or layout"
    elif any(activated.buffer is view.buffer for view in (*other.reads(), *other.writes())):
        why = "it is where the product reads or writes"
    elif not uses.can_run_at(last, first):
        why = "the one cannot be where the other is"
    elif not chosen_kernel(KERNELS[activation], left, right, result, True, "zyd"):
        why = "no kernel for the product has both"
    if why:
        edits.refused(f"gelu beside its slope stays an op: {why}", op)
        return
    results = [result, other.outputs[1], reshaped(activated, result.sizes)]
    made = make_op(
        other.name,
        (left, right, saved, activation, sums, True),
        [view for view in results if view is not None],
        other,
    )
    edits.replace(first, made, {last})
    edits.reorders(activated)
    edits.made("gelu and its slope in one product", op)
