"""What passes rewrite with: new ops for a tape, who reads and writes each buffer, and what is put
in the place of what."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.record import with_views
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape, View


def make_op(
    name: str,
    args: Sequence[Any],
    outputs: Sequence[View],
    like: Op,
    *,
    random_offset: int = -1,
    kernel: Op | None = None,
    any_strides: bool = False,
    **keywords: Any,
) -> Op:
    """A call of the op `name` (as in `_C._ops`, or a tensor's method) for a tape; its kernel is not run.

    args, keywords: as in a call, with a `View` where the op takes a tensor. outputs: where its
    results go; for an op that changes its arguments, those. like: the op whose phase and line it
    takes. random_offset: where its random numbers start in those of the step. kernel: the op whose
    work its kernel does, under the switches of that one (TF32, libraries); None for `like`.
    any_strides: outputs may have other strides than the op gives its results; its kernels take them.

    Raises what the op raises for such arguments, and ValueError if its results are not like
    `outputs`, or a number is given where the tape has a tensor.
    """
    native = _C.graphs.Tape("", True)
    stand_ins: list[tuple[Any, View]] = []
    placed = [_stand_in(arg, stand_ins) for arg in args]
    named = {key: _stand_in(arg, stand_ins) for key, arg in keywords.items()}
    native.start()
    try:
        with vt.no_grad():
            function = getattr(_C._ops, name, None)
            if function is not None:
                function(*placed, **named)
            else:  # a method only
                getattr(placed[0], name)(*placed[1:], **named)
    finally:
        native.stop()
    (call,) = native.calls()
    slots = native.slots()
    view_of = {native.find(tensor): view for tensor, view in stand_ins}

    def given(slot: int) -> View | None:
        if slot < 0:
            return None
        view = view_of.get(slots[slot][0])
        if view is None:
            raise ValueError(f"{name}: a number is no tensor here; give the view of a 0-d one")
        return view

    made = [slots[slot] for slot in call.outputs if slot >= 0]
    found = [tuple(slot[2:5]) for slot in made]
    wanted = [(view.sizes, view.strides, view.dtype) for view in outputs]
    if any_strides and len(wanted) == len(found):
        wanted = [(w[0], f[1], w[2]) for w, f in zip(wanted, found)]
    if found != wanted:
        raise ValueError(f"{name} makes {found}, not {[str(view) for view in outputs]}")
    call.random_offset = random_offset
    call.switches = (kernel or like).call.switches
    inputs = [given(slot) for slot in call.inputs]
    places = iter(outputs)
    return Op(
        call.name,
        with_views(call, iter(inputs)),
        inputs,
        [None if slot < 0 else next(places) for slot in call.outputs],
        like.phase,
        call.capture_class,
        like.source,
        call,
        random_offset,
    )


def _stand_in(arg: Any, made: list[tuple[Any, View]]) -> Any:
    """A tensor of a view's geometry, whose values nobody reads."""
    if isinstance(arg, View):
        base = _C.graphs.without_bytes(arg.buffer.nbytes, arg.buffer.device)
        offset = arg.offset * arg.dtype.itemsize
        tensor = _C.graphs.tensor_on(base, offset, arg.dtype, arg.sizes, arg.strides, arg.number)
        made.append((tensor, arg))
        return tensor
    if isinstance(arg, list | tuple):
        return type(arg)(_stand_in(item, made) for item in arg)
    return arg


def rebound(op: Op, other: Callable[[View], View]) -> Op:
    """The op on other views: of the same dtype and sizes, and strides that its kernel takes."""

    def moved(arg: Any) -> Any:
        if isinstance(arg, View):
            return other(arg)
        if isinstance(arg, list):
            return [moved(item) for item in arg]
        return arg

    return dataclasses.replace(
        op,
        args=tuple(moved(arg) for arg in op.args),
        inputs=[moved(view) for view in op.inputs],
        outputs=[moved(view) for view in op.outputs],
    )


def with_buffers(op: Op, instead: Mapping[Buffer, Buffer]) -> Op:
    """The op with its views on other buffers."""
    if not any(view.buffer in instead for view in (*op.reads(), *op.writes())):
        return op

    def moved(view: View) -> View:
        target = instead.get(view.buffer)
        return view if target is None else dataclasses.replace(view, buffer=target)

    return rebound(op, moved)


class Edits:
    """What a pass makes of a tape: ops that take the place of others and ops that fall away, the
    decisions behind them, and how far results may be from the recorded ones'."""

    def __init__(self, tape: Tape, by: str) -> None:
        self.tape, self.by = tape, by
        self.new: dict[int, Op] = {}  # by the place of what they replace
        self.gone: set[int] = set()
        self.decisions: list[Decision] = []
        self.bound = 0.0

    def free(self, at: int) -> bool:
        """Whether the op there is still as it was."""
        return at not in self.new and at not in self.gone

    def replace(self, at: int, new: Op, gone: Iterable[int] = ()) -> None:
        """Puts an op in the place of another; the ops at `gone` fall away."""
        self.new[at] = new
        self.gone.update(gone)

    def made(self, text: str, op: Op) -> None:
        """Notes what was rewritten."""
        self.decisions.append(Decision(self.by, True, text, op))

    def refused(self, text: str, op: Op) -> None:
        """Notes what nearly was, and why not."""
        self.decisions.append(Decision(self.by, False, text, op))

    def reorders(self, view: View) -> None:
        """Notes that a result is summed in another order."""
        self.bound = max(self.bound, reordered(view))

    def applied(self) -> Tape:
        """The tape with everything done."""
        ops = (self.new.get(at, op) for at, op in enumerate(self.tape.ops) if at not in self.gone)
        return self.tape.replaced(ops, self.decisions, self.bound)


class Uses:
    """Where each buffer of a tape is read and written, by position of the op. Views run nothing and
    count as neither."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._reads: dict[Buffer, list[int]] = {}
        self._writes: dict[Buffer, list[int]] = {}
        for at, op in enumerate(tape.ops):
            if op.is_view:
                continue
            for view in op.reads():
                self._reads.setdefault(view.buffer, []).append(at)
            for view in op.writes():
                self._writes.setdefault(view.buffer, []).append(at)

    def reads(self, buffer: Buffer) -> list[int]:
        """Ops that read it; an op that changes it in place does too."""
        return self._reads.get(buffer, [])

    def writes(self, buffer: Buffer) -> list[int]:
        """Ops that write it."""
        return self._writes.get(buffer, [])

    def written_between(self, buffer: Buffer, first: int, last: int) -> bool:
        """Whether an op after `first` and before `last` writes it."""
        writes = self.writes(buffer)
        return bisect_right(writes, first) < bisect_left(writes, last)

    def writer(self, view: View, before: int) -> int | None:
        """The op before `before` that wrote its buffer last; None if that is not this view, in
        this shape, whole."""
        writes = self.writes(view.buffer)
        index = bisect_left(writes, before)
        if index == 0:
            return None
        at = writes[index - 1]
        return at if view in self.tape.ops[at].outputs else None

    def can_run_at(self, at: int, place: int) -> bool:
        """Whether the op at `at` does the same right after `place`, which is before it: nothing
        between writes what it reads or touches what it writes."""
        op = self.tape.ops[at]
        return not any(self.written_between(v.buffer, place, at) for v in op.reads()) and not any(
            self.touched_between(v.buffer, place, at) for v in op.writes()
        )

    def can_wait(self, at: int, place: int) -> bool:
        """Whether the op at `at` does the same right before `place`, which is after it."""
        op = self.tape.ops[at]
        return not any(self.written_between(v.buffer, at, place) for v in op.reads()) and not any(
            self.touched_between(v.buffer, at, place) for v in op.writes()
        )

    def touched_between(self, buffer: Buffer, first: int, last: int) -> bool:
        """Whether an op after `first` and before `last` reads or writes it."""
        reads = self.reads(buffer)
        read = bisect_right(reads, first) < bisect_left(reads, last)
        return read or self.written_between(buffer, first, last)

    def only_reader(self, buffer: Buffer) -> int | None:
        """The one op that reads a scratch buffer which one op writes; None if there are others."""
        reads = self.reads(buffer)
        if buffer.role != "scratch" or len(self.writes(buffer)) != 1 or len(set(reads)) != 1:
            return None
        return reads[0]


def is_dense(view: View) -> bool:
    """Whether the view's elements lie one after the other, in order."""
    step = 1
    for size, stride in zip(reversed(view.sizes), reversed(view.strides)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def numel(view: View) -> int:
    """The view's elements."""
    count = 1
    for size in view.sizes:
        count *= size
    return count


def same_elements(a: View, b: View) -> bool:
    """Whether two dense views are the same elements in the same order, in whatever shape."""
    return a == b or (
        a.buffer is b.buffer
        and (a.dtype, a.offset, numel(a)) == (b.dtype, b.offset, numel(b))
        and is_dense(a)
        and is_dense(b)
    )


def reshaped(view: View, sizes: Sequence[int]) -> View:
    """A dense view in another shape of as many elements."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return dataclasses.replace(view, sizes=tuple(sizes), strides=tuple(reversed(strides)))


def transposed(view: View) -> View:
    """The view with its last two dimensions exchanged."""
    *batch, m, n = view.sizes
    *steps, down, across = view.strides
    return dataclasses.replace(view, sizes=(*batch, n, m), strides=(*steps, across, down))


def reordered(view: View) -> float:
    """How far a result may be, relative to its largest element, if sums behind it are taken in
    another order: a few roundings in float32, one of the result in 16 bits."""
    return 2.0**-7 if view.dtype.itemsize == 2 else 1e-5
