"""Where vibetensor and torch differ on torch's own operator samples, and why."""

from __future__ import annotations

ALL = "all"

# How much wider than usual values may differ, by operator.
TOLERANCE_SCALE: dict[str, float] = {}

# (operator of op_db, what is checked) -> (numbers of the samples that differ, reason)
EXPECTED: dict[tuple[str, str], tuple[tuple[int, ...] | str, str]] = {}
