"""How fast a captured step of each workload could be: the floor of every op beside its time.

python bench/floor.py [--workload gpt2] [--scale full] [--json]

An op's floor is the longer of its bytes over the copy bandwidth and its flops over the rate of matrix
products, both as measured on the GPU at hand; without one as stated in CEILINGS. On a GPU the step is
captured and each op timed in replays that run op by op; rows are sorted by time above the floor.
Without a GPU the step is recorded dry, with the CPU's ops (passes for GPUs alone are not in it), and
rows are sorted by floor. What lies in the L2 cache when an op starts may come in less than its floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from op_work import Work, work_of
from plans import steady_step
from side_by_side import processor
from train_process import Clock, build
from workloads import SCALES, WORKLOADS

import vibetensor.torch as vt
from vibetensor.graphs import passes
from vibetensor.graphs.profile import count_text, profile, seconds_text
from vibetensor.graphs.tape import Tape


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes a second, read and written, of a copy. flops: a second, of large products by
    the dtype of their operands. where: what they hold for."""

    where: str
    bandwidth: float
    flops: dict[str, float]

    def floor(self, work: Work) -> float:
        """Seconds."""
        rate = self.flops.get(work.kind, self.flops["float64"])  # integers: no units of their own
        arithmetic = work.flops / rate
        return max(work.bytes / self.bandwidth, arithmetic)


# Sustained on random data on one H200 at 700 W: 16-bit products by the best library (short ones reach
# 790e12); float32 as three products of TF32, which runs at half the rate; float64 and int8 by its data sheet.
CEILINGS = Ceilings(
    "an H200, as stated",
    4.3e12,
    {"float16": 680e12, "float32": 113e12, "float64": 67e12, "int8": 1360e12},
)


@dataclass(frozen=True)
class Row:
    """Ops that are alike: count of them with the same name and operands. floor, seconds: of all of
    them; seconds is None where nothing was timed."""

    text: str
    name: str
    phase: str
    count: int
    read: int
    written: int
    flops: int
    floor: float
    bound: str  # "memory" or "arithmetic"
    seconds: float | None

    @property
    def gap(self) -> float:
        """Seconds above the floor."""
        return 0.0 if self.seconds is None else self.seconds - self.floor


@dataclass(frozen=True)
class StepFloor:
    """A step's rows, its floor (the sum of theirs), and what was timed: op by op, and a replay."""

    workload: str
    scale: str
    device: str
    ceilings: Ceilings
    rows: list[Row]
    floor: float
    seconds: float | None
    replay: float | None


def rows_of(tape: Tape, ceilings: Ceilings, medians: dict[int, float] | None = None) -> list[Row]:
    """The tape's ops by name and operands, those furthest above their floor first. medians: seconds
    of ops by their place on the tape."""
    alike: dict[tuple[str, str], list[int]] = {}
    for at, op in enumerate(tape.ops):
        if not op.is_view:
            alike.setdefault((_operands(op), op.phase), []).append(at)
    rows = []
    for (text, phase), places in alike.items():
        work = work_of(tape.ops[places[0]])
        one, count = ceilings.floor(work), len(places)
        bound = "memory" if one <= work.bytes / ceilings.bandwidth else "arithmetic"
        seconds = None if medians is None else sum(medians[at] for at in places)
        name = tape.ops[places[0]].name
        rows.append(
            Row(text, name, phase, count, work.read * count, work.written * count,
                work.flops * count, one * count, bound, seconds)
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-row.gap, -row.floor))


def _operands(op: Any) -> str:
    """The op with its tensors' dtypes and shapes, and not the memory they lie in."""

    def shown(views: Any) -> str:
        parts = [str(view).partition(":")[2] for view in views]
        return (
            ", ".join(parts)
            if len(parts) <= 6
            else f"{len(parts)} tensors {', '.join(parts[:2])}, …"
        )

    return f"{op.name}({shown(op.reads())}) -> {shown(op.writes())}"


def measured(
    name: str,
    scale: str,
    device: str,
    ceilings: Ceilings,
    dtype: str | None = None,
    runs: int | None = None,
) -> StepFloor:
    """Captures the step, times its ops and sets them beside their floors."""
    workload = WORKLOADS[name]
    options = {
        "workload": name, "scale": scale, "device": device, "mode": "capture",
        "dtype": dtype or workload.dtype,
    }  # fmt: skip
    step, steady = build(options, vt)
    rng = np.random.default_rng(0)
    for _ in range(6):
        x, y = (vt.from_numpy(a).to(device) for a in workload.batch(workload.config(scale), rng))
        step(x, y)
    if not steady():
        raise RuntimeError(f"{name}: the step was not captured")
    variant = max(step.variants, key=lambda v: v.replays)
    found = profile(variant, runs=runs)
    rows = rows_of(variant.tape, ceilings, dict(zip(found.indices, found.medians, strict=True)))
    floor = sum(row.floor for row in rows)
    return StepFloor(name, scale, device, ceilings, rows, floor, found.total, found.replay)


