"""A memory snapshot as what a page draws: allocations over time, segments, pools.

The snapshot is a dict as torch.cuda.memory._snapshot() gives it, ours or PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stacks:
    """Distinct call stacks by number; each a list of numbers of lines "file:line name"."""

    lines: list[str] = field(default_factory=list)
    stacks: list[list[int]] = field(default_factory=list)
    _line: dict[str, int] = field(default_factory=dict)
    _stack: dict[tuple[int, ...], int] = field(default_factory=dict)
    _seen: dict[int, int] = field(default_factory=dict)  # by id: a snapshot shares its lists
    _kept: list[Any] = field(default_factory=list)  # so that no id comes back

    def number(self, frames: Sequence[dict[str, Any]] | None) -> int:
        """The number of a stack given as dicts of filename, line and name, innermost first."""
        frames = frames or ()
        seen = self._seen.get(id(frames))
        if seen is not None:
            return seen
        lines = []
        for frame in frames:
            text = f"{frame['filename']}:{frame['line']} {frame['name']}"
            if text not in self._line:
                self._line[text] = len(self.lines)
                self.lines.append(text)
            lines.append(self._line[text])
        key = tuple(lines)
        if key not in self._stack:
            self._stack[key] = len(self.stacks)
            self.stacks.append(lines)
        self._seen[id(frames)] = self._stack[key]
        self._kept.append(frames)
        return self._stack[key]

    def text(self, number: int) -> list[str]:
        """The lines of a stack, innermost first."""
        return [self.lines[line] for line in self.stacks[number]]


@dataclass
class Timeline:
    """One device. Positions are numbers of events; the state at `n` is that after event `n`.

    `allocations` are tuples (start, end, size, stack, address, stream), in the order of their
    starts: live at the positions start <= n < end. What was there before the first event starts
    at -1; what was not freed ends at `len(times)`. `ooms` are (position, size, free, stack),
    `reserved` steps (position, bytes).
    """

    times: list[int]  # microseconds since the first event
    allocations: list[tuple[int, int, int, int, int, int]]
    ooms: list[tuple[int, int, int, int]]
    reserved: list[tuple[int, int]]

    def live_bytes(self) -> list[int]:
        """Bytes live at each position."""
        change = [0] * (len(self.times) + 1)
        for start, end, size, *_ in self.allocations:
            change[max(start, 0)] += size
            change[end] -= size
        total, out = 0, []
        for step in change[:-1]:
            total += step
            out.append(total)
        return out


def timeline(
    trace: Sequence[dict[str, Any]], segments: Iterable[dict[str, Any]], stacks: Stacks
) -> Timeline:
    """What happened on one device, from its events and the segments of the snapshot.

    Memory counts from "alloc" to "free_completed". A block that the segments show in use and no
    event mentions was there all the time.
    """
    count = len(trace)
    open_at: dict[int, list[int]] = {}  # address: start, size, stack, stream
    done: list[tuple[int, int, int, int, int, int]] = []
    ooms: list[tuple[int, int, int, int]] = []
    growth: list[tuple[int, int]] = []

    def close(address: int, end: int) -> None:
        start, size, stack, stream = open_at.pop(address)
        done.append((start, end, size, stack, address, stream))

    for position, event in enumerate(trace):
        action, size = event["action"], event["size"]
        address, stream = event.get("addr", 0), event.get("stream", 0)
        if action == "alloc":
            if address in open_at:  # its free is not among the events
                close(address, position)
            open_at[address] = [position, size, stacks.number(event.get("frames")), stream]
        elif action == "free_completed":
            if address not in open_at:
                open_at[address] = [-1, size, stacks.number(None), stream]
            close(address, position)
        elif action in ("segment_alloc", "segment_map"):
            growth.append((position, size))
        elif action in ("segment_free", "segment_unmap"):
            growth.append((position, -size))
        elif action == "oom":
            frames = stacks.number(event.get("frames"))
            ooms.append((position, size, event.get("device_free", 0), frames))
    held = 0
    for segment in segments:
        held += segment["total_size"]
        address = segment["address"]
        for block in segment["blocks"]:
            at = block.get("address", address)
            if block["state"] != "inactive" and at not in open_at:
                frames = stacks.number(block.get("frames"))
                open_at[at] = [-1, block["size"], frames, segment["stream"]]
            address += block["size"]
    for address in list(open_at):
        close(address, count)
    done.sort()
    # The segments tell what is held in the end; the events lead back to what was held before.
    reserved, level = [], held
    for position, size in reversed(growth):
        reserved.append((position, level))
        level -= size
    reserved.append((-1, level))
    origin = next((event["time_us"] for event in trace if "time_us" in event), 0)
    times = [event.get("time_us", origin + n) - origin for n, event in enumerate(trace)]
    return Timeline(times, done, ooms, reserved[::-1])


def places_at_peak(line: Timeline, most: int = 20) -> tuple[int, list[tuple[int, int, int]]]:
    """The most bytes live at once, and who held them then: (bytes, allocations, stack) by stack,
    the largest first."""
    live = line.live_bytes()
    if not live:  # no events: what the segments show
        position, peak = -1, sum(a[2] for a in line.allocations)
    else:
        position = max(range(len(live)), key=live.__getitem__)
        peak = live[position]
    by_stack: dict[int, list[int]] = {}
    for start, end, size, stack, *_ in line.allocations:
        if start <= position < end:
            sums = by_stack.setdefault(stack, [0, 0])
            sums[0] += size
            sums[1] += 1
    rows = sorted(((b, n, stack) for stack, (b, n) in by_stack.items()), reverse=True)
    return peak, rows[:most]


def pool_rows(segments: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each pool holds on each device and stream, in bytes, the largest first."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for segment in segments:
        pool = tuple(segment.get("segment_pool_id", (0, 0)))
        device, stream = segment.get("device", 0), segment["stream"]
        row = rows.setdefault(
            (device, pool, stream),
            {"device": device, "pool": pool, "stream": stream, "segments": 0, "reserved": 0,
             "allocated": 0, "pending": 0, "free": 0, "largest_free": 0},
        )  # fmt: skip
        row["segments"] += 1
        row["reserved"] += segment["total_size"]
        for block in segment["blocks"]:
            size = block["size"]
            if block["state"] == "active_allocated":
                row["allocated"] += size
            elif block["state"] == "inactive":
                row["free"] += size
                row["largest_free"] = max(row["largest_free"], size)
            else:
                row["pending"] += size
    return sorted(rows.values(), key=lambda row: -row["reserved"])
