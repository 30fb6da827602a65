"""Makes the gradients of several weights in one batched product.

Pattern: `mm` or `_mm_row_sums` whose left operand is a transposed gradient and whose sum is longer than
either side of the result: the gradient of a layer's weight, small beside the rows it is summed over. One
such product has too few tiles for a device, so that libraries split its sum and add the parts up in a
second launch. Rewrite: those of one geometry wait for the last of them and are one `bmm`; the sums of
rows beside them one `sum.dim`, or one each where they do not fill multiples of 256 bytes. Their operands,
results and sums lie in stacks: what were buffers are parts of a larger one, at equal steps. A gradient
that outlives the step cannot be such a part: where only a clip and an update read it, as they do float32
gradients, the product's result is another buffer, which they read, and from which the update writes the
gradient. Sums of gradients that a norm's backward adds to in place are buffers of their own where such
a product reads what was there before. Not bitwise: a product that is not split sums in another order
(`reordered`).

Rule: a result has fewer than `MOST_RESULT` elements, as larger ones fill a device by themselves, and so
many are one product as have about that many together. Of those that updates write, products of `MOST_WORK`
or more terms in all stay too: split, they fill a device for long enough. The gradients that wait, and the
inputs that they are multiplied with, take memory: as many wait for one another as leave the peak at most
`MOST_GROWTH` of it, or `MOST_BYTES`, above what it was.

On a GPU only. Runs when `chains` has, which looks at buffers, not at parts of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.passes import optimizer
from vibetensor.graphs.passes.recompute import Live
from vibetensor.graphs.plan import ALIGNMENT, aligned
from vibetensor.graphs.rewrite import (
    Uses,
    is_dense,
    make_op,
    numel,
    rebound,
    reordered,
    transposed,
    with_buffers,
)
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape, View

BITWISE = False
DEVICES = ("cuda",)  # where it rewrites
MOST_RESULT = 1 << 22
MOST_WORK = 1 << 32
MOST_GROWTH = 1 / 16
MOST_BYTES = 1 << 30
_PARTS = (1, 2, 3, 4, 6, 8)  # of the products that could be one
_NAMES = ("mm", "_mm_row_sums")
_NORMS = ("_residual_layer_norm_backward", "_residual_rms_norm_backward")


def run(tape: Tape) -> Tape:
    """The tape with products for weights' gradients in batches."""
    decisions: list[Decision] = []
    given = tape
    for prepared in (_plain_products, _through_updates, _sums_apart):
        tape = prepared(tape)
    uses = Uses(tape)
    found = [at for at in range(len(tape.ops)) if _is_candidate(uses, at, decisions)]
    lanes = list(_lanes(uses, found))
    if not any(len(lane) > 1 for lane in lanes):
        return given.replaced(given.ops, decisions)
    device = tape.ops[found[0]].outputs[0].buffer.device  # type: ignore[union-attr]
    before = Live(given, device).peak
    most = before + max(MOST_BYTES, int(MOST_GROWTH * before))
    for parts in _PARTS:
        made = _stacked(tape, uses, lanes, parts)
        if not made.joined:
            break
        after = Live(made.tape, device).peak
        if after <= most:
            text = f"{after:,} bytes live at most, not {before:,}"
            for op, what in made.joined:
                decisions.append(Decision("weight_gradients", True, f"{what} as one: {text}", op))
            decisions += made.refused
            return made.tape.replaced(made.tape.ops, decisions, made.bound)
    text = f"products stay apart: no two can wait for one another with {most:,} bytes live at most"
    decisions.append(Decision("weight_gradients", False, text, tape.ops[found[0]]))
    return given.replaced(given.ops, decisions)


def _plain_products(tape: Tape) -> Tape:
    """The tape with sums of rows as ops of their own where other products of the same operands have none:
    a first layer's, as the others' come with the norm before them."""
    plain = {_kind(op) for op in tape.ops if op.name == "mm" and _is_small_product(op)}
    apart = [
        op.name == "_mm_row_sums" and _is_small_product(op) and _kind(op) in plain
        for op in tape.ops
    ]
    if not any(apart):
        return tape
    trial = _copy(tape)
    trial.ops = []
    for op, split in zip(tape.ops, apart):
        if split:
            product, sums = op.outputs
            rows = transposed(op.args[0])
            trial.ops.append(make_op("mm", op.args, [product], op))
            trial.ops.append(make_op("sum", (rows, [0], False), [sums], op))
        else:
            trial.ops.append(op)
    return trial


