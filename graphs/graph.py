"""The door in torch's manner: a block of code becomes a graph that `replay` runs.

    g = Graph()
    with graph(g):
        static_loss = step(static_x, static_y)
    static_x.copy_(x)
    g.replay()

The block is recorded and not run: tensors, random numbers, schedules and .grad fields are as before
when it ends, but for what the block made. That has its memory, and each replay writes it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import passes
from vibetensor.graphs.lower import Lowered, lower
from vibetensor.graphs.record import PACKAGE, Recording, recording_of
from vibetensor.graphs.session import Session
from vibetensor.graphs.tape import Tape
from vibetensor.torch._recording import outside
from vibetensor.torch.optim.lr_scheduler import base as schedules

_MODES = ("global", "thread_local", "relaxed")
_pool_numbers = itertools.count(1)


@dataclass
class Gradient:
    """A tensor whose .grad the block changed: the one it found, if it reads that, and the one it
    leaves."""

    leaf: Any
    start: Any
    end: Any


@dataclass
class Captured:
    """What a graph replays."""

    lowered: Lowered
    tape: Tape
    recording: Recording
    session: Session
    guard: Any
    places: list[Place]
    gradients: list[Gradient]
    states: list[tuple[Any, Any]]  # optimizers, and the state each works on
    replays: int = 0


class Place:
    """Where a tensor lies, to name one that has moved."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.at = self._now()

    def _now(self) -> tuple[Any, ...]:
        t = self.tensor
        return (t.data_ptr(), tuple(t.shape), t.stride(), t.requires_grad)

    def change(self) -> str | None:
        """What has changed since; None for nothing."""
        now = self._now()
        if now == self.at:
            return None
        for old, new, what in zip(
            self.at, now, ("memory", "shape", "strides", "requires_grad"), strict=True
        ):
            if old != new:
                shown = "" if what == "memory" else f" from {old} to {new}"
                return f"a tensor of {self.at[1]} {self.tensor.dtype} changed its {what}{shown}"
        return None


class Graph:
    """A recorded block, to be replayed; ``torch.cuda.CUDAGraph`` for tensors of any device.

    Filled by ``with graph(g):`` or between ``capture_begin()`` and ``capture_end()``. What the block
    reads it reads anew at each replay, where it was: copy new inputs there. What it makes and
    somebody still refers to (results, ``.grad``) keeps its memory, and each replay writes it; until
    the first one it holds no values.

    Args:
        keep_graph: Accepted for torch's sake.
        optimize: False replays the recorded ops as they are.
    """

    def __init__(self, keep_graph: bool = False, *, optimize: bool = True) -> None:
        self._optimize = optimize
        self._captured: Captured | None = None
        self._open: _Capture | None = None
        self._pool: tuple[int, int] | None = None
        self._lock = threading.Lock()

    # --- capturing

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "thread_local") -> None:
        """Records the ops of this thread from now on, without running them.

        pool: the handle of a pool, from ``graph_pool_handle()`` or another graph's ``pool()``.

        Raises RuntimeError if the graph holds a capture already, or one is going on.
        """
        if self._captured is not None or self._open is not None:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph, "
                "create a new instance, or call reset()"
            )
        if capture_error_mode not in _MODES:
            raise RuntimeError(
                "Unknown capture error mode. Expected `global`, `thread_local`, or `relaxed`, got "
                f"{capture_error_mode}"
            )
        pool = _handle(pool)
        opened = _Capture()
        opened.begin()
        self._open, self._pool = opened, pool

    def capture_end(self) -> None:
        """Ends the recording and makes it ready for replays."""
        opened = self._open
        if opened is None:
            raise RuntimeError("capture_end() called without a capture_begin() before it")
        self._open = None
        self._captured = opened.end(self._optimize)
        if self._pool is None:
            self._pool = (0, next(_pool_numbers))

    def _abandon(self) -> None:
        """Ends the recording and leaves everything as it was before."""
        opened, self._open = self._open, None
        if opened is not None:
            self._pool = None
            opened.abandon()

    # --- replaying

    def replay(self) -> None:
        """Runs the recorded ops once, on what their inputs hold now.

        Rates that optimizers of ``vibetensor.torch.optim`` read from ``param_groups`` are the
        current ones, and schedules stepped in the block step.

        Raises RuntimeError before a capture, inside a recording, and where a tensor that the block
        used has moved (``.data`` was set, ``resize_``, ``set_``), or is another one by now.
        """
        captured = self._captured
        if captured is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if _C.graphs.recording() is not None:
            raise RuntimeError(
                "a graph cannot be replayed inside a recording: captured steps do not nest"
            )
        with self._lock:
            _check_unmoved(captured)
            for act in captured.session.host:
                act()
            captured.lowered.program.run()
            captured.replays += 1
            for gradient in captured.gradients:
                if gradient.leaf.grad is not gradient.end:
                    gradient.leaf.grad = gradient.end

    def reset(self) -> None:
        """Forgets the capture and gives its memory back; tensors that are still referred to live
        on. The graph may then be captured again."""
        if self._open is not None:
            raise RuntimeError("reset() called during the capture of the graph")
        self._captured = None
        self._pool = None

    def pool(self) -> tuple[int, int]:
        """The handle of the graph's memory, for further graphs."""
        self._required("pool()")
        assert self._pool is not None
        return self._pool

    # --- looking at it

    def _required(self, what: str) -> Captured:
        if self._captured is None:
            raise RuntimeError(f"Called CUDAGraph::{what} without a preceding successful capture.")
        return self._captured

    def tape(self) -> Tape:
        """The ops that a replay runs, after the passes."""
        return self._required("tape()").tape

    def report(self) -> str:
        """What was captured: ops, memory, replays."""
        from vibetensor.graphs.report import report

        return report("graph", self._required("report()"))

    def debug_dump(self, debug_path: str | os.PathLike[str]) -> None:
        """Writes the tape to a file, an op a line."""
        with open(debug_path, "w", encoding="utf-8") as file:
            file.write(f"{self._required('debug_dump()').tape}\n")

    def enable_debug_mode(self) -> None:
        """Does nothing: `debug_dump` always works."""

    def instantiate(self) -> None:
        """Does nothing more: a captured graph is ready."""
        self._required("instantiate()")


