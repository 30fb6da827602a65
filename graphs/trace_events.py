"""A profile in the trace event format, which Perfetto and chrome://tracing draw.

Each op is a complete event ("X") of its median, one after the other, in the track of its phase;
the bytes live in each arena are a counter ("C"). Times are in microseconds.
"""

from __future__ import annotations

import json
from typing import Any

from vibetensor.graphs.arena import live_bytes
from vibetensor.graphs.dataflow import view_bytes
from vibetensor.graphs.plan import Plan
from vibetensor.graphs.profile import Profile
from vibetensor.graphs.tape import PHASES, Op, Tape

_PROCESS = 1


def trace_events(name: str, tape: Tape, plans: dict[str, Plan], profile: Profile) -> dict[str, Any]:
    """The trace as what its JSON holds."""
    events: list[dict[str, Any]] = [_named("process_name", 0, name)]
    events += [_named("thread_name", number, phase) for number, phase in enumerate(PHASES, 1)]
    live = {device: live_bytes(tape, plan) for device, plan in plans.items()}
    now = 0.0
    for at, op, seconds in zip(profile.indices, profile.ops, profile.medians):
        for device, levels in live.items():
            counter = {"name": f"arena on {device}", "ph": "C", "pid": _PROCESS, "ts": now}
            events.append({**counter, "args": {"live bytes": levels[at]}})
        events.append(_event(at, op, now, seconds * 1e6))
        now += seconds * 1e6
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"runs": profile.runs, "replay_us": profile.replay * 1e6},
    }


def trace_text(name: str, parts: list[tuple[Tape, dict[str, Plan], Profile]]) -> str:
    """`trace_events` of what runs one after the other, a forward and its backward say, as JSON."""
    whole, *others = (trace_events(name, *part) for part in parts)
    for other in others:
        end = max((e["ts"] + e["dur"] for e in whole["traceEvents"] if e["ph"] == "X"), default=0.0)
        timed = (event for event in other["traceEvents"] if "ts" in event)
        whole["traceEvents"] += [{**event, "ts": event["ts"] + end} for event in timed]
        whole["otherData"]["replay_us"] += other["otherData"]["replay_us"]
    return json.dumps(whole, separators=(",", ":"))


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": _PROCESS, "tid": thread, "args": {"name": name}}


def _event(at: int, op: Op, start: float, duration: float) -> dict[str, Any]:
    source = op.source
    return {
        "name": op.name,
        "cat": op.phase,
        "ph": "X",
        "pid": _PROCESS,
        "tid": PHASES.index(op.phase) + 1,
        "ts": start,
        "dur": duration,
        "args": {
            "op": at,
            "call": op.text(),
            "line": f"{source.file}:{source.line} {source.function}" if source else None,
            "bytes read": sum(map(view_bytes, op.reads())),
            "bytes written": sum(map(view_bytes, op.writes())),
        },
    }