def planned(
    name: str, scale: str, ceilings: Ceilings = CEILINGS, dtype: str | None = None
) -> StepFloor:
    """The step's floors without running it."""
    tape = passes.run(steady_step(name, scale, dtype)().tape)
    rows = rows_of(tape, ceilings)
    floor = sum(row.floor for row in rows)
    return StepFloor(name, scale, "none", ceilings, rows, floor, None, None)


def measured_ceilings(device: str = "cuda", side: int = 8192, elements: int = 1 << 28) -> Ceilings:
    """The rates of the device at hand: a copy of `elements` numbers of four bytes, and square
    products of random numbers in bfloat16 and float32. Others keep their part of the bfloat16 rate."""
    source = vt.randn(elements, device=device)
    target = vt.empty_like(source)
    bandwidth = 2 * 4 * elements / _seconds(lambda: target.copy_(source), device)
    flops = dict(CEILINGS.flops)
    for kind, dtype in (("float16", vt.bfloat16), ("float32", vt.float32)):
        a, b = (vt.randn(side, side, device=device).to(dtype) for _ in range(2))
        flops[kind] = 2 * side**3 / _seconds(lambda a=a, b=b: a @ b, device)
    part = flops["float16"] / CEILINGS.flops["float16"]
    for kind in flops.keys() - {"float16", "float32"}:
        flops[kind] *= part
    name = processor() if device == "cpu" else vt.cuda.get_device_name()
    return Ceilings(f"{name}, as measured", bandwidth, flops)


def _seconds(call: Any, device: str, rounds: int = 15) -> float:
    """The median of a call's time where it runs."""
    clock = Clock(vt, device)
    for at in range(rounds + 3):  # the first ones warm up
        if at >= 3:
            clock.mark()
        call()
    clock.mark()
    return statistics.median(clock.times()) * 1e-3


def text_of(found: StepFloor, top: int) -> str:
    """The step's rows as a table."""
    c = found.ceilings
    ops = sum(row.count for row in found.rows)
    lines = [
        f"{found.workload}, {found.scale}: floor {seconds_text(found.floor)} of {count_text(ops)} "
        f"({sum(r.read + r.written for r in found.rows) / 1e9:.2f} GB, "
        f"{sum(r.flops for r in found.rows) / 1e12:.3f} TFLOP)"
    ]
    if found.seconds is not None and found.replay is not None:
        lines[0] += (
            f"; op by op {seconds_text(found.seconds)}, a replay {seconds_text(found.replay)} = "
            f"{found.replay / found.floor:.2f}x the floor"
        )
    lines.append(
        f"  ceilings of {c.where}: {c.bandwidth / 1e12:.2f} TB/s, "
        + ", ".join(f"{kind} {rate / 1e12:.0f}" for kind, rate in c.flops.items())
        + " TFLOP/s"
    )
    lines.append(f"  {'gap':>9} {'time':>9} {'floor':>9} {'GB':>8} {'GFLOP':>9}  bound       ops")
    for row in found.rows[:top]:
        timed = ["", ""] if row.seconds is None else [_us(row.gap), _us(row.seconds)]
        lines.append(
            f"  {timed[0]:>9} {timed[1]:>9} {_us(row.floor):>9} {(row.read + row.written) / 1e9:>8.3f} "
            f"{row.flops / 1e9:>9.2f}  {row.bound:<10} {row.count:>4} {row.text}"
        )
    if rest := found.rows[top:]:
        timed = ["", ""]
        if found.seconds is not None:
            timed = [_us(sum(r.gap for r in rest)), _us(sum(r.seconds or 0.0 for r in rest))]
        lines.append(
            f"  {timed[0]:>9} {timed[1]:>9} {_us(sum(r.floor for r in rest)):>9} "
            f"{sum(r.read + r.written for r in rest) / 1e9:>8.3f} {sum(r.flops for r in rest) / 1e9:>9.2f}"
            f"  {'':<10} {sum(r.count for r in rest):>4} others"
        )
    return "\n".join(lines)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=["all", *WORKLOADS], action="append")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the workload's")
    parser.add_argument(
        "--device", choices=["none", "cpu", "cuda"],
        help="none records dry and times nothing, cpu times there beside a GPU's floors; default: cuda "
        "where there is a GPU, else none",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=30, help="rows to print, 0 for all")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON instead")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if vt.cuda.is_available() else "none")
    names = options.workload or ["all"]
    ceilings = measured_ceilings() if device == "cuda" else CEILINGS
    records = []
    for name in WORKLOADS if "all" in names else dict.fromkeys(names):
        if device == "none":
            found = planned(name, options.scale, ceilings, options.dtype)
        else:
            found = measured(name, options.scale, device, ceilings, options.dtype)
        if options.json:
            records.append(asdict(found))
        else:
            print(text_of(found, options.top or len(found.rows)), flush=True)
    if options.json:
        print(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