class graph:
    """``with graph(g):`` records the block into the `Graph` g.

    If the block raises, tensors, ``.grad`` fields, random numbers, optimizers and schedules are as
    before it, and g may be captured again.

    Args:
        cuda_graph: The Graph to fill.
        pool: The handle of a pool to share memory with.
        stream: A CUDA stream to record on; the CPU has none.
        capture_error_mode: "global", "thread_local" or "relaxed". Recordings see the ops of their
            own thread, so that those of others never disturb them, in any mode.
    """

    def __init__(
        self,
        cuda_graph: Graph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "thread_local",
    ) -> None:
        if not isinstance(cuda_graph, Graph):
            raise TypeError(f"graph() takes a Graph, got {type(cuda_graph).__name__}")
        self.cuda_graph = cuda_graph
        self.pool = pool
        self.capture_error_mode = capture_error_mode
        self._stream = stream
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(vt.cuda.stream(self._stream))
            self.cuda_graph.capture_begin(self.pool, self.capture_error_mode)
            self._entered = stack.pop_all()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._entered:
            if kind is None:
                self.cuda_graph.capture_end()
            else:
                self.cuda_graph._abandon()


def graph_pool_handle() -> tuple[int, int]:
    """A handle for graphs that are to share memory: ``graph(g, pool=handle)``."""
    return (0, next(_pool_numbers))


class _Capture:
    """A dry recording that is going on, and how to take it back."""

    def __init__(self) -> None:
        self._native = _C.graphs.Tape(PACKAGE, True)
        self._session = Session()
        self._session.notes.undo = []
        self._watching = contextlib.ExitStack()
        self._thread = threading.get_ident()
        self._random = vt.get_rng_state()
        self._schedules: list[Callable[[], None]] = []
        self._seen: set[int] = set()

    def begin(self) -> None:
        # A cast that autocast has kept from before, or keeps for later, is neither input nor result.
        _C._clear_autocast_cache()
        self._native.start()
        try:
            self._watching.enter_context(self._session.watching())
            # Before the session: a schedule is as it was before its step.
            schedules.step_observers.insert(0, self._on_schedule)
            self._watching.callback(schedules.step_observers.remove, self._on_schedule)
        except BaseException:
            self._native.stop()
            raise

    def _on_schedule(self, scheduler: Any, args: tuple[Any, ...]) -> None:
        if id(scheduler) not in self._seen and threading.get_ident() == self._thread:
            self._seen.add(id(scheduler))
            self._schedules.append(_schedule_as_now(scheduler))

    def _stop(self) -> None:
        _C._clear_autocast_cache()
        self._native.stop()
        self._watching.close()
        vt.set_rng_state(self._random)
        # The step has not been made, so schedules have not moved either.
        for put_back in reversed(self._schedules):
            put_back()

    def abandon(self) -> None:
        """Everything as before."""
        self._stop()
        self._take_back()

    def _take_back(self) -> None:
        for tensor, before in self._native.gradients_before():
            tensor.grad = before
        for undo in reversed(self._session.notes.undo or ()):
            undo()

    def end(self, optimize: bool) -> Captured:
        """The recording, ready for replays."""
        self._stop()
        try:
            captured = self._compile(optimize)
        except BaseException:
            self._take_back()
            raise
        self._session.notes.undo = None
        return captured

    def _compile(self, optimize: bool) -> Captured:
        native, session = self._native, self._session
        recording = recording_of(native, None)
        _check_optimizers(session, recording)
        gradients = [
            Gradient(tensor, before if _used(native, before) else None, tensor.grad)
            for tensor, before in native.gradients_before()
            if tensor.grad is not None or _used(native, before)
        ]
        tape = passes.run(recording.tape) if optimize else recording.tape
        outputs = {b: recording.memory(b) for b in tape.buffers if b.role == "output"}
        lowered = lower(tape, recording, outputs)
        guard = _C.graphs.Guard()
        session.freeze()
        static = [*native.firsts(), *native.leaves(), *session.parameters(), *outputs.values()]
        static += [t for g in gradients for t in (g.start, g.end) if t is not None]
        for tensor in static:
            guard.add(tensor)
        places = [Place(tensor) for tensor in static]
        states = [(o, o.state) for o in session.optimizers]
        return Captured(lowered, tape, recording, session, guard, places, gradients, states)