def _kind(op: Op) -> tuple[Any, ...]:
    """What the operands of products that may be one have in common."""
    return tuple((view.dtype, view.sizes) for view in op.args)


def _through_updates(tape: Tape) -> Tape:
    """The tape with gradients of products that have others of their kind in buffers of the step, where
    only clips and the updates that write them need them."""
    uses = Uses(tape)
    ops = tape.ops
    kinds: dict[tuple[Any, ...], list[tuple[int, int]]] = {}  # products, and their updates
    for at, op in enumerate(ops):
        grads = optimizer.gradients(op)
        once = Counter(grad for grad, _ in grads)
        for grad, source in grads:
            product = uses.writer(grad, at)
            if product is None or source != grad or once[grad] > 1 or not _is_kept(ops[product]):
                continue
            others = set(uses.writes(grad.buffer)) - {product, at}
            if not others and optimizer.only_norms_read(uses, grad, at):
                kind = ops[product].name, grad.dtype, *_kind(ops[product])
                kinds.setdefault(kind, []).append((product, at))
    moved = [pair for pairs in kinds.values() if len(pairs) > 1 for pair in pairs]
    if not moved:
        return tape
    trial = _copy(tape)
    instead: dict[View, View] = {}
    for product, _ in moved:
        grad = ops[product].outputs[0]
        assert grad is not None
        buffer = trial.new_buffer(numel(grad) * grad.dtype.itemsize, grad.buffer.device)
        instead[grad] = replace(grad, buffer=buffer, offset=0)
    products, updates = {at for at, _ in moved}, {at for _, at in moved}
    for at, op in enumerate(ops):
        if at in products:
            trial.ops[at] = replace(op, outputs=[instead[op.outputs[0]], *op.outputs[1:]])  # type: ignore[index]
        elif at in updates:
            sources = [instead.get(source, source) for _, source in optimizer.gradients(op)]
            trial.ops[at] = optimizer.with_sources(op, sources)
        elif op.name == "_clip_coefficient" and any(view in instead for view in op.args[0]):
            trial.ops[at] = optimizer.with_norm_of(op, instead)
    return trial


def _is_small_product(op: Op) -> bool:
    """Whether it may be the gradient of a small weight, on a device that it rewrites for."""
    out = op.outputs[0] if op.name in _NAMES else None
    return (
        out is not None and out.buffer.device.split(":")[0] in DEVICES and numel(out) < MOST_RESULT
    )


def _is_kept(op: Op) -> bool:
    """Whether it makes a small weight's gradient that outlives the step."""
    if not _is_small_product(op):
        return False
    out: View = op.outputs[0]  # type: ignore[assignment]
    wide = out.dtype in (vt.float32, vt.float64)
    work = numel(out) * op.args[0].sizes[1]
    return out.buffer.role != "scratch" and wide and is_dense(out) and work < MOST_WORK


def _sums_apart(tape: Tape) -> Tape:
    """The tape with sums of gradients in new buffers where they would take the place of ones that
    products read before."""
    uses = Uses(tape)
    found = {at for at, op in enumerate(tape.ops) if op.name in _NORMS and _takes_place(uses, at)}
    if not found:
        return tape
    trial = _copy(tape)
    instead: dict[Buffer, Buffer] = {}
    for at, op in enumerate(tape.ops):
        made = with_buffers(op, instead)
        if at in found:
            total: View = op.outputs[0]  # type: ignore[assignment]
            fresh = trial.new_buffer(total.buffer.nbytes, total.buffer.device)
            made = replace(made, outputs=[replace(total, buffer=fresh), *made.outputs[1:]])
            instead[total.buffer] = fresh
        trial.ops[at] = made
    return trial


def _takes_place(uses: Uses, at: int) -> bool:
    """Whether a norm's backward writes all of a buffer that a product of a weight's gradient reads."""
    op = uses.tape.ops[at]
    total, residual = op.outputs[0], op.args[1]
    if total is None or residual is None or total.buffer is not residual.buffer:
        return False
    buffer = total.buffer
    whole = is_dense(total) and numel(total) * total.dtype.itemsize == buffer.nbytes
    before = (uses.tape.ops[reader] for reader in uses.reads(buffer) if reader < at)
    return buffer.role == "scratch" and whole and any(map(_is_small_product, before))


