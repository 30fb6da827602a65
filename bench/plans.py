"""What a captured step of each workload takes, found without running it: ops, arena, planning time.

python bench/plans.py [--workload gpt2] [--scale full]

The step is recorded dry: ops pass, nothing is computed, no memory is touched. So the full sizes, made
for a GPU, are planned on any machine (with the CPU's ops; float32 weights, activations in --dtype).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from train_process import make_step
from workloads import SCALES, WORKLOADS

import vibetensor.torch as vt
from vibetensor.graphs import passes, record
from vibetensor.graphs.plan import plan
from vibetensor.graphs.record import Recording


@dataclass(frozen=True)
class StepPlan:
    """recorded, ops: before and after the passes. arena, bound, unshared: bytes as planned, the least
    possible, and with memory of its own for every buffer. state: bytes that outlive the step."""

    recorded: int
    ops: int
    arena: int
    bound: int
    unshared: int
    state: int
    seconds: tuple[float, float, float]  # recording, passes, planning


def steady_step(name: str, scale: str, dtype: str | None = None) -> Callable[[], Recording]:
    """Records the workload's step without running anything; its first step is behind it, so that the
    optimizer's moments are made."""
    workload = WORKLOADS[name]
    config = workload.config(scale)
    made: list[Any] = []
    record(lambda: made.append(workload.make(vt, config)), dry=True)
    (model,) = made
    optimizer = workload.make_optimizer(vt, model.parameters(), fused=True)
    step = make_step(vt, model, model, optimizer, "cpu", dtype or workload.dtype)
    x, y = (vt.from_numpy(a) for a in workload.batch(config, np.random.default_rng(0)))
    record(lambda: step(x, y), dry=True)
    return lambda: record(lambda: step(x, y), dry=True)


def plan_of(name: str, scale: str, dtype: str | None = None) -> StepPlan:
    """Records and plans the workload's steady step."""
    record_step = steady_step(name, scale, dtype)
    marks = [time.perf_counter()]
    recording = record_step()
    marks.append(time.perf_counter())
    tape = passes.run(recording.tape)
    marks.append(time.perf_counter())
    found = plan(tape, "cpu")
    marks.append(time.perf_counter())
    sizes = {role: 0 for role in ("state", "output", "scratch")}
    for buffer in tape.buffers:
        sizes[buffer.role] = sizes.get(buffer.role, 0) + buffer.nbytes
    return StepPlan(
        sum(not op.is_view for op in recording.tape.ops),
        sum(not op.is_view for op in tape.ops),
        found.nbytes,
        found.lower_bound,
        sizes["scratch"],
        sizes["state"] + sizes["output"],
        (marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), action="append")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the workload's")
    options = parser.parse_args()
    worst = 0.0
    for name in options.workload or WORKLOADS:
        found = plan_of(name, options.scale, options.dtype)
        excess = found.arena / max(found.bound, 1) - 1
        worst = max(worst, excess)
        gib = 2**30
        print(
            f"{name:<17} {found.ops:>5} ops of {found.recorded:<5} arena {found.arena / gib:>7.3f} GiB, "
            f"{excess:.2%} above the bound, {found.unshared / gib:>7.3f} unshared; state "
            f"{found.state / gib:>7.3f} GiB; record, passes, plan "
            + ", ".join(f"{seconds:.3f}" for seconds in found.seconds)
            + " s"
        )
    return int(worst > 0.05)


if __name__ == "__main__":
    raise SystemExit(main())
