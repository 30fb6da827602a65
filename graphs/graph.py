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
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.capture import write_text
from vibetensor.graphs.dry import Captured, DryCapture, check_unmoved
from vibetensor.graphs.tape import Tape

_MODES = ("global", "thread_local", "relaxed")
_pool_numbers = itertools.count(1)


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
        self._open: DryCapture | None = None
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
        pool = pool_handle(pool)
        opened = DryCapture()
        opened.begin()
        self._open, self._pool = opened, pool

    def capture_end(self) -> None:
        """Ends the recording and makes it ready for replays."""
        opened = self._open
        if opened is None:
            raise RuntimeError("capture_end() called without a capture_begin() before it")
        self._open = None
        self._captured = opened.end(self._optimize, self._pool_of)
        if self._pool is None:
            self._pool = (0, next(_pool_numbers))

    def _pool_of(self, device: str) -> Any:
        """The memory for intermediates on an accelerator: the pool that was named, or a new one."""
        pool = _C.graphs.Pool(device, self._pool or (0, 0))
        self._pool = pool.handle
        return pool

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
        with self._lock:
            if captured.native.run_in_place():
                return
            if _C.graphs.recording() is not None:
                raise RuntimeError(
                    "a graph cannot be replayed inside a recording: captured steps do not nest"
                )
            check_unmoved(captured)
            raise RuntimeError("a tensor of the graph is another one by now: capture again")

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
        """What was captured: ops, passes, memory, time if it was profiled."""
        from vibetensor.graphs.report import report

        return report("graph", [self._required("report()")])

    def profile(self) -> Any:
        """Times each op in replays that run op by op; returns a `Profile`, which prints. It is no
        replay: tensors and random numbers are afterwards as they were."""
        from vibetensor.graphs.profile import profile

        captured = self._required("profile()")
        with self._lock:
            check_unmoved(captured)
            captured.profile = profile(captured)
        return captured.profile

    def report_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page for a browser: see `CapturedStep.report_html`."""
        from vibetensor.graphs.report_html import report_page

        write_text(path, report_page("graph", [self._required("report_html()")]))

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the capture's profile for Perfetto or chrome://tracing; takes one if there is none
        yet."""
        from vibetensor.graphs.trace_events import trace_text

        captured = self._required("chrome_trace()")
        timed = captured.profile or self.profile()
        plans = captured.lowered.plans
        write_text(path, trace_text("graph", [(captured.tape, plans, timed)]))

    def to_dot(self) -> str:
        """The capture as a graph in DOT: ops by phase, and what each reads."""
        from vibetensor.graphs.dot import to_dot

        return to_dot(self._required("to_dot()").tape, "graph")

    def debug_dump(self, debug_path: str | os.PathLike[str]) -> None:
        """Writes `to_dot` to a file."""
        self._required("debug_dump()")
        write_text(debug_path, self.to_dot())

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


def pool_handle(pool: Any) -> tuple[int, int] | None:
    """The handle of a pool given as one, or as a graph that has one; None for None."""
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
