"""Finishes matrix products while their results are at hand.

Patterns and rewrites, each one op instead of two:
- `linear`, then relu or gelu: the product and what is made of it;
- `mm`, then the backward of gelu: its derivative is multiplied in, and where a CuTe kernel does that the
  column sums for a bias come with it;
- `mm` whose result is only added to a gradient: a product that adds to it;
- `mm` of a transposed gradient for the weight, and the gradient's column sums for the bias.

Other activations stay ops, which chains of pointwise ops may take. So does gelu by the error function
where no CuTe kernel is chosen for the product: cuBLASLt has only its tanh form.

On CUDA only: these save launches and passes over memory there. On the CPU, whose products take their
time from arithmetic, none was measured to pay (linear + gelu and mm + gelu_backward of 768 x 512
and 1024 x 1536 take as long as both ops, to 2%), so that its steps stay bit for bit what they were.

Not bitwise: with an epilogue cuBLASLt may choose another algorithm, which sums in another order,
and its activations do not round in between; see `reordered`.
"""

from __future__ import annotations

from vibetensor.graphs.rewrite import (
    Edits,
    Uses,
    is_dense,
    make_op,
    numel,
    reshaped,
    same_elements,
)
from vibetensor.graphs.tape import Op, Tape, View

BITWISE = False
DEVICES = ("cuda",)  # where it rewrites

# The activations that it takes: always, and where a CuTe kernel is chosen.
FORWARD, BACKWARD = ("relu", "gelu_tanh"), ("gelu_tanh",)
CHOSEN = {"gelu": ("gemm_bias_gelu_tn", "gemm_slope_gelu_nn")}
# Whose backward sums columns on every path: none on a GPU.
SUMS: tuple[str, ...] = ()

_BACKWARD = ("gelu_backward", "silu_backward", "threshold_backward")


def run(tape: Tape) -> Tape:
    """The tape with epilogues in its products."""
    for rewrite in (_activations, _derivatives, _column_sums, _accumulations, _row_sums):
        edits = Edits(tape, "epilogues")
        rewrite(edits, Uses(tape))
        tape = edits.applied()
    return tape


def _here(op: Op) -> bool:
    """Whether the op runs on a device that it rewrites for."""
    return any(view.buffer.device.split(":")[0] in DEVICES for view in op.writes())


def activation_of(op: Op) -> str | None:
    """The activation that an op computes, or multiplies with the derivative of."""
    if op.name in ("gelu", "gelu_backward"):
        return "gelu_tanh" if op.args[-1] == "tanh" else "gelu"
    if op.name in ("silu", "silu_backward"):
        return "silu"
    if op.name == "relu" or (op.name == "threshold_backward" and op.args[2] == 0):
        return "relu"
    return None


def _chosen(activation: str, backward: bool, left: View, right: View, out: View) -> bool:
    """Whether a CuTe kernel is chosen for the product of `left`, whose rows are all its dimensions but
    the last, with `right` and this activation."""
    if activation not in CHOSEN:
        return False
    return chosen_kernel(CHOSEN[activation][backward], left, right, out, backward)


def chosen_kernel(
    name: str, left: View, right: View, out: View, backward: bool, results: str = "zd"
) -> bool:
    """Whether this CuTe kernel is chosen for such a product, `backward` with an activation's slope.
    results: its tensors that are laid out like the result."""
    if out.buffer.device.split(":")[0] != "cuda":
        return False
    from vibetensor.torch import cuda
    from vibetensor.torch.cuda import _backend

    native = _backend.native()
    if native is None:  # a device that stands for a GPU, in tests
        return False
    n, k = out.sizes[-1], left.sizes[-1]
    rows = numel(out) // max(n, 1)
    if right.strides != (right.sizes[-1], 1) or not is_dense(left) or rows == 0:
        return False
    dtype = str(out.dtype).rpartition(".")[2]
    shapes = {"a": (rows, k), "b": right.sizes, **dict.fromkeys(results, (rows, n))}
    places = {
        name: (at << 40, dtype, [numel(out), shape[-1]])
        for at, (name, shape) in enumerate(shapes.items(), 1)
    }
    extents = {"l": 1, "m": rows, "n": n, "k": k}
    if backward:
        extents["parts"] = 1
    index = int(out.buffer.device.partition(":")[2] or 0)
    size = cuda.get_device_properties(index).multi_processor_count
    gpu = cuda.get_device_name(index), *cuda.get_device_capability(index), size
    return bool(native.cute_choice(name, extents, places, *gpu))