def _copy(tape: Tape) -> Tape:
    """A tape to change: what is given up leaves no buffers behind."""
    trial = Tape(list(tape.ops), list(tape.buffers), tape.draws, setup=tape.setup)
    trial.decisions, trial.bound = tape.decisions, tape.bound
    return trial


def _shape(op: Op) -> str:
    (m, k), n = op.args[0].sizes, op.args[1].sizes[1]
    return f"{m} x {k} x {n}"


def _is_candidate(uses: Uses, at: int, decisions: list[Decision]) -> bool:
    """Whether the op makes a weight's gradient that may wait."""
    op = uses.tape.ops[at]
    if op.name not in _NAMES or op.outputs[0].buffer.device.split(":")[0] not in DEVICES:  # type: ignore[union-attr]
        return False
    left, right = op.args
    (m, k), n = left.sizes, right.sizes[1]
    if left.strides[0] != 1 or left.strides[1] < m or k <= max(m, n) or not m or not n:
        return False
    why = None
    if m * n >= MOST_RESULT:
        why = "its tiles are enough for a device"
    elif op.outputs[0].buffer.role != "scratch":  # type: ignore[union-attr]
        why = "it is a result of the step"
    elif any(view.buffer.role != "scratch" for view in op.reads()):
        why = "it reads what lives beyond the step"
    elif not _is_part_of_stack(uses, op.outputs[0]):
        why = (
            "its result is part of a buffer, is written elsewhere too, or no multiple of 256 bytes"
        )
    elif len({view.buffer for view in (*op.reads(), *op.writes())}) != 2 + len(op.outputs):
        why = "its operands are one buffer"
    if why:
        text = f"{op.name} of {_shape(op)} stays by itself: {why}"
        decisions.append(Decision("weight_gradients", False, text, op))
    return why is None


def _is_part_of_stack(uses: Uses, view: View | None) -> bool:
    """Whether a result can lie beside others of its kind, without a gap."""
    if view is None or view.buffer.role != "scratch" or len(uses.writes(view.buffer)) != 1:
        return False
    nbytes = numel(view) * view.dtype.itemsize
    whole = is_dense(view) and view.offset == 0 and nbytes == view.buffer.nbytes
    return whole and nbytes % ALIGNMENT == 0


def _stacked_views(uses: Uses, op: Op) -> list[View]:
    """What of a product comes to lie in stacks: operands, result, and the sums if they can."""
    sums = [view for view in op.outputs[1:] if view and _is_part_of_stack(uses, view)]
    return [*op.reads(), *op.outputs[:1], *sums]  # type: ignore[list-item]


def _geometry(uses: Uses, op: Op) -> tuple[Any, ...]:
    """What products must have in common."""
    views = _stacked_views(uses, op)
    return (
        op.name,
        str(op.call.switches),
        views[0].buffer.device,
        len(views),
        *((v.dtype, v.sizes, v.strides, v.offset, v.buffer.nbytes) for v in views),
    )


def _lanes(uses: Uses, found: list[int]) -> Iterator[list[int]]:
    """Products of one geometry, none of whose operands is another's: those of one input, as for a
    key and a value, are in lanes of their own."""
    by_geometry: dict[tuple[Any, ...], list[tuple[list[int], set[Buffer]]]] = {}
    for at in found:
        op = uses.tape.ops[at]
        buffers = {view.buffer for view in (*op.reads(), *op.writes())}
        lanes = by_geometry.setdefault(_geometry(uses, op), [])
        for lane, taken in lanes:
            if not buffers & taken:
                lane.append(at)
                taken |= buffers
                break
        else:
            lanes.append(([at], buffers))
    for lanes in by_geometry.values():
        for lane, _ in lanes:
            yield lane


@dataclass
class _Stacked:
    """A tape with stacks, and what is one product there."""

    tape: Tape
    joined: list[tuple[Op, str]]
    refused: list[Decision]
    bound: float


