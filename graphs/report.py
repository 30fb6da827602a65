"""What a capture did, as text."""

from __future__ import annotations

from collections import Counter
from typing import Any


def report(name: str, variant: Any) -> str:
    """Ops before and after the passes, memory beside its bound, replays."""
    recorded = [op for op in variant.recording.tape.ops if not op.is_view]
    kept = [op for op in variant.tape.ops if not op.is_view]
    lines = [
        f"{name}: {len(kept)} ops of {len(recorded)} recorded, {variant.replays} replays",
    ]
    for device, plan in variant.lowered.plans.items():
        lines.append(
            f"  arena on {device}: {plan.nbytes:,} bytes, lower bound {plan.lower_bound:,} "
            f"({plan.excess:.1%} above), {len(plan.offsets)} buffers, {len(plan.shared)} in place"
        )
        peak = variant.tape.ops[plan.peak_op] if variant.tape.ops else None
        if peak is not None:
            lines.append(f"  most is live at {peak.name} ({peak.phase}, {peak.source})")
    for phase in ("forward", "backward", "optimizer"):
        counts = Counter(op.name for op in kept if op.phase == phase)
        if counts:
            shown = ", ".join(f"{count} {op}" for op, count in counts.most_common(8))
            lines.append(f"  {phase}: {sum(counts.values())} ops: {shown}")
    return "\n".join(lines)