def _used(native: Any, tensor: Any) -> bool:
    return tensor is not None and native.find(tensor) >= 0


def _check_optimizers(session: Session, recording: Recording) -> None:
    """An optimizer that makes its state in the block would make it anew at each replay."""
    for optimizer in session.optimizers:
        for state in optimizer.state.values():
            for key, value in state.items() if isinstance(state, dict) else ():
                if not isinstance(value, vt.Tensor):
                    continue
                buffer = recording.buffer_of(value)
                if buffer is not None and buffer.role == "output":
                    raise RuntimeError(
                        f"{type(optimizer).__name__} makes its state ({key!r}) inside the graph, "
                        "and every replay would make it anew: run a step before the capture (a "
                        "warm-up)"
                    )


def _check_unmoved(captured: Captured) -> None:
    """Raises where a replay would work on memory that is not the program's any more."""
    if not captured.guard.holds():
        for place in captured.places:
            if (change := place.change()) is not None:
                raise RuntimeError(
                    f"{change} since the graph was captured, and the graph works on the tensor as "
                    "it was: change static tensors in place (copy_), or capture again"
                )
        raise RuntimeError("a tensor of the graph has moved since the capture: capture again")
    same_states = all(optimizer.state is state for optimizer, state in captured.states)
    if not (same_states and captured.session.same_tensors()):
        raise RuntimeError(
            "a module or an optimizer of the graph holds other tensors than when it was captured "
            "(a parameter was replaced, a state dict loaded into an optimizer, a group added): "
            "capture again"
        )
    for gradient in captured.gradients:
        if gradient.start is not None and gradient.leaf.grad is not gradient.start:
            raise RuntimeError(
                f"the graph adds to the .grad that a tensor of {tuple(gradient.leaf.shape)} had "
                "when it was captured, and that is not its .grad any more: keep it "
                "(zero_grad(set_to_none=False)), or set gradients to None before the capture"
            )


def _handle(pool: Any) -> tuple[int, int] | None:
    if pool is None:
        return None
    if isinstance(pool, Graph):
        return pool.pool()
    if isinstance(pool, tuple) and len(pool) == 2 and all(isinstance(x, int) for x in pool):
        return pool
    raise TypeError(
        "pool is a handle from graph_pool_handle() or another graph's pool(), got "
        f"{type(pool).__name__}"
    )


def _schedule_as_now(scheduler: Any) -> Callable[[], None]:
    """Puts a schedule, those it is made of and the groups it writes back to what they are now."""
    kept: list[Callable[[], None]] = []
    seen: set[int] = set()

    def copied(value: Any) -> Any:
        if isinstance(value, schedules.LRScheduler):
            keep(value)
        if isinstance(value, vt.optim.Optimizer):
            keep_groups(value)
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        if type(value) is dict:
            return {key: copied(item) for key, item in value.items()}
        if isinstance(value, vt.Tensor):
            clone = value.detach().clone()
            kept.append(lambda: value.detach().copy_(clone))
        return value

    def keep(owner: Any) -> None:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        values = {key: copied(value) for key, value in owner.__dict__.items()}

        def put_back() -> None:
            owner.__dict__.clear()
            owner.__dict__.update(values)

        kept.append(put_back)

    def keep_groups(optimizer: Any) -> None:
        if id(optimizer) in seen:
            return
        seen.add(id(optimizer))
        for group in optimizer.param_groups:
            values = {key: copied(item) for key, item in group.items() if key != "params"}
            kept.append(lambda group=group, values=values: group.update(values))

    with outside():
        keep(scheduler)

    def put_all_back() -> None:
        for put_back in kept:
            put_back()

    return put_all_back
