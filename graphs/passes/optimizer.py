"""Clips gradients, counts the step and updates the weights in fewer ops.

Pattern: `_multi_tensor_norm`, then max_norm / (norm + eps) and its limit of 1. Rewrite: one op.
Pattern: `_foreach_mul_` of gradients by one number, `_foreach_add_` on step counts, then
`_fused_adam_`, `_fused_adamw_` or `_fused_sgd_` of the same gradients, in one or more groups.
Rewrite: one op a group, which leaves the gradients scaled, as they were. Bitwise: float32 and
float64 gradients only, whose scaled values need no rounding of their own.
"""

from __future__ import annotations

from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import Edits, Uses, make_op
from vibetensor.graphs.tape import Op, Tape, View

BITWISE = True

_UPDATES = ("_fused_adam_", "_fused_adamw_", "_fused_sgd_")
_WIDE = (vt.float32, vt.float64)


def run(tape: Tape) -> Tape:
    """The tape with clipping, counting and updates folded."""
    for rewrite in (_coefficients, _updates):
        edits = Edits(tape, "optimizer")
        rewrite(edits, Uses(tape))
        tape = edits.applied()
    return tape


def _coefficients(edits: Edits, uses: Uses) -> None:
    """Norm, sum, quotient and limit as one op."""
    ops = uses.tape.ops
    for at, op in enumerate(ops):
        if op.name != "_clamp_max":
            continue
        quotient, limit = op.args
        chain = _producers(uses, quotient, at)
        if chain is None:
            continue
        divide, add, norm = chain
        max_norm = ops[divide].args[0]
        total, eps, _ = ops[add].args
        tensors, order = ops[norm].args
        result = op.outputs[0]
        why = None
        if any(ops[i].outputs[0].dtype != total.dtype for i in (divide, add, at)):
            why = "numbers of another dtype"
        elif total.dtype not in _WIDE:
            why = f"a norm in {total.dtype}"
        elif any(uses.writes(v.buffer) for v in (max_norm, eps, limit)):
            why = "a maximum that the step computes"
        elif uses.touched_between(result.buffer, norm, at):
            why = "its memory is in use before"
        if why:
            edits.refused(f"norm and clip coefficient stay apart: {why}", op)
            continue
        made = make_op(
            "_clip_coefficient",
            (list(tensors), order, max_norm, eps, limit),
            [ops[norm].outputs[0], result],
            ops[norm],
        )
        edits.replace(norm, made, {divide, add, at})
        edits.made("norm and clip coefficient in one op", op)


def _producers(uses: Uses, quotient: View, at: int) -> tuple[int, int, int] | None:
    """The division, the sum and the norm that a clip coefficient comes from."""
    ops = uses.tape.ops
    divide = uses.writer(quotient, at)
    if divide is None or ops[divide].name != "div" or len(ops[divide].args) != 2:
        return None
    if uses.only_reader(quotient.buffer) != at:
        return None
    divisor = ops[divide].args[1]
    add = uses.writer(divisor, divide)
    if add is None or ops[add].name != "add" or ops[add].args[2] != 1:
        return None
    if uses.only_reader(divisor.buffer) != divide:
        return None
    total = ops[add].args[0]
    norm = uses.writer(total, add)
    if norm is None or ops[norm].name != "_multi_tensor_norm":
        return None
    return divide, add, norm


