"""Single kernels in bf16 beside torch's best, on the GPU at hand, in one run.

python bench/kernels.py [--kernel GEMM] [--save]

Medians by events around each call, over several sets of random inputs, the L2 cache emptied before
every call; ours and each of torch's modes in turns. `of limit` is the least time that the bytes or the
flops take at the rates measured in the same run, over ours. Goals in microseconds are for an H200.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from floor import Ceilings, measured_ceilings
from kernel_cases import Case, cases
from side_by_side import RESULTS, describe_run

import vibetensor.torch as vt

FLUSH_BYTES = 256 << 20  # more than any L2
# Each empties the cache and keeps the device busy while the host issues the call.
FLUSHES = 4


class Timer:
    """Times of a library's calls: on a GPU between events, else by the host's clock."""

    def __init__(self, lib: Any, device: str) -> None:
        self.cuda = lib.cuda if device != "cpu" else None
        self.spent: list[float] = []
        self._marks: list[tuple[Any, Any]] = []
        self._flush = (
            lib.empty(FLUSH_BYTES // 4, dtype=lib.float32, device=device) if self.cuda else None
        )

    def call(self, function: Callable[[], Any]) -> None:
        """Runs and times it."""
        if self.cuda is None:
            start = time.perf_counter()
            function()
            self.spent.append((time.perf_counter() - start) * 1e6)
            return
        for _ in range(FLUSHES):
            self._flush.zero_()
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        self._marks.append((begin, end))

    def settle(self) -> None:
        """Waits for what was called."""
        if self.cuda is not None:
            self.cuda.synchronize()
            self.spent += [begin.elapsed_time(end) * 1e3 for begin, end in self._marks]
            self._marks.clear()


def sets_of(case: Case) -> list[list[Any]]:
    """Fresh inputs, of more bytes than caches hold, at least two sets."""
    first = case.make()
    if case.together:
        return [first]
    nbytes = sum(t.numel() * t.element_size() for t in first)
    count = min(8, max(2, -(-FLUSH_BYTES // max(nbytes, 1))))
    return [first, *(case.make() for _ in range(count - 1))]


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference of results, relative to torch's largest element."""
    pairs = [(ours, theirs)] if isinstance(ours, vt.Tensor) else list(zip(ours, theirs))
    worst = 0.0
    for a, b in pairs:
        b = b.detach().float()
        gap = (torch.from_dlpack(a.detach()).float() - b).abs().max().item()
        if gap != gap:
            return float("nan")
        worst = max(worst, gap / max(b.abs().max().item(), 1e-30))
    return worst


def run_case(case: Case, device: str, ceilings: Ceilings, rounds: int) -> dict[str, Any]:
    """Compares the results of the first set, then measures in turns."""
    sets = sets_of(case)
    shared = [[torch.from_dlpack(t) for t in tensors] for tensors in sets]
    candidates = {"vibetensor": (vt, [case.ours(*tensors) for tensors in sets])}
    failed = {}
    result = candidates["vibetensor"][1][0]()
    for name, prepare in case.peers.items():
        try:
            calls = [prepare(*tensors) for tensors in shared]
            theirs = calls[0]()
        except RuntimeError as error:  # a mode that torch has no kernel for
            failed[name] = str(error).splitlines()[0]
            continue
        if case.tolerance < float("inf"):
            found = difference(result, theirs)
            if not found <= case.tolerance:
                raise RuntimeError(
                    f"{case.kernel} {case.shape}: differs from torch's {name} by {found:.2g}"
                )
        candidates[name] = (torch, calls)
        del theirs
    del result
    timers = {name: Timer(lib, device) for name, (lib, _) in candidates.items()}
    for turn in range(rounds + 1):
        for name, (_, calls) in candidates.items():
            for call in calls:
                timers[name].call(call)
            timers[name].settle()
            if turn == 0:  # warm-up
                timers[name].spent.clear()
    times = {name: statistics.median(timer.spent) for name, timer in timers.items()}
    return row_of(case, times, failed, ceilings)


