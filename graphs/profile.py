"""How long each op of a captured step takes: replays that run op by op under a clock.

A profile is no step. What the program writes (weights, moments, gradients), random numbers and
schedules are afterwards as they were, and each run starts from the same values; so it may be taken
between any two calls. It needs memory for copies of the inputs and of what the program writes, and
those tensors count as changed in place.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.lower import lower
from vibetensor.graphs.structure import from_array
from vibetensor.graphs.tape import Op, Tape
from vibetensor.graphs.verify import Snapshot

# Runs until this much time is spent, at least and at most so many.
_SECONDS = 1.0
_LEAST_RUNS, _MOST_RUNS = 5, 101


class Clock(Protocol):
    """Marks moments between ops where they run: on the host, or in a device's stream."""

    def mark(self) -> None: ...

    def seconds(self) -> list[float]:
        """The time from each mark to the next; the marks are then forgotten."""
        ...


class HostClock:
    """For ops that have run when their call returns."""

    def __init__(self) -> None:
        self._marks: list[int] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter_ns())

    def seconds(self) -> list[float]:
        marks, self._marks = self._marks, []
        return [(b - a) * 1e-9 for a, b in zip(marks, marks[1:])]


class EventClock:
    """For ops that a stream runs later: events between them."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def mark(self) -> None:
        event = vt.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        marks, self._marks = self._marks, []
        if marks:
            marks[-1].synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in zip(marks, marks[1:])]


@dataclass(frozen=True)
class Row:
    """A group of ops: seconds is the sum of their medians, share its part of all."""

    name: str
    ops: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """indices, ops: what ran, in order, with its place on the tape. medians: seconds of each.
    replay: the median of replays that run as one; runs: how many of each kind were timed."""

    indices: list[int]
    ops: list[Op]
    medians: list[float]
    replay: float
    runs: int

    @property
    def total(self) -> float:
        """Seconds of all ops; with what timing each adds, so more than `replay`."""
        return sum(self.medians)

    def by_op(self) -> list[Row]:
        """Time by the name of the op, the longest first."""
        return self._by(lambda op: op.name)

    def by_phase(self) -> list[Row]:
        """Time by phase: forward, backward, optimizer."""
        return self._by(lambda op: op.phase)

    def by_line(self) -> list[Row]:
        """Time by the line of the captured program."""
        return self._by(lambda op: f"{op.source.file}:{op.source.line}" if op.source else "no line")

    def _by(self, key: Callable[[Op], str]) -> list[Row]:
        sums: dict[str, list[float]] = {}
        for op, seconds in zip(self.ops, self.medians):
            sums.setdefault(key(op), []).append(seconds)
        total = self.total or 1.0
        rows = [Row(name, len(all_), sum(all_), sum(all_) / total) for name, all_ in sums.items()]
        return sorted(rows, key=lambda row: -row.seconds)

    def __str__(self) -> str:
        parts = [
            f"{seconds_text(self.replay)} a replay, {seconds_text(self.total)} op by op "
            f"({len(self.ops)} ops, medians of {self.runs} runs)"
        ]
        for title, rows in (
            ("phase", self.by_phase()),
            ("op", self.by_op()),
            ("line", self.by_line()),
        ):
            parts.append(f"by {title}:")
            parts += [
                f"  {row.share:6.1%} {seconds_text(row.seconds):>10}  {row.name}, {count_text(row.ops)}"
                for row in rows[:10]
            ]
            if len(rows) > 10:
                rest = rows[10:]
                seconds = sum(row.seconds for row in rest)
                share = sum(row.share for row in rest)
                parts.append(f"  {share:6.1%} {seconds_text(seconds):>10}  {len(rest)} others")
        return "\n".join(parts)


def joined(parts: list[tuple[Tape, Profile]]) -> Profile:
    """The profile of tapes that run one after the other; places count on from tape to tape."""
    if len(parts) == 1:
        return parts[0][1]
    starts = itertools.accumulate((len(tape.ops) for tape, _ in parts), initial=0)
    profiles = [timed for _, timed in parts]
    return Profile(
        [start + at for start, timed in zip(starts, profiles) for at in timed.indices],
        [op for timed in profiles for op in timed.ops],
        [seconds for timed in profiles for seconds in timed.medians],
        sum(timed.replay for timed in profiles),
        min(timed.runs for timed in profiles),
    )


def count_text(ops: int) -> str:
    """1 op, 2 ops."""
    return f"{ops} op" if ops == 1 else f"{ops} ops"


def seconds_text(seconds: float) -> str:
    """A time for people: 12.3 µs, 4.56 ms."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return (
                f"{seconds / scale:.3g} {unit}"
                if seconds < 100 * scale
                else (f"{seconds / scale:.0f} {unit}")
            )
    return f"{seconds * 1e9:.0f} ns"


