"""Recording a piece of a program without running it, and what is replayed of it.

Tensors, random numbers and schedules are as before when a dry recording ends; one that fails takes
back the rest too: ``.grad`` fields, what tensors are over (``.data``) and their history, what optimizers
and GradScaler made, and attributes of modules, optimizers and whatever else the function can reach.
"""

from __future__ import annotations

import contextlib
import gc
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import passes
from vibetensor.graphs.course import Course
from vibetensor.graphs.lower import Lowered, lower
from vibetensor.graphs.objects import ObjectsAsTheyWere
from vibetensor.graphs.record import PACKAGE, Recording, recording_of, shared_memory
from vibetensor.graphs.session import Session
from vibetensor.graphs.structure import LEAF
from vibetensor.graphs.tape import Tape
from vibetensor.torch._recording import outside
from vibetensor.torch.optim.lr_scheduler import base as schedules
from vibetensor.torch.random import _set_states as set_random_states
from vibetensor.torch.random import _states as random_states

PoolOf = Callable[[str], Any]  # a pool by device


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
    slow_replays: int = 0  # of those that are not `native` ones
    # What reports and profiles ask of a capture.
    course: Course = field(default_factory=lambda: Course(1, {}))
    profile: Any = None
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        session = self.session
        for optimizer, state in self.states:
            session.tensors.add_attribute(optimizer, "state", state)
            session.tensors.add_attribute(optimizer, "param_groups", optimizer.param_groups)
        self.native = _C.graphs.Replay(
            program=self.lowered.program,
            guard=self.guard,
            course=session.course,
            tensors=session.tensors,
            inputs=[],
            transfers=[],
            acts=session.acts(),
            outputs=[],
            structure=LEAF,
            build=list,
            gradients=[(g.leaf, g.start, g.end) for g in self.gradients],
            found=[],
        )

    @property
    def replays(self) -> int:
        """How often it has been replayed."""
        return self.slow_replays + self.native.count


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


class SchedulesAsTheyWere:
    """Schedules that step on this thread, each as it was before its first step."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._before: list[Callable[[], None]] = []
        self._schedulers: list[Any] = []
        self._seen: set[int] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes them. Before others that look at steps: these may find the schedule changed."""
        schedules.step_observers.insert(0, self._on_schedule)
        try:
            yield
        finally:
            schedules.step_observers.remove(self._on_schedule)

    def _on_schedule(self, scheduler: Any, args: tuple[Any, ...]) -> None:
        if id(scheduler) not in self._seen and threading.get_ident() == self._thread:
            self._seen.add(id(scheduler))
            self._schedulers.append(scheduler)
            self._before.append(_schedule_as_now(scheduler))

    def put_back(self) -> None:
        """Takes the steps back."""
        for before in reversed(self._before):
            before()

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Takes the steps back meanwhile."""
        now = [_schedule_as_now(scheduler) for scheduler in self._schedulers]
        self.put_back()
        try:
            yield
        finally:
            for put_back in reversed(now):
                put_back()


class StateLost(RuntimeError):
    """A function has put a tensor that was never computed where it cannot be taken back from."""


class DryCapture:
    """A dry recording that is going on, and how to take it back.

    roots: what runs and its arguments, whose objects are to be as before; modules that are called or
    read and optimizers that step are noted by themselves."""

    def __init__(self, roots: Iterable[Any] = ()) -> None:
        self.native = _C.graphs.Tape(PACKAGE, True)
        self.session = Session()
        self.session.notes.undo = []
        self._watching = contextlib.ExitStack()
        self._random = random_states()
        self._schedules = SchedulesAsTheyWere()
        self._hosts_random = (random.getstate(), np.random.get_state())
        self._objects = ObjectsAsTheyWere()
        self._objects.keep(roots)
        self.session.at_first_sight = lambda found: self._objects.keep([found])

    def begin(self) -> None:
        """Records on this thread from now on."""
        # A cast that autocast has kept from before, or keeps for later, is neither input nor result.
        _C._clear_autocast_cache()
        self.native.start()
        try:
            self._watching.enter_context(self.session.watching())
            self._watching.enter_context(self._schedules.watching())
        except BaseException:
            self.native.stop()
            raise

    def stop(self) -> None:
        """Ends the recording."""
        _C._clear_autocast_cache()
        self.native.stop()
        self._watching.close()
        set_random_states(self._random)
        # The step has not been made, so schedules have not moved either.
        self._schedules.put_back()

    def abandon(self) -> None:
        """Everything as before."""
        self.stop()
        self.take_back()

    def take_back(self) -> None:
        """Puts back what a dry recording does not leave alone by itself."""
        for tensor, before in self.native.gradients_before():
            tensor.grad = before
        self.native.put_back_tensors()
        undo, self.session.notes.undo = self.session.notes.undo or [], []
        while undo:  # each is let go of, with what it holds
            undo.pop()()
        self._objects.put_back()
        random.setstate(self._hosts_random[0])
        np.random.set_state(self._hosts_random[1])

    def changed(self) -> str:
        """What Python code has changed that no replay would, for people; empty for nothing."""
        return self._objects.changed()

    def check_taken_back(self) -> None:
        """Raises StateLost if somebody still holds a tensor that the recording made."""
        if self._kept() and gc.collect() and not self._kept():
            return
        for index in self._kept():
            recording = recording_of(self.native, None, collect=False)
            buffer = recording.tape.buffers[index]
            op = next(
                op for op in recording.tape.ops if any(v.buffer is buffer for v in op.writes())
            )
            raise StateLost(
                "the function keeps a tensor that it makes where it is not found again (behind an "
                f"extension, say), and it was only recorded, so that the tensor has no values: {op}. "
                "Return the tensor, or keep it in an attribute"
            )

    def _kept(self) -> list[int]:
        self.native.find_escapes()
        return [
            index
            for index, (_, _, fresh, escapes, _) in enumerate(self.native.storages())
            if fresh and escapes
        ]

    def end(self, optimize: bool, pool_of: PoolOf | None = None) -> Captured:
        """The recording, ready for replays."""
        self.stop()
        try:
            captured = self.compile(optimize, pool_of=pool_of)
        except BaseException:
            self.take_back()
            raise
        self.forget()
        return captured

    def forget(self) -> None:
        """Lets go of what taking back would need."""
        self.session.notes.undo = None
        self.session.at_first_sight = None
        self._objects = ObjectsAsTheyWere()
        self.native.forget_gradients_before()

    def compile(
        self, optimize: bool, *, collect: bool = True, pool_of: PoolOf | None = None
    ) -> Captured:
        """A recording that has ended, ready for replays. pool_of: see `lower`."""
        native, session = self.native, self.session
        recording = recording_of(native, None, collect=collect)
        if why_not := shared_memory(recording):
            raise RuntimeError(f"the block cannot be captured: {why_not}")
        _check_optimizers(session, recording)
        gradients = [
            Gradient(tensor, before if _used(native, before) else None, tensor.grad)
            for tensor, before in native.gradients_before()
            if tensor.grad is not None or _used(native, before)
        ]
        tape = passes.run(recording.tape) if optimize else recording.tape
        outputs = {b: recording.memory(b) for b in tape.buffers if b.role == "output"}
        lowered = lower(tape, recording, outputs, pool_of=pool_of)
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


def check_unmoved(captured: Captured) -> None:
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