def row_of(
    case: Case, times: dict[str, float], failed: dict[str, str], ceilings: Ceilings
) -> dict[str, Any]:
    """The case's numbers, and whether its goal is met; None where there is nothing to compare with."""
    ours = times.pop("vibetensor")
    best = min(times, key=times.__getitem__, default=None)
    limit = ceilings.floor(case.work) * 1e6
    rate = (
        {"rate": case.work.flops / ours / 1e6, "unit": "TFLOP/s"}
        if case.work.flops
        else {"rate": case.work.bytes / ours / 1e6, "unit": "TB/s"}
    )
    goal, met = case.goal, None
    if goal.speed is not None:
        met = None if best is None else times[best] / ours >= goal.speed
    elif goal.us is not None:
        met = ours <= goal.us
    else:
        met = case.work.bytes / ours * 1e6 >= goal.bandwidth * ceilings.bandwidth
    return {
        "kernel": case.kernel, "shape": case.shape, "vibetensor_us": ours, **rate,
        "torch_us": times[best] if best else None, "torch_mode": best, "torch_all_us": times,
        "torch_failed": failed, "of_limit": limit / ours, "goal": str(goal), "met": met,
        "notes": case.notes,
    }  # fmt: skip


def text_of(row: dict[str, Any]) -> str:
    """A line for people."""
    beside = f"no peer ({row['torch_failed']})"
    if row["torch_us"] is not None:
        beside = (
            f"torch {row['torch_mode']} {row['torch_us']:>9.1f} us  "
            f"{row['torch_us'] / row['vibetensor_us']:.2f}x"
        )
    verdict = {True: "met", False: "MISSED", None: "not judged"}[row["met"]]
    return (
        f"{row['kernel']:<50} {row['shape']:<24} {row['vibetensor_us']:>9.1f} us  {row['rate']:>7.4g} "
        f"{row['unit']:<7} {row['of_limit']:>4.0%} of limit  {beside}  goal {row['goal']} {verdict}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="cpu runs the same rows with tiny shapes: a test, no measurement")  # fmt: skip
    parser.add_argument("--kernel", action="append", help="only rows whose name has this in it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write results/kernels.json")
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    if on_cpu:  # rows this small are not worth a second thread
        vt.set_num_threads(1)
        torch.set_num_threads(1)
    if options.save and (on_cpu or options.kernel):
        parser.error("--save is for all rows, on a GPU")
    if not on_cpu and not (vt.cuda.is_available() and torch.cuda.is_available()):
        parser.error("no GPU that both libraries can use; --device cpu tests the rows")
    ceilings = (
        measured_ceilings("cpu", side=128, elements=1 << 16) if on_cpu else measured_ceilings()
    )
    print(f"{ceilings.where}: {ceilings.bandwidth / 1e12:.3g} TB/s, "
          f"{ceilings.flops['float16'] / 1e12:.3g} TFLOP/s")  # fmt: skip
    rows, broken = [], 0
    for case in cases(options.device, tiny=on_cpu):
        if options.kernel and not any(part in case.kernel for part in options.kernel):
            continue
        try:
            rows.append(run_case(case, options.device, ceilings, options.rounds))
        except RuntimeError as error:  # the others are still worth their time
            broken += 1
            print(f"{case.kernel} {case.shape}: {error}", file=sys.stderr, flush=True)
            continue
        finally:
            gc.collect()
            if not on_cpu:
                vt.cuda.empty_cache()
                torch.cuda.empty_cache()
        print(text_of(rows[-1]), flush=True)
    missed = sum(row["met"] is False for row in rows)
    print(f"{len(rows)} rows, {missed} goals missed, {broken} rows failed")
    if options.save:
        record = {**describe_run(vt.get_num_threads()), "ceilings": {
            "bandwidth": ceilings.bandwidth, "flops": ceilings.flops}, "kernels": rows}  # fmt: skip
        (RESULTS / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(broken > 0 or (missed > 0 and not on_cpu))


if __name__ == "__main__":
    raise SystemExit(main())
