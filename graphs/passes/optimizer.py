"""Clips gradients, counts the step and updates the weights in fewer ops.

Pattern: `_multi_tensor_norm`, then max_norm / (norm + eps) and its limit of 1. Rewrite: one op.
Pattern: `_foreach_mul_` of gradients by one number, `_foreach_add_` on step counts, then
`_fused_adam_`, `_fused_adamw_` or `_fused_sgd_` of the same gradients, in one or more groups.
Rewrite: one op a group, which leaves the gradients scaled, as they were. Bitwise: float32 and
float64 gradients only, whose scaled values need no rounding of their own.
Pattern: `_to_dtype` of gradients in 16 bits, as mixed precision makes them, that only the norm and the
update read. Rewrite: these read the narrow ones, and the update writes the gradients. Bitwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import Edits, Uses, is_dense, make_op
from vibetensor.graphs.tape import Op, Tape, View

BITWISE = True

_UPDATES = ("_fused_adam_", "_fused_adamw_", "_fused_sgd_")
_WIDE = (vt.float32, vt.float64)
_HALF = (vt.bfloat16, vt.float16)
_LISTS = "self grads exp_avgs exp_avg_sqs max_exp_avg_sqs momentum_buffer_list state_steps sources"


def run(tape: Tape) -> Tape:
    """The tape with clipping, counting and updates folded."""
    for rewrite in (_coefficients, _updates, _narrow_gradients):
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
            (list(tensors), order, max_norm, eps, limit, total.dtype),
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
        made = _update(op, factor=factor, count=count)
        edits.replace(at, made)
        parts = ["clipping"] * (factor is not None) + ["counting"] * (count is not None)
        edits.made(f"{' and '.join(parts)} in {made.name}", op)


_NAMES = {
    "_fused_sgd_": "self grads momentum_buffer_list weight_decay momentum lr dampening nesterov "
    "maximize is_first_step grad_scale found_inf",
    "_scaled_sgd_": "self grads momentum_buffer_list sources lr factor weight_decay momentum "
    "dampening nesterov maximize is_first_step",
    "_fused_adam_": "self grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps lr beta1 beta2 "
    "weight_decay eps amsgrad maximize grad_scale found_inf",
    "_scaled_adam_": "self grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps sources lr factor "
    "count beta1 beta2 weight_decay eps amsgrad maximize decoupled",
}
_NAMES["_fused_adamw_"] = _NAMES["_fused_adam_"]


def _lists(op: Op) -> dict[str, Any]:
    """An update's arguments by name."""
    return dict(zip(_NAMES[op.name].split(), op.args, strict=True))


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


def _update(
    op: Op, factor: View | None = None, count: View | None = None, sources: list[View] | None = None
) -> Op:
    """An update that scales its gradients, counts its steps and widens its gradients."""
    args = _lists(op)
    name = "_scaled_sgd_" if "_sgd_" in op.name else "_scaled_adam_"
    if op.name != name:
        del args["grad_scale"], args["found_inf"]
        args |= {"factor": factor, "sources": []}
        if name == "_scaled_adam_":
            args |= {"count": count, "decoupled": op.name == "_fused_adamw_"}
    if sources is not None:
        args["sources"] = sources
    lists = [list(args.pop(key)) for key in _NAMES[name].split() if key in _LISTS.split()]
    changed = [view for views in lists[:-1] for view in views]
    return make_op(name, lists, changed, op, **args)


def gradients(op: Op) -> list[tuple[View, View]]:
    """An update's gradients, each with what the update reads it from: itself, or another tensor, which
    it then writes it from. None where the op is no update that could read others."""
    if op.name not in _NAMES:
        return []
    args = _lists(op)
    if args.get("grad_scale") is not None or args.get("found_inf") is not None:
        return []
    grads = list(args["grads"])
    return list(zip(grads, args.get("sources") or grads, strict=True))


def with_sources(op: Op, sources: list[View]) -> Op:
    """An update that reads its gradients there."""
    return _update(op, sources=sources)


def with_norm_of(op: Op, instead: Mapping[View, View]) -> Op:
    """A `_clip_coefficient` that reads others in the place of some gradients."""
    tensors = [instead.get(view, view) for view in op.args[0]]
    return make_op(op.name, (tensors, *op.args[1:]), list(op.writes()), op)


def only_norms_read(uses: Uses, grad: View, at: int) -> bool:
    """Whether, of what comes before the update at `at`, only norms for clipping read a gradient."""
    readers = [uses.tape.ops[reader] for reader in uses.reads(grad.buffer) if reader < at]
    return all(
        op.name == "_clip_coefficient"
        and all(view == grad for view in op.reads() if view.buffer is grad.buffer)
        for op in readers
    )


def _narrow_gradients(edits: Edits, uses: Uses) -> None:
    """Casts of gradients inside the updates and norms that read them."""
    ops = uses.tape.ops
    narrow: dict[int, dict[View, View]] = {}  # by norm: gradients and what they are casts of
    for at, op in enumerate(ops):
        grads = [grad for grad, _ in gradients(op)]
        casts = [_cast_of(uses, grad, at) for grad in grads]
        written = {view.buffer for view in op.writes()}
        sources = [g if c is None else ops[c].args[0] for g, c in zip(grads, casts)]
        found = [
            (grad, cast)
            for grad, source, cast in zip(grads, sources, casts)
            if cast is not None and source.buffer not in written and grads.count(grad) == 1
        ]
        if not found:
            continue
        kept = dict(found)
        sources = [s if g in kept else g for g, s in zip(grads, sources)]
        made = with_sources(op, sources)
        edits.replace(at, made, {cast for _, cast in found})
        edits.made(f"{len(found)} casts of gradients in {made.name}", op)
        for grad, cast in found:
            for reader in uses.reads(grad.buffer):
                if cast < reader < at:
                    narrow.setdefault(reader, {})[grad] = ops[cast].args[0]
    for at, instead in narrow.items():
        edits.replace(at, with_norm_of(ops[at], instead))


def _cast_of(uses: Uses, grad: View, at: int) -> int | None:
    """The cast that a float32 gradient of the update at `at` comes from, if only it and norms need
    the gradient until then."""
    ops = uses.tape.ops
    cast = uses.writer(grad, at)
    if cast is None or ops[cast].name != "_to_dtype" or grad.dtype != vt.float32:
        return None
    source = ops[cast].args[0]
    if source.dtype not in _HALF or not is_dense(source) or not is_dense(grad):
        return None
    if set(uses.writes(grad.buffer)) - {cast, at} or uses.written_between(source.buffer, cast, at):
        return None
    return cast if only_norms_read(uses, grad, at) else None