def _activations(edits: Edits, uses: Uses) -> None:
    ops = uses.tape.ops
    for at, op in enumerate(ops):
        activation = activation_of(op) if op.name in ("relu", "gelu", "silu") else None
        if activation is None or not _here(op):
            continue
        x, out = op.args[0], op.outputs[0]
        found = uses.writer(x, at)
        if found is None or ops[found].name != "linear" or not edits.free(found):
            continue
        why = None
        takes = activation in FORWARD or _chosen(activation, False, *ops[found].args[:2], out)
        if not takes:
            why = f"no product has {activation}"
        elif out.dtype != x.dtype or not is_dense(x) or not is_dense(out):
            why = "another dtype or layout"
        elif out.buffer is x.buffer or not uses.can_run_at(at, found):
            why = "it works in place, or its memory is in use before"
        if why:
            edits.refused(f"{op.name} of a linear stays an op: {why}", op)
            continue
        readers = set(uses.reads(x.buffer)) - {at}
        keep = bool(readers) or x.buffer.role != "scratch"
        if not keep and activation not in FORWARD:
            edits.refused(f"{op.name} of a linear stays an op: the linear is not kept", op)
            continue
        if keep and activation == "relu":
            edits.refused("relu of a linear stays an op: the linear is read too", op)
            continue
        results = [out, x] if keep else [out]
        made = make_op(
            "_linear_activation", (*ops[found].args, activation, keep), results, ops[found]
        )
        edits.replace(found, made, {at})
        edits.reorders(out)
        edits.made(f"linear + {op.name} as one op", op)


def _derivatives(edits: Edits, uses: Uses) -> None:
    ops = uses.tape.ops
    for at, op in enumerate(ops):
        activation = activation_of(op) if op.name in _BACKWARD else None
        if activation is None or not _here(op):
            continue
        grad, saved = op.args[:2]
        out = op.outputs[0]
        writes = uses.writes(grad.buffer)
        found = uses.only_reader(grad.buffer)
        if found != at or ops[writes[0]].name != "mm":
            continue
        product = writes[0]
        made = ops[product].outputs[0]
        why = None
        takes = activation in BACKWARD or _chosen(
            activation, True, *ops[product].args[:2], ops[product].outputs[0]
        )
        if not takes:
            why = f"no product has the derivative of {activation}"
        elif not same_elements(made, grad) or not is_dense(saved) or not is_dense(out):
            why = "part of a product, or not contiguous"
        elif saved.sizes != grad.sizes or out.sizes != grad.sizes:
            why = "operands that broadcast"
        elif not saved.dtype == out.dtype == grad.dtype:
            why = "operands of several dtypes"
        elif not uses.can_wait(product, at):
            why = "the product's operands change in between"
        elif any(out.buffer is view.buffer for view in ops[product].reads()):
            why = "it takes the place of what the product reads"
        if why:
            edits.refused(f"mm and {op.name} stay two ops: {why}", op)
            continue
        shape = made.sizes
        made = make_op(
            "_mm_activation_backward",
            (*ops[product].args, reshaped(saved, shape), activation, False),
            [reshaped(out, shape)],
            op,
            kernel=ops[product],
        )
        edits.replace(at, made, {product})
        edits.reorders(out)
        edits.made(f"mm + {op.name} as one op", op)


