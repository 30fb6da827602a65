"""Computes again in the backward what is cheap, instead of keeping it from the forward.

Pattern: a tensor that is live where the step takes most memory, and not used there: made before by a
pointwise op, by a product with its activation, or by a normalisation, and read again later, when what
it was made from is still there. Rewrite: the op that made it runs once more before the first of the
late reads, which read its result. Bitwise: the same op on the same values; only the activation of a
product, which does not round in between, comes from the product as it was rounded (`reordered`).

Rule: the peak must be at least `LEAST_PEAK` bytes, so that memory matters; a tensor must be at least
`LEAST_SHARE` of it, and computing it again must move at most `MOST_MOVED` bytes for each byte that is
saved. Reads that a pointwise op near by does anyway are free, as `chains` makes one op of both. It goes
on, the cheapest first, while the peak gets lower.

On a GPU only, whose memory is scarce beside its bandwidth.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np

import vibetensor.torch as vt
from vibetensor.graphs.rewrite import Uses, is_dense, make_op, numel, reordered, with_buffers
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape, View

BITWISE = False  # where a product's activation is computed again
DEVICES = ("cuda",)  # where it rewrites
LEAST_PEAK = 4 << 30
LEAST_SHARE = 1 / 256
MOST_MOVED = 2.0
_NEAR = 24  # ops that `chains` moves one over
_NORMS = ("_residual_layer_norm", "_residual_rms_norm")


@dataclass(frozen=True)
class _Candidate:
    """A buffer that can be computed again by `op`, before the op at `place`. It is not used after
    `early` and before that. moved: bytes for each one saved."""

    buffer: Buffer
    op: Op
    early: int
    place: int
    moved: float
    bound: float


def run(tape: Tape) -> Tape:
    """The tape with cheap tensors computed again."""
    decisions: list[Decision] = []
    for device in sorted({b.device for b in tape.buffers if b.device.split(":")[0] in DEVICES}):
        live = Live(tape, device)
        if live.peak >= LEAST_PEAK:
            tape = _rewritten(tape, _chosen(tape, live, decisions))
    return tape.replaced(tape.ops, decisions)


class Live:
    """From which op to which each scratch buffer is live, and the most bytes at once."""

    def __init__(self, tape: Tape, device: str) -> None:
        self.first: dict[Buffer, int] = {}
        self.last: dict[Buffer, int] = {}
        for at, op in enumerate(tape.ops):
            for view in () if op.is_view else (*op.reads(), *op.writes()):
                buffer = view.buffer
                if buffer.role == "scratch" and buffer.device == device:
                    self.first.setdefault(buffer, at)
                    self.last[buffer] = at
        change = np.zeros(len(tape.ops) + 1, dtype=np.int64)
        for buffer, at in self.first.items():
            change[at] += buffer.nbytes
            change[self.last[buffer] + 1] -= buffer.nbytes
        self._levels = np.cumsum(change)

    @property
    def at(self) -> int:
        """The op where most is live."""
        return int(self._levels.argmax())

    @property
    def peak(self) -> int:
        """The bytes that are live there."""
        return int(self._levels.max(initial=0))

    def across(self) -> list[Buffer]:
        """The larger buffers that are live before and after the op at the peak."""
        at, least = self.at, LEAST_SHARE * self.peak
        return [
            buffer
            for buffer, first in self.first.items()
            if first < at < self.last[buffer] and buffer.nbytes >= least
        ]

    def shorten(self, candidate: _Candidate) -> None:
        """Counts with a buffer that is gone until it is computed again."""
        self._levels[candidate.early + 1 : candidate.place] -= candidate.buffer.nbytes


def _chosen(tape: Tape, live: Live, decisions: list[Decision]) -> list[_Candidate]:
    uses = Uses(tape)
    found = [
        candidate
        for buffer in live.across()
        if (candidate := _candidate(tape, uses, live, buffer, decisions))
    ]
    # Those that are kept for longest first, as they are live at most of the peaks to come.
    found.sort(key=lambda c: (c.moved, live.first[c.buffer]))
    chosen: list[_Candidate] = []
    for candidate in found:
        at, before = live.at, live.peak
        if not candidate.early < at < candidate.place:
            continue
        # What is computed again is made from what is kept.
        kept = {view.buffer for other in chosen for view in other.op.reads()}
        again = {other.buffer for other in chosen}
        if candidate.buffer in kept or any(v.buffer in again for v in candidate.op.reads()):
            continue
        live.shorten(candidate)
        chosen.append(candidate)
        text = (
            f"{candidate.op.name} again instead of {candidate.buffer.nbytes:,} bytes kept: "
            f"{live.peak:,} bytes live at most, not {before:,}"
        )
        decisions.append(Decision("recompute", True, text, candidate.op))
    return chosen


def _candidate(
    tape: Tape, uses: Uses, live: Live, buffer: Buffer, decisions: list[Decision]
) -> _Candidate | None:
    written, reads = uses.writes(buffer), uses.reads(buffer)
    made_at = written[0]
    if len(written) != 1 or made_at in reads or live.at in reads:
        return None
    late = bisect_right(reads, live.at)
    place = reads[late]
    early = reads[late - 1] if late else made_at
    maker = tape.ops[made_at]
    again = _again(tape, maker, buffer)
    if again is None:
        return None
    for view in again.reads():
        kept = view.buffer.role != "scratch" or live.last.get(view.buffer, -1) >= place
        if not kept or uses.written_between(view.buffer, made_at, place):
            return None
    anyway = _read_near(tape, place, live.at)
    moved = sum(_bytes(v) for v in again.writes())
    moved += sum(_bytes(v) for v in set(again.reads()) if v.buffer not in anyway)
    ratio = moved / buffer.nbytes
    if ratio > MOST_MOVED:
        text = f"{maker.name} is kept: again it moves {ratio:.1f} bytes for each one saved"
        decisions.append(Decision("recompute", False, text, maker))
        return None
    again = replace(again, phase=tape.ops[place].phase)
    bound = reordered(maker.outputs[0]) if maker.name == "_linear_activation" else 0.0
    return _Candidate(buffer, again, early, place, ratio, bound)


def _again(tape: Tape, maker: Op, buffer: Buffer) -> Op | None:
    """An op that makes the buffer anew, in memory of its own, from what the maker read or made; None
    where there is none that is cheap."""
    out = next((view for view in maker.writes() if view.buffer is buffer), None)
    if out is None or not is_dense(out) or out.offset or _bytes(out) != buffer.nbytes:
        return None
    if maker.is_random or maker.is_view:
        return None

    def new(view: View) -> View:
        return replace(view, buffer=tape.new_buffer(view.buffer.nbytes, view.buffer.device))

    if _is_pointwise(maker) and len(maker.outputs) == 1:
        place = new(out)
        return with_buffers(maker, {buffer: place.buffer})
    if maker.name == "_linear_activation" and maker.outputs[0] is out:
        before, activation = maker.outputs[1], maker.args[3]
        if before is None or activation not in ("gelu", "gelu_tanh"):
            return None
        form = "tanh" if activation == "gelu_tanh" else "none"
        return make_op("gelu", (before,), [new(out)], maker, approximate=form)
    if maker.name in _NORMS and maker.outputs[0] is out:
        rows, residual, *rest = maker.args
        if residual is not None:
            rows = maker.outputs[1]
            if rows is None or rows.dtype not in (vt.float32, vt.float64):
                return None  # sums that are rounded as they are kept are other rows
        made = [new(view) for i, view in enumerate(maker.outputs) if view is not None and i != 1]
        return make_op(maker.name, (rows, None, *rest), made, maker)
    return None


def _is_pointwise(op: Op) -> bool:
    return op.capture_class == "pointwise" or op.name == "_to_dtype"


def _read_near(tape: Tape, place: int, peak: int) -> set[Buffer]:
    """What pointwise ops after the peak read within reach of `chains`."""
    found: set[Buffer] = set()
    for op in tape.ops[max(peak + 1, place - _NEAR) : place + _NEAR]:
        if _is_pointwise(op) and op.phase == tape.ops[place].phase:
            found.update(view.buffer for view in op.reads())
    return found


def _bytes(view: View) -> int:
    return numel(view) * view.dtype.itemsize


def _rewritten(tape: Tape, chosen: list[_Candidate]) -> Tape:
    at_place: dict[int, list[_Candidate]] = {}
    for candidate in chosen:
        at_place.setdefault(candidate.place, []).append(candidate)
    instead: dict[Buffer, Buffer] = {}
    ops: list[Op] = []
    for at, op in enumerate(tape.ops):
        for candidate in at_place.get(at, ()):
            new = next(v for v in candidate.op.writes() if _bytes(v) == candidate.buffer.nbytes)
            instead[candidate.buffer] = new.buffer
            # Views before it that only the late reads use name memory, and run nothing.
            start = next(i for i in range(len(ops), 0, -1) if not ops[i - 1].is_view)
            ops[start:] = [with_buffers(view, instead) for view in ops[start:]]
            ops.append(candidate.op)
        ops.append(with_buffers(op, instead))
    return tape.replaced(ops, bound=max((c.bound for c in chosen), default=0.0))