def _updates(edits: Edits, uses: Uses) -> None:
    """Scaling of gradients and counting of steps inside the updates."""
    ops = uses.tape.ops
    factors: dict[int, View] = {}  # by update
    counts: dict[int, View] = {}
    updates = [i for i, op in enumerate(ops) if op.name in _UPDATES]
    for at, op in enumerate(ops):
        if op.name == "_foreach_mul_":
            chosen = _scaled_by(edits, uses, at, updates)
            factors.update(dict.fromkeys(chosen, op.args[1]))
            if chosen:
                edits.gone.add(at)
        elif op.name == "_foreach_add_":
            chosen = _counted_by(uses, at, updates)
            counts.update(dict.fromkeys(chosen, op.args[1]))
            if chosen:
                edits.gone.add(at)
    for at in updates:
        factor, count = factors.get(at), counts.get(at)
        if factor is None and count is None:
            continue
        op = ops[at]
        made = _update(op, factor, count)
        edits.replace(at, made)
        parts = ["clipping"] * (factor is not None) + ["counting"] * (count is not None)
        edits.made(f"{' and '.join(parts)} in {made.name}", op)


def _lists(op: Op) -> dict[str, Any]:
    """An update's arguments by name."""
    if op.name == "_fused_sgd_":
        names = (
            "self grads momentum_buffer_list weight_decay momentum lr dampening nesterov maximize "
            "is_first_step grad_scale found_inf"
        )
    else:
        names = (
            "self grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps lr beta1 beta2 "
            "weight_decay eps amsgrad maximize grad_scale found_inf"
        )
    return dict(zip(names.split(), op.args))


def _scaled_by(edits: Edits, uses: Uses, at: int, updates: list[int]) -> list[int]:
    """The updates after `at` that can scale all of its gradients."""
    ops = uses.tape.ops
    op = ops[at]
    scaled, factor = list(op.args[0]), op.args[1]
    wanted = set(scaled)
    found: list[int] = []
    seen: set[View] = set()
    why = "no fused update takes the gradients"
    for update in updates:
        args = _lists(ops[update])
        grads = set(args["grads"])
        if update < at or not grads & wanted:
            continue
        why = None
        if not grads <= wanted or grads & seen or len(grads) != len(args["grads"]):
            why = "an update takes other gradients too"
        elif args["grad_scale"] is not None or args["found_inf"] is not None:
            why = "an update that may be skipped"
        elif any(
            g.dtype not in _WIDE or p.dtype != g.dtype for p, g in zip(args["self"], args["grads"])
        ):
            why = "gradients in 16 bits, or not in their weights' dtype"
        elif factor.sizes != () or uses.written_between(factor.buffer, at, update + 1):
            why = "the factor changes in between"
        elif any(uses.touched_between(g.buffer, at, update) for g in grads):
            why = "a gradient is used in between"
        if why:
            break
        seen |= grads
        found.append(update)
    if not why and seen != wanted:
        why = "gradients that no update takes"
    if why:
        edits.refused(f"scaling of {len(scaled)} gradients stays an op: {why}", op)
        return []
    return found


def _counted_by(uses: Uses, at: int, updates: list[int]) -> list[int]:
    """The update after `at` that can count its steps."""
    ops = uses.tape.ops
    steps, count, alpha = ops[at].args
    for update in updates:
        if update < at or ops[update].name == "_fused_sgd_":
            continue
        args = _lists(ops[update])
        if list(args["state_steps"]) != list(steps) or len(set(steps)) != len(steps):
            continue
        if alpha != 1 or count.sizes != () or args["grad_scale"] is not None:
            return []
        if args["found_inf"] is not None or uses.written_between(count.buffer, at, update + 1):
            return []
        used = any(uses.touched_between(s.buffer, at, update) for s in steps)
        return [] if used or any(s.dtype not in _WIDE for s in steps) else [update]
    return []


def _update(op: Op, factor: View | None, count: View | None) -> Op:
    args = _lists(op)
    args.pop("grad_scale"), args.pop("found_inf")
    lists = [list(args.pop(name)) for name in list(args) if isinstance(args[name], list | tuple)]
    if op.name == "_fused_sgd_":
        name = "_scaled_sgd_"
    else:
        name = "_scaled_adam_"
        args |= {"count": count, "decoupled": op.name == "_fused_adamw_"}
    changed = [view for views in lists for view in views]
    return make_op(name, lists, changed, op, factor=factor, **args)