def profile(
    variant: Any, inputs: list[Any] | None = None, *, runs: int | None = None, clock: Any = None
) -> Profile:
    """Times the ops of a capture.

    inputs: the leaves of a call's arguments; None leaves those of the last call. runs: how often;
    None: for about a second. clock: a Clock; None takes the one for where the ops run.

    What an op raises (an index out of range) comes out; state is restored then too.
    """
    running = [(at, op) for at, op in enumerate(variant.tape.ops) if not op.is_view]
    program, one_by_one = variant.lowered.program, variant.lowered.program
    if not _on_host(variant):
        # A device's graph runs as one: its ops run from a program of their own on the same memory.
        one_by_one = lower(
            variant.tape, variant.recording, dict(variant.lowered.memory), one_by_one=True
        ).program
    if len(running) != len(one_by_one):
        raise RuntimeError(
            f"the program runs {len(one_by_one)} ops and the tape has {len(running)}: no time "
            "belongs to an op"
        )
    if clock is None:
        clock = HostClock() if _on_host(variant) else EventClock()
    _settle(variant)
    kept = Snapshot(
        [*_written(variant), *(t for t in variant.inputs if t is not None)], variant.tape
    )
    try:
        if inputs is not None:
            _stage(variant, inputs)
        start = Snapshot(_written(variant), variant.tape)
        ops, whole = _timed_runs(one_by_one, program, len(running), start, runs, clock)
    finally:
        kept.restore()
    medians = [statistics.median(times) for times in zip(*ops)]
    indices = [at for at, _ in running]
    return Profile(
        indices, [op for _, op in running], medians, statistics.median(whole), len(whole)
    )


def _on_host(variant: Any) -> bool:
    return all(buffer.device == "cpu" for buffer in variant.tape.buffers)


def _timed_runs(
    one_by_one: Any, program: Any, count: int, start: Snapshot, runs: int | None, clock: Clock
) -> tuple[list[list[float]], list[float]]:
    """Times by op, and of the program as one, of each run."""
    ops: list[list[float]] = []
    whole: list[float] = []
    _run(one_by_one, count, clock)  # the first one warms caches
    began = time.perf_counter()
    while True:
        start.restore()
        ops.append(_run(one_by_one, count, clock))
        start.restore()
        clock.mark()
        program.run()
        clock.mark()
        whole += clock.seconds()
        done, spent = len(ops), time.perf_counter() - began
        if done >= (runs or _MOST_RUNS) or (not runs and done >= _LEAST_RUNS and spent > _SECONDS):
            return ops, whole


def _run(program: Any, count: int, clock: Clock) -> list[float]:
    program.reserve()
    clock.mark()
    for index in range(count):
        program.run_op(index)
        clock.mark()
    return clock.seconds()


def _settle(variant: Any) -> None:
    """Results that the user holds move out of the way."""
    for loan, _ in variant.outputs:
        if loan is not None:
            loan.settle()


def _stage(variant: Any, inputs: list[Any]) -> None:
    with vt.no_grad():
        for target, value in zip(variant.inputs, inputs):
            if target is not None:
                target.copy_(value if isinstance(value, vt.Tensor) else from_array(value))


def _written(variant: Any) -> list[Any]:
    """All bytes of each buffer outside the arena that the program writes."""
    buffers = {
        view.buffer
        for op in variant.tape.ops
        if not op.is_view
        for view in op.writes()
        if view.buffer.role != "scratch" and view.buffer.nbytes
    }
    memory = variant.lowered.memory
    return [
        _C.graphs.tensor_on(memory[buffer], 0, vt.uint8, [buffer.nbytes], [1])
        for buffer in variant.tape.buffers
        if buffer in buffers
    ]
