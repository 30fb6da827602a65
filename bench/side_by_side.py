"""What the benchmarks share: interleaved timing, and results with everything needed to repeat them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quiet_core import QuietCore

RESULTS = Path(__file__).parent / "results"
SETTLE = 0.02  # seconds in which the threads of the library timed before go to sleep


def median_times(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    calls: int,
    rounds: int = 15,
    sync: Callable[[], None] | None = None,
    through: bool = False,
    core: QuietCore | None = None,
) -> tuple[float, float]:
    """Median seconds a call of both, measured in alternating rounds of `calls` calls.

    A round starts with a pause and a call that is not timed: the other's threads spin for a while
    after their last call, on the cores that this round needs. `sync` empties a device's queue before a round;
    with `through` the round's time includes the device's work, else the calls alone. `core`: rounds that
    it finds disturbed are repeated.
    """
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):  # warm up
        for _ in range(max(calls // 10, 1)):
            ours()
            theirs()

    def one_round(function: Callable[[], Any]) -> float:
        function()
        if sync:
            sync()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if sync and through:
            sync()
        return (time.perf_counter() - start) / calls

    for _ in range(rounds):
        for function, sink in zip((ours, theirs), samples):
            time.sleep(SETTLE)
            sink.append(
                core.measure(lambda f=function: one_round(f)) if core else one_round(function)
            )
    return statistics.median(samples[0]), statistics.median(samples[1])


def processor() -> str:
    """The processor's name as Linux gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu() -> dict[str, Any]:
    """The GPU, its driver and the CUDA runtime; nothing without one."""
    import vibetensor.torch as vt

    if not vt.cuda.is_available():
        return {}
    from vibetensor import _cuda  # pyright: ignore

    return {
        "gpu": vt.cuda.get_device_name(),
        "driver": _cuda.driver_version(),
        "cuda": _cuda.runtime_version(),
    }


def commit() -> str:
    """The checkout's commit, with + if it has changes."""
    try:
        root = Path(__file__).parent
        rev = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return rev + ("+" if dirty.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def launch_time() -> dict[str, float]:
    """What the driver takes of the host for one launch of an empty kernel by itself, in
    microseconds. Nothing without a GPU."""
    import vibetensor.torch as vt

    if not vt.cuda.is_available():
        return {}
    from vibetensor import _cuda  # pyright: ignore

    code, _ = _cuda.nvrtc_compile(
        'extern "C" __global__ void empty() {}', "empty.cu", _cuda.architecture_of(0), []
    )
    return {"launch_us": _cuda.Module(code).launch_seconds("empty", 200, 41) * 1e6}


def describe_run(threads: int, core: QuietCore | None = None) -> dict[str, Any]:
    """What is needed to repeat a run: command, commit, machine, versions; and how quiet it was, where
    rounds were taken on `core`."""
    import torch

    import vibetensor as vt

    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "vibetensor": vt.__version__,
        "torch": torch.__version__,
        "isa": vt._C._cpu_capability(),
        **gpu(),
        **(core.measure(launch_time) if core else launch_time()),
        **({"disturbed_rounds": core.disturbed} if core else {}),
    }


def goal_of(row: dict[str, Any]) -> tuple[str, bool]:
    """What a row asks for, "" for nothing, and whether that is met. It has either a `limit` of
    vibetensor's time, in the row's unit, or a `goal` for the ratio to torch's."""
    goal, limit = row.get("goal"), row.get("limit")
    if limit is not None:
        return f"≤ {limit:.3g} {row['unit']}", row["vibetensor"] <= limit
    if goal is not None:
        return f"≤ {goal}x", row["ratio"] <= goal
    return "", True


def report(
    name: str, rows: list[dict[str, Any]], threads: int, save: bool, core: QuietCore | None = None
) -> bool:
    """Prints the table and, if asked, writes results/NAME.json. True if every goal is met. Rows without
    torch's time stand alone. core: that the rounds were taken on."""
    width = max(len(r["case"]) for r in rows)
    met = True
    for r in rows:
        beside = ""
        if "torch" in r:
            r["ratio"] = round(r["vibetensor"] / r["torch"], 3)
            beside = f"torch {r['torch']:>10.4g} {r['unit']}  {r['ratio']:.2f}x"
        asked, ok = goal_of(r)
        met &= ok
        note = f"  goal {asked} {'met' if ok else 'MISSED'}" if asked else ""
        print(f"{r['case']:<{width}}  {r['vibetensor']:>10.4g} {r['unit']}  {beside}{note}")
    if core:
        print(f"rounds on a core that others used: {core.disturbed}")
    if save:
        RESULTS.mkdir(exist_ok=True)
        record = {**describe_run(threads, core), "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return met
