"""What captures did, as text: ops, passes, memory, time, and why one was captured again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.arena import blocks, live_at
from vibetensor.graphs.course import first_change
from vibetensor.graphs.profile import count_text, seconds_text
from vibetensor.graphs.tape import PHASES, Buffer, Decision, Op, Tape

_MOST_DIFFERENCES = 5
_MOST_DECISIONS = 6  # of a pass, each with a text of its own


def report(name: str, variants: list[Any]) -> str:
    """All captures of a function, in the order they were made."""
    if not variants:
        return f"{name}: not captured yet"
    variants = in_order(variants)
    parts = []
    if len(variants) > 1:
        replays = sum(variant.replays for variant in variants)
        parts.append(f"{name}: captured {len(variants)} times, {_times(replays)}")
    for variant in variants:
        title = name if len(variants) == 1 else f"capture {variant.course.number}"
        parts.append("\n".join(_capture(title, variant, variants)))
    return "\n\n".join(parts)


def in_order(variants: list[Any]) -> list[Any]:
    """Captures by the time they were made."""
    return sorted(variants, key=lambda variant: variant.course.number)


def recaptured(variant: Any, variants: list[Any]) -> list[str]:
    """Why a function was captured again: what differs from the likest capture before, and the first
    op that does. Empty for the first."""
    before = [v for v in variants if v.course.number < variant.course.number]
    course = variant.course
    if not before or not course.facts:  # without facts it was captured for a reason of its own
        return []
    nearest = min(reversed(before), key=lambda v: len(course.differences(v.course)))
    found = course.differences(nearest.course)
    if not found:
        found = ["the arguments and options are the same, tensors or branches are not"]
    lines = [f"captured again: {text}" for text in found[:_MOST_DIFFERENCES]]
    if len(found) > len(lines):
        lines.append(f"and {len(found) - len(lines)} other circumstances")
    change = first_change(nearest.recording, variant.recording, _data(nearest) | _data(variant))
    beside = f"beside capture {nearest.course.number}"
    lines.append(
        f"recaptured: {change} ({beside})" if change else f"recaptured: the same ops ({beside})"
    )
    return lines


def running(tape: Tape) -> list[Op]:
    """The ops that do something: the others only name memory."""
    return [op for op in tape.ops if not op.is_view]


def _data(variant: Any) -> set[Buffer]:
    """Where inputs and learning rates lie: they are other ones at each call."""
    recording = variant.recording
    inputs = [recording.buffer_of(x) for x in variant.inputs if isinstance(x, vt.Tensor)]
    found = {*inputs, *variant.session.live_buffers(recording)}
    return {buffer for buffer in found if buffer is not None}


def bound_text(tape: Tape) -> str:
    """How near a replay comes to the recorded ops."""
    if tape.bound == 0:
        return "bit for bit those of the recorded ops"
    return f"within {tape.bound:.1e} of the recorded ops', relative to the largest element"


def memory_by_role(tape: Tape) -> dict[str, int]:
    """Bytes of the buffers that the ops use, by role: state, output, scratch."""
    used = {view.buffer for op in tape.ops for view in (*op.reads(), *op.writes())}
    sums: Counter[str] = Counter()
    for buffer in used:
        sums[buffer.role] += buffer.nbytes
    return dict(sums)


def _capture(title: str, variant: Any, variants: list[Any]) -> list[str]:
    recorded, kept = running(variant.recording.tape), running(variant.tape)
    lines = [
        f"{title}: {count_text(len(kept))} of {len(recorded)} recorded, {_times(variant.replays)}"
    ]
    lines += [f"  {line}" for line in recaptured(variant, variants)]
    lines += _passes(variant)
    lines.append(f"  results: {bound_text(variant.tape)}")
    for device, plan in variant.lowered.plans.items():
        lines.append(
            f"  arena on {device}: {plan.nbytes:,} bytes, lower bound {plan.lower_bound:,} "
            f"({plan.excess:.1%} above), {len(plan.offsets)} buffers, {len(plan.shared)} in place"
        )
        if plan.offsets:
            lines.append(f"  most is live at op {plan.peak_op} {_peak(variant.tape, plan)}")
    roles = memory_by_role(variant.tape)
    lines.append(
        f"  outside it: state {roles.get('state', 0):,} bytes, results and gradients "
        f"{roles.get('output', 0):,}"
        + (f", constants {roles['constant']:,}" if roles.get("constant") else "")
    )
    for phase in PHASES:
        counts = Counter(op.name for op in kept if op.phase == phase)
        if counts:
            shown = ", ".join(f"{count} {op}" for op, count in counts.most_common(8))
            more = f" and {len(counts) - 8} other kinds" if len(counts) > 8 else ""
            lines.append(f"  {phase}: {count_text(sum(counts.values()))}: {shown}{more}")
    if variant.profile is not None:
        lines += _time(variant.profile)
    return lines


def _peak(tape: Tape, plan: Any) -> str:
    """The op, and the lines whose results are live there."""
    sums: Counter[str] = Counter()
    for block in live_at(blocks(tape, plan), plan.peak_op):
        sums[str(tape.ops[block.first].source or "no line")] += block.nbytes
    total = sum(sums.values()) or 1
    shares = ", ".join(f"{n / total:.0%} from {line}" for line, n in sums.most_common(3))
    return f"{where(tape.ops[plan.peak_op])}: {shares}"


def _passes(variant: Any) -> list[str]:
    """Ops before and after each pass, with what it did and refused."""
    made = variant.tape.decisions
    lines = []
    known = set()
    for name, before, after in variant.tape.passes:
        known.add(name)
        own = [d for d in made if d.by == name]
        if before == after and not own:
            continue
        lines.append(f"  {name}: {before} → {count_text(after)}")
        lines += _decided(own)
    idle = [name for name, before, after in variant.tape.passes if before == after]
    idle = [name for name in idle if not any(d.by == name for d in made)]
    if idle:
        lines.append(f"  nothing to do for {', '.join(idle)}")
    for name in dict.fromkeys(d.by for d in made if d.by not in known):
        lines.append(f"  {name}:")
        lines += _decided([d for d in made if d.by == name])
    return lines


def _decided(own: list[Decision]) -> list[str]:
    """Decisions of a pass, equal ones together: how often, and where first."""
    groups: dict[tuple[bool, str], list[Decision]] = {}
    for decision in own:
        groups.setdefault((decision.made, decision.text), []).append(decision)
    ordered = sorted(groups.items(), key=lambda group: (not group[0][0], -len(group[1])))
    lines = []
    for (made, text), same in ordered[:_MOST_DECISIONS]:
        times = f"{len(same)}x " if len(same) > 1 else ""
        place = f"{'first ' if len(same) > 1 else ''}{where(same[0].op)}"
        lines.append(f"    {'' if made else 'not: '}{times}{text}; {place}")
    if len(ordered) > _MOST_DECISIONS:
        rest = sum(len(same) for _, same in ordered[_MOST_DECISIONS:])
        lines.append(f"    and {rest} more")
    return lines


def _time(profile: Any) -> list[str]:
    lines = [f"  {seconds_text(profile.replay)} a replay, median of {profile.runs}; op by op:"]
    for rows in (profile.by_phase(), profile.by_op()):
        shown = ", ".join(
            f"{row.name} {seconds_text(row.seconds)} ({row.share:.0%})" for row in rows[:6]
        )
        lines.append(f"    {shown}" + (f" and {len(rows) - 6} others" if len(rows) > 6 else ""))
    return lines


def where(op: Op) -> str:
    """An op with its phase and line, for people."""
    return f"{op.name} ({op.phase}, {op.source})" if op.source else f"{op.name} ({op.phase})"


def _times(replays: int) -> str:
    return "1 replay" if replays == 1 else f"{replays} replays"
