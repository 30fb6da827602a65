"""Leaves out copies: what makes a tensor writes it where it is wanted, or what reads it reads the
source.

Patterns and rewrites, each where no op between touches the memory in question:
- `cat` (and `stack`) of tensors that nothing else reads: their makers write into slices of the joined
  one. So the gradients of query, key and value of one split projection are never joined.
- `copy_` and `clone` of such a tensor: its maker writes into the target.
- `copy_` and `clone` of one layout into scratch: readers read the source, if neither changes while the
  copy is read, or if the source is not needed any more.
- A scratch buffer that is filled and then overwritten as a whole is not filled.

A maker that gets other strides must be one whose kernels take any: attention's backward, and on the
CPU pointwise ops. Bitwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from vibetensor import _C
from vibetensor.graphs.rewrite import Uses, rebound
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape, View

BITWISE = True
_ANY_STRIDES = ("_attention_backward", "_to_dtype", "_where", "_dropout_backward", "clone")
_ANY_STRIDES_ON_DEVICES = ("_attention_backward",)


def run(tape: Tape) -> Tape:
    """The tape without copies that nobody needs."""
    for part in (_drop_dead_stores, _place_pieces, _place_sources, _read_sources):
        # A rewrite changes who uses what, so the next one that this may concern looks anew.
        while (found := part(tape)) is not None:
            tape = found
    return tape


def _without(tape: Tape, gone: set[int], instead: dict[int, Op], made: list[Decision]) -> Tape:
    """The tape without some ops and with others changed. Views of buffers that nothing uses any more
    go as well."""
    kept = [instead.get(at, op) for at, op in enumerate(tape.ops) if at not in gone]
    used = {v.buffer for op in kept if not op.is_view for v in (*op.reads(), *op.writes())}
    return tape.replaced(
        [op for op in kept if not op.is_view or all(v.buffer in used for v in op.reads())], made
    )


def _covers(view: View) -> bool:
    """Whether the view is every byte of its buffer."""
    return (
        math.prod(view.sizes) * view.dtype.itemsize == view.buffer.nbytes
        and _dense_rank(view) is not None
    )


def _dense_rank(view: View) -> list[int] | None:
    """Dimensions from the fastest, if the view has no gaps and no overlaps."""
    order = sorted(
        (d for d in range(len(view.sizes)) if view.sizes[d] != 1), key=lambda d: view.strides[d]
    )
    step = 1
    for d in order:
        if view.strides[d] != step:
            return None
        step *= view.sizes[d]
    return order


def _drop_dead_stores(tape: Tape) -> Tape | None:
    uses = Uses(tape)
    for at, op in enumerate(tape.ops):
        if op.name != "copy_" or op.is_view:
            continue
        target, source = op.args[0], op.args[1]
        buffer = target.buffer
        if buffer.role != "scratch" or source.buffer is buffer or not _covers(target):
            continue
        before = [w for w in uses.writes(buffer) if w < at]
        # An op that writes in place counts as a reader; one that only fills reads nothing.
        fills = [w for w in before if tape.ops[w].name in ("fill_", "copy_")]
        read = [r for r in uses.reads(buffer) if r < at and r not in fills]
        if not fills or read or len(fills) != len(before):
            continue
        if any(v.buffer is buffer for f in fills for v in tape.ops[f].inputs[1:] if v):
            continue
        text = f"{tape.ops[fills[0]].name} is overwritten as a whole"
        return _without(tape, set(fills), {}, [Decision("copies", True, text, op)])
    return None


def _maker(uses: Uses, buffer: Buffer, reader: int) -> int | None:
    """The op that makes what only `reader` reads; None if others touch it."""
    writes = uses.writes(buffer)
    if buffer.role != "scratch" or len(set(writes)) != 1 or uses.reads(buffer) != [reader]:
        return None
    return writes[0] if writes[0] < reader else None


def _moved(view: View, source: View, target: View) -> View | None:
    """Where `view`'s elements, seen as elements of `source` on the same buffer, lie in `target`,
    which has source's sizes. None if no strides say so."""
    if view.dtype != target.dtype or view.offset < source.offset:
        return None
    dims = sorted(
        (d for d in range(len(source.sizes)) if source.sizes[d] != 1),
        key=lambda d: source.strides[d],
    )
    if any(source.strides[d] <= 0 for d in dims):
        return None
    # The first element's place, from the slowest dimension on; then each dimension is steps in one.
    reach, offset, left = dict.fromkeys(dims, 0), target.offset, view.offset - source.offset
    for d in reversed(dims):
        reach[d], left = divmod(left, source.strides[d])
        offset += reach[d] * target.strides[d]
    if left:
        return None
    strides = []
    for size, stride in zip(view.sizes, view.strides):
        if size == 1:
            strides.append(stride)
            continue
        fits = [d for d in dims if source.strides[d] <= stride]
        if not fits or stride % source.strides[fits[-1]]:
            return None
        d = fits[-1]
        steps = stride // source.strides[d]
        reach[d] += steps * (size - 1)
        strides.append(steps * target.strides[d])
    if any(reach[d] >= source.sizes[d] for d in dims):
        return None
    return dataclasses.replace(view, buffer=target.buffer, strides=tuple(strides), offset=offset)