def _column_sums(edits: Edits, uses: Uses) -> None:
    ops = uses.tape.ops
    for at, op in enumerate(ops):
        if not _sums_columns(op) or not _here(op):
            continue
        grad, out = op.args[0], op.outputs[0]
        product = uses.writer(grad, at)
        if product is None or ops[product].name != "_mm_activation_backward":
            continue
        if not edits.free(product):
            continue
        self, mat2, saved, activation, _, again = ops[product].args
        why = None
        if activation not in SUMS and not _chosen(activation, True, self, mat2, grad):
            why = "no kernel has both"
        elif out.dtype != grad.dtype:
            why = "sums in another dtype"
        elif not uses.can_run_at(at, product):
            why = "the sums' memory is in use before"
        if why:
            edits.refused(f"the derivative of {activation} and sum stay two ops: {why}", op)
            continue
        made = make_op(
            "_mm_activation_backward",
            (self, mat2, saved, activation, True, again),
            [view for view in (ops[product].outputs[0], out, ops[product].outputs[2]) if view],
            ops[product],
        )
        edits.replace(product, made, {at})
        edits.reorders(out)
        edits.made(f"mm + {activation}'s derivative + sum as one op", op)


def _sums_columns(op: Op) -> bool:
    """Whether it sums the columns of a matrix."""
    if op.name != "sum.dim":
        return False
    grad, dim, keep, _ = op.args
    return list(dim or ()) == [0] and not keep and len(grad.sizes) == 2


def _accumulations(edits: Edits, uses: Uses) -> None:
    ops = uses.tape.ops
    for at, op in enumerate(ops):
        if op.name != "add_" or not _here(op):
            continue
        target, added, alpha = op.args
        if added is None or uses.only_reader(added.buffer) != at:
            continue
        product = uses.writes(added.buffer)[0]
        if ops[product].name != "mm":
            continue
        made = ops[product].outputs[0]
        why = None
        if not same_elements(made, added) or not is_dense(target) or target.sizes != added.sizes:
            why = "part of a product, broadcast or not contiguous"
        elif target.dtype != added.dtype or not target.dtype.is_floating_point:
            why = f"the sum is in {target.dtype}"
        elif alpha != 1:
            why = f"it adds {alpha} times the product"
        elif not uses.can_wait(product, at):
            why = "the product's operands change in between"
        elif any(target.buffer is view.buffer for view in ops[product].reads()):
            why = "the sum takes the place of what the product reads"
        if why:
            edits.refused(f"mm and add_ stay two ops: {why}", op)
            continue
        sums = reshaped(target, made.sizes)
        made = make_op(
            "addmm", (sums, *ops[product].args), [sums], op, kernel=ops[product], beta=1, alpha=1
        )
        edits.replace(at, made, {product})
        edits.reorders(target)
        edits.made("mm + add_ as one op", op)


def _row_sums(edits: Edits, uses: Uses) -> None:
    ops = uses.tape.ops
    for at, op in enumerate(ops):
        if not _sums_columns(op) or not _here(op):
            continue
        grad = op.args[0]
        beside = [
            i
            for i in set(uses.reads(grad.buffer))
            if _is_wgrad(ops[i], grad)
            and not uses.written_between(grad.buffer, min(i, at), max(i, at))
        ]
        why = None
        if len(beside) != 1 or not edits.free(beside[0]):
            continue
        product = beside[0]
        out = op.outputs[0]
        if out.dtype != grad.dtype or not out.dtype.is_floating_point or numel(grad) == 0:
            why = "sums in another dtype"
        elif product < at and not uses.can_run_at(at, product):
            why = "the sums' memory is in use before"
        elif product > at and not uses.can_wait(at, product):
            why = "the sums are used before the product"
        if why:
            edits.refused(f"mm and sum stay two ops: {why}", op)
            continue
        made = make_op(
            "_mm_row_sums",
            ops[product].args,
            [ops[product].outputs[0], out],
            ops[product],
        )
        edits.replace(product, made, {at})
        edits.reorders(out)
        edits.made("mm + sum as one op", op)


def _is_wgrad(op: Op, grad: View) -> bool:
    """Whether it multiplies the transposed gradient."""
    if op.name != "mm":
        return False
    left = op.args[0]
    return (
        left.buffer is grad.buffer
        and left.offset == grad.offset
        and left.dtype == grad.dtype
        and left.sizes == tuple(reversed(grad.sizes))
        and left.strides == tuple(reversed(grad.strides))
    )
