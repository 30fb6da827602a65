"""Where a step's scratch buffers lie in one arena.

A buffer is live from the op that first touches it to the op that last does; one that only names it
does not. Buffers that are live together lie apart; a pointwise op may write where one of its inputs
ends. Finding the smallest arena is NP-hard (dynamic storage allocation); largest first, each at the
lowest free offset, comes close to the bound on the tapes of training steps: Pisarchyk and Lee,
"Efficient Memory Management for Deep Neural Net Inference", 2020. Where it does not, other orders near
that one and a few more are tried. The bound is the most bytes that are live at one op.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from vibetensor.graphs import pointwise
from vibetensor.graphs.tape import Buffer, Op, Tape, View

ALIGNMENT = 256
# An arena that is larger than the bound by more than this is planned again in other orders: so many, and
# with so many buffers placed in all.
ENOUGH = 0.01
MOST_ROUNDS, MOST_PLACED = 128, 16384
_WAYS = (1, 3, 8, 20)


@dataclass
class Plan:
    """offsets: bytes into the arena by buffer. lower_bound: no arena can be smaller, given the order
    of the ops and the places shared in `shared`."""

    offsets: dict[Buffer, int]
    nbytes: int
    lower_bound: int
    peak_op: int
    shared: dict[Buffer, Buffer]

    @property
    def excess(self) -> float:
        """The arena's size over the bound, less one."""
        return self.nbytes / self.lower_bound - 1 if self.lower_bound else 0.0


def plan(tape: Tape, arena_device: str) -> Plan:
    """Plans the scratch buffers of one device."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for at, op in enumerate(tape.ops):
        if op.is_view:
            continue
        for view in (*op.reads(), *op.writes()):
            buffer = view.buffer
            if buffer.role == "scratch" and buffer.device == arena_device and buffer.nbytes > 0:
                first.setdefault(buffer, at)
                last[buffer] = at
    shared = _share_places(tape, first, last)
    blocks: dict[Buffer, list[int]] = {}  # root -> [first, last]
    for buffer in first:
        root = _root(shared, buffer)
        span = blocks.setdefault(root, [first[buffer], last[buffer]])
        span[0], span[1] = min(span[0], first[buffer]), max(span[1], last[buffer])
    roots = list(blocks)
    sizes = np.array([aligned(b.nbytes) for b in roots], dtype=np.int64)
    starts = np.array([blocks[b][0] for b in roots], dtype=np.int64)
    ends = np.array([blocks[b][1] for b in roots], dtype=np.int64)
    live = np.zeros(len(tape.ops) + 1, dtype=np.int64)
    np.add.at(live, starts, sizes)
    np.add.at(live, ends + 1, -sizes)
    live = np.cumsum(live)
    bound = int(live.max(initial=0))
    nbytes, places = _best_places(bound, sizes, starts, ends)
    at_root = dict(zip(roots, places.tolist()))
    offsets = {buffer: at_root[_root(shared, buffer)] for buffer in first}
    return Plan(offsets, nbytes, bound, int(live.argmax()) if len(live) else 0, shared)


def aligned(nbytes: int) -> int:
    """The bytes that a buffer takes in an arena."""
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _root(shared: dict[Buffer, Buffer], buffer: Buffer) -> Buffer:
    while buffer in shared:
        buffer = shared[buffer]
    return buffer


def _share_places(
    tape: Tape, first: dict[Buffer, int], last: dict[Buffer, int]
) -> dict[Buffer, Buffer]:
    """Pointwise outputs that take the place of an input which ends there: output -> input."""
    shared: dict[Buffer, Buffer] = {}
    for at, op in enumerate(tape.ops):
        if op.name == pointwise.NAME:
            _share_in_chain(op, at, first, last, shared)
            continue
        if op.capture_class != "pointwise" or len(op.outputs) != 1:
            continue
        out = op.outputs[0]
        if out is None or first.get(out.buffer) != at or out.buffer in shared:
            continue
        for view in op.reads():
            if last.get(view.buffer) == at and _same_place(view, out) and _only_use(op, view):
                shared[out.buffer] = view.buffer
                break
    return shared


def _share_in_chain(
    op: Op, at: int, first: dict[Buffer, int], last: dict[Buffer, int], shared: dict[Buffer, Buffer]
) -> None:
    """Results of a fused op that are first written when an input has been read for the last time."""
    results, tensors, *_ = op.args
    reads, writes = pointwise.last_reads_and_first_writes(op)
    taken: set[Buffer] = set()
    for index, out in enumerate(results):
        if first.get(out.buffer) != at or out.buffer in shared:
            continue
        for number, view in enumerate(tensors, len(results)):
            free = last.get(view.buffer) == at and view.buffer not in taken
            fits = _same_place(view, out) and _only_use(op, view)
            if free and fits and reads.get(number, -1) <= writes[index]:
                shared[out.buffer] = view.buffer
                taken.add(view.buffer)
                break


def _same_place(view: View, out: View) -> bool:
    return (
        view.buffer is not out.buffer
        and view.buffer.nbytes == out.buffer.nbytes
        and view.dtype == out.dtype
        and view.sizes == out.sizes
        and view.strides == out.strides
        and view.offset == out.offset
    )


def _only_use(op: Op, view: View) -> bool:
    """No other argument reads the same buffer through another geometry."""
    return all(other == view for other in op.reads() if other.buffer is view.buffer)


def _best_places(
    bound: int, sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[int, np.ndarray]:
    """The smallest arena that was found, and the places in it."""
    best, best_places = 0, sizes
    orders = _orders(sizes, starts, ends)
    for index, order in enumerate(chain(orders, _shuffled(orders))):
        if index >= len(orders) and best <= bound * (1 + ENOUGH):
            break
        total, places = _place(order, sizes, starts, ends)
        if index == 0 or total < best:
            best, best_places = total, places
        if best == bound:
            break
    return best, best_places


def _shuffled(orders: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The orders by turns, with places exchanged at random over short and long ways; the same every time."""
    count = len(orders[0])
    random = np.random.default_rng(0)
    for index in range(min(MOST_ROUNDS, MOST_PLACED // max(count, 1))):
        keys = np.arange(count) + random.normal(0, _WAYS[index % len(_WAYS)], count)
        yield orders[index // len(_WAYS) % len(orders)][np.argsort(keys, kind="stable")]


def _orders(sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    spans = ends - starts
    return [
        np.lexsort((starts, -sizes)),
        np.lexsort((-sizes, -spans)),
        np.lexsort((starts, -(sizes * (spans + 1)))),
        np.lexsort((-sizes, starts)),
    ]


def _place(
    order: np.ndarray, sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[int, np.ndarray]:
    """Each block in turn at the lowest offset that is free while it is live."""
    places = np.zeros(len(sizes), dtype=np.int64)
    placed: list[int] = []
    total = 0
    done = np.zeros(len(sizes), dtype=bool)
    for index in order.tolist():
        meets = done & (starts <= ends[index]) & (ends >= starts[index])
        at = 0
        if meets.any():
            taken = np.flatnonzero(meets)
            taken = taken[np.argsort(places[taken], kind="stable")]
            tops = np.maximum.accumulate(places[taken] + sizes[taken])
            gaps = places[taken] - np.concatenate(([0], tops[:-1]))
            fits = np.flatnonzero(gaps >= sizes[index])
            at = int(np.concatenate(([0], tops[:-1]))[fits[0]]) if len(fits) else int(tops[-1])
        places[index] = at
        done[index] = True
        placed.append(index)
        total = max(total, at + int(sizes[index]))
    return total, places