def _placed(op: Op, source: View, target: View) -> Op | str:
    """The maker of `source` with its results in `target`; why it cannot be."""
    if any(v.buffer is source.buffer for v in op.reads()):
        return f"{op.name} changes it in place"
    if any(v.buffer is target.buffer for v in op.reads()):
        return f"{op.name} reads the target"
    made = [v for v in op.writes() if v.buffer is source.buffer]
    places: dict[int, View] = {}
    for view in made:
        moved = _moved(view, source, target)
        if moved is None:
            return f"{op.name} makes another layout"
        if (moved.strides, moved.offset) != (view.strides, view.offset):
            on_device = any(v.buffer.device != "cpu" for v in op.writes())
            if on_device and op.name not in _ANY_STRIDES_ON_DEVICES:
                return f"kernels on {view.buffer.device} need their own layout"
            if moved.strides != view.strides and not _takes_any_strides(op):
                return f"{op.name} does not write with strides"
        places[id(view)] = moved
    if sum(math.prod(v.sizes) for v in made) != math.prod(source.sizes):
        return f"{op.name} makes another layout"
    return rebound(op, lambda v: places.get(id(v), v))


def _takes_any_strides(op: Op) -> bool:
    return op.name in _ANY_STRIDES or _C.graphs.has_pointwise_kernel(op.name)


def _place_pieces(tape: Tape) -> Tape | None:
    uses = Uses(tape)
    known = {(d.text, d.op) for d in tape.decisions}
    decisions: list[Decision] = []
    gone: set[int] = set()
    changed: dict[int, Op] = {}
    moved: set[Buffer] = set()  # whose uses are no longer what `uses` says
    for at, op in enumerate(tape.ops):
        if op.name != "cat":
            continue
        (out,) = op.writes()
        pieces: Sequence[View] = op.args[0]
        buffers = {out.buffer, *(piece.buffer for piece in pieces)}
        if buffers & moved:
            continue
        dim = op.args[1] % max(len(out.sizes), 1)
        instead: dict[int, Op] = {}
        start, why_not = 0, ""
        for piece in pieces:
            maker = _maker(uses, piece.buffer, at)
            if maker is None or len(piece.sizes) != len(out.sizes):
                why_not = f"{piece} is no result of one op that only cat reads"
                break
            place = dataclasses.replace(
                out, sizes=piece.sizes, offset=out.offset + start * out.strides[dim]
            )
            start += piece.sizes[dim]
            if uses.touched_between(out.buffer, maker - 1, at):
                why_not = f"{out} is used before"
                break
            before = instead.get(maker) or changed.get(maker) or tape.ops[maker]
            placed = _placed(before, piece, place)
            if isinstance(placed, str):
                why_not = placed
                break
            instead[maker] = placed
        if not why_not:
            decisions.append(Decision("copies", True, f"{len(pieces)} tensors are made joined", op))
            gone.add(at)
            changed |= instead
            moved |= buffers
            continue
        text = f"cat stays: {why_not}"
        if (text, op) not in known:
            decisions.append(Decision("copies", False, text, op))
    return _without(tape, gone, changed, decisions) if decisions else None


def _copied(op: Op) -> tuple[View, View] | None:
    """Target and source of a copy as it is."""
    if op.is_view or op.name not in ("copy_", "clone"):
        return None
    (target,) = op.writes()
    source = op.args[1] if op.name == "copy_" else op.args[0]
    same = source.dtype == target.dtype and source.sizes == target.sizes
    if not same or source.buffer is target.buffer or source.buffer.device != target.buffer.device:
        return None
    return target, source


def _copies(tape: Tape) -> Iterator[tuple[int, Op, View, View]]:
    """Copies as they are: where, the op, target and source."""
    for at, op in enumerate(tape.ops):
        pair = _copied(op)
        if pair is not None:
            yield at, op, *pair


def _place_sources(tape: Tape) -> Tape | None:
    uses = Uses(tape)
    for at, op, target, source in _copies(tape):
        maker = _maker(uses, source.buffer, at)
        if maker is None or uses.touched_between(target.buffer, maker - 1, at):
            continue
        placed = _placed(tape.ops[maker], source, target)
        if isinstance(placed, str):
            continue
        text = f"{placed.name} writes where {op.name} would"
        return _without(tape, {at}, {maker: placed}, [Decision("copies", True, text, op)])
    return None


def _read_sources(tape: Tape) -> Tape | None:
    uses = Uses(tape)
    for at, op, target, source in _copies(tape):
        copy, kept = target.buffer, source.buffer
        touched = [*uses.reads(copy), *uses.writes(copy)]
        if copy.role != "scratch" or any(t < at for t in touched):
            continue
        dense = target.strides == source.strides and _dense_rank(target) is not None
        if not dense or not _covers(target):
            continue
        last = max(touched)
        steady = uses.writes(copy) == [at] and not uses.written_between(kept, at, last + 1)
        over = kept.role == "scratch" and max(*uses.reads(kept), *uses.writes(kept)) == at
        if not steady and not over:
            continue
        shift = source.offset - target.offset
        same_dtype = all(
            v.dtype == target.dtype
            for t in touched
            for v in (*tape.ops[t].reads(), *tape.ops[t].writes())
            if v.buffer is copy
        )
        if not same_dtype:
            continue

        def read_source(view: View, copy: Any = copy, kept: Any = kept, shift: int = shift) -> View:
            if view.buffer is not copy:
                return view
            return dataclasses.replace(view, buffer=kept, offset=view.offset + shift)

        instead = {t: rebound(tape.ops[t], read_source) for t in set(touched) - {at}}
        text = f"what {op.name} copies is read where it is"
        return _without(tape, {at}, instead, [Decision("copies", True, text, op)])
    return None