class _Stacks:
    """The buffers that have become parts of larger ones."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._parts: dict[Buffer, tuple[Buffer, int]] = {}  # the stack, and the byte in it

    def joins(self, buffers: list[Buffer]) -> bool:
        """Whether they are, or may become, the parts of one stack in this order."""
        placed = [self._parts.get(b) for b in buffers]
        if all(place is None for place in placed):
            return len(set(buffers)) == len(buffers)
        step = aligned(buffers[0].nbytes)
        first = placed[0]
        return first is not None and placed == [
            (first[0], first[1] + i * step) for i in range(len(buffers))
        ]

    def join(self, buffers: list[Buffer]) -> None:
        if buffers[0] in self._parts:
            return
        step = aligned(buffers[0].nbytes)
        stack = self._tape.new_buffer(step * len(buffers), buffers[0].device)
        for i, buffer in enumerate(buffers):
            self._parts[buffer] = (stack, i * step)

    def moved(self, view: View) -> View:
        """The view where its elements are now."""
        place = self._parts.get(view.buffer)
        if place is None:
            return view
        stack, byte = place
        return replace(view, buffer=stack, offset=view.offset + byte // view.dtype.itemsize)

    def all_of(self, views: list[View]) -> View:
        """The views as one with a dimension more."""
        first = self.moved(views[0])
        step = aligned(views[0].buffer.nbytes) // views[0].dtype.itemsize
        sizes, strides = (len(views), *first.sizes), (step, *first.strides)
        return replace(first, sizes=sizes, strides=strides)

    def rebind(self, op: Op) -> Op:
        touched = any(view.buffer in self._parts for view in (*op.reads(), *op.writes()))
        return rebound(op, self.moved) if touched else op


def _stacked(tape: Tape, uses: Uses, lanes: list[list[int]], parts: int) -> _Stacked:
    """The tape with every lane in so many batches at least."""
    trial = _copy(tape)
    made = _Stacked(trial, [], [], 0.0)
    stacks = _Stacks(trial)
    new: dict[int, list[Op]] = {}
    for lane in lanes:
        most = _most(tape.ops[lane[0]], len(lane), parts)
        for run in _runs(uses, lane, most, stacks):
            ops = [tape.ops[at] for at in run]
            if len(run) < 2:
                text = (
                    f"{ops[0].name} of {_shape(ops[0])} stays by itself: no other can be beside it"
                )
                made.refused.append(Decision("weight_gradients", False, text, ops[0]))
                continue
            columns = _columns(uses, run)
            for column in columns:
                stacks.join([view.buffer for view in column])
            left, right, *results = (stacks.all_of(column) for column in columns)
            product = make_op("bmm", (left, right), results[:1], ops[-1])
            # The left operand is the transpose of a gradient, or of a batch of them.
            for at, op in zip(run, ops):
                rows = transposed(stacks.moved(op.args[0]))
                apart = op.outputs[1:] if len(results) == 1 else []
                new[at] = [make_op("sum", (rows, [0], False), [sums], op) for sums in apart]
            new[run[-1]].append(product)
            if len(results) > 1:
                args = (transposed(left), [1], False)
                new[run[-1]].append(make_op("sum", args, results[1:], ops[-1]))
            made.joined.append((product, f"{len(run)} products of {_shape(ops[0])}"))
            sums = [view for op in ops for view in op.writes()]
            made.bound = max(made.bound, *(reordered(view) for view in sums))
    trial.ops = []
    for at, op in enumerate(tape.ops):
        # Also what is new: buffers may have become parts of stacks since it was made.
        trial.ops += [stacks.rebind(one) for one in new.get(at, [op])]
    return made


def _most(op: Op, count: int, parts: int) -> int:
    """How many of so many products are one: in at least so many parts, and of about one size."""
    (m, _), n = op.args[0].sizes, op.args[1].sizes[1]
    enough = max(2, round(MOST_RESULT / (m * n)))
    return -(-count // max(parts, -(-count // enough)))


def _columns(uses: Uses, run: list[int]) -> list[list[View]]:
    """The products' left operands, right ones and results, as far as they come to lie in stacks."""
    return [list(views) for views in zip(*(_stacked_views(uses, uses.tape.ops[at]) for at in run))]


def _runs(uses: Uses, lane: list[int], most: int, stacks: _Stacks) -> Iterator[list[int]]:
    """Products that may wait for the last of them, at most so many, whose operands can be, or are,
    beside one another."""
    run: list[int] = []
    for at in lane:
        longer = [*run, at]
        if run and (
            len(run) == most
            or not all(uses.can_wait(one, at) for one in run)
            or not all(stacks.joins([v.buffer for v in c]) for c in _columns(uses, longer))
        ):
            yield run
            longer = [at]
        run = longer
    if run:
        yield run
