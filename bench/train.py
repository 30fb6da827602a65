"""Whole training steps: each workload eager and captured, beside torch's ways of running it.

python bench/train.py --workload minigpt,vit --mode eager,capture --peer torch:eager,graph,compile
python bench/train.py --device cpu --scale small

The same model (bench/workloads), the same weights, the same fresh random data at every step, one
process for each run. Losses and gradient norms of the first steps are compared, so that all runs are
known to do the same work. torch runs as its documentation recommends: fused optimizer, gradients set
to None, torch.compile of the model, and the whole step recorded in a CUDA graph after a few steps on a
side stream (graph, compile+graph: on a GPU only). Step times are medians over --steps, in the fastest of
--rounds processes, which take turns; "first" is the time from the first call to the end of the first
step in its steady form. "nodes" are kernels, copies and fills of a captured step's graph, beside those of
the same step as it was recorded, without the passes: what eager gives to the driver.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import RESULTS, describe_run
from workloads import SCALES, WORKLOADS

MODES = ("eager", "capture")
PEER_MODES = ("eager", "graph", "compile", "compile+graph")
# How far losses and gradient norms may lie apart, relative to their size: both libraries round as
# the dtype does, in orders of their own.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


def run_one(options: dict[str, Any], timeout: float) -> dict[str, Any]:
    """One process; what it measured, or {"error": its last line}."""
    with tempfile.TemporaryDirectory() as cache:
        # torch.compile starts without what earlier runs have kept.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        process = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("train_process.py")),
                json.dumps(options),
            ],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
        )
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
    return {"error": lines[-1], "stderr": process.stderr}


def quietest(
    runs: list[tuple[str, str]], options: dict[str, Any], rounds: int, timeout: float
) -> list[dict[str, Any]]:
    """What each run measured in the process with the smallest median; an error ends a run's rounds."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(rounds):
        for library, mode in runs:
            before = found.get((library, mode), {})
            if "error" in before:
                continue
            result = run_one({**options, "library": library, "mode": mode}, timeout)
            if not before or "error" in result or result["ms"] < before["ms"]:
                found[(library, mode)] = result
    return [found[run] for run in runs]


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest relative difference of two runs' losses and gradient norms."""
    pairs = zip(a["losses"], b["losses"])
    return max(abs(x - y) / max(abs(y), 1e-6) for p, q in pairs for x, y in zip(p, q))


def runs_of(modes: list[str], peers: list[str], device: str) -> list[tuple[str, str]]:
    """(library, mode) in order; torch's graph modes need a GPU."""
    runs = [("vibetensor", mode) for mode in modes]
    for mode in peers:
        if "graph" in mode and device != "cuda":
            print(f"torch {mode}: CUDA graphs need --device cuda; left out")
        else:
            runs.append(("torch", mode))
    return runs


def measure(name: str, runs: list[tuple[str, str]], options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one workload, as a record for the results."""
    workload = WORKLOADS[name]
    config = workload.config(options.scale)
    dtype = options.dtype or (workload.dtype if options.device == "cuda" else "float32")
    print(f"\n{name}: {config}, {dtype}, {options.device}")
    rows: list[dict[str, Any]] = []
    reference = None
    process_options = {
        "workload": name, "scale": options.scale, "device": options.device, "dtype": dtype,
        "threads": options.threads, "check": options.check, "steps": options.steps,
    }  # fmt: skip
    results = quietest(runs, process_options, options.rounds, options.timeout)
    for (library, mode), result in zip(runs, results):
        row: dict[str, Any] = {"library": library, "mode": mode}
        if "error" in result:
            row["error"] = result["error"]
            print(f"  {library:>10} {mode:<13} FAILED: {result['error']}")
            if options.verbose:
                print(result["stderr"])
        else:
            reference = reference or result
            row |= {
                "ms": round(result["ms"], 4),
                "first_s": round(result["first_s"], 3),
                "peak_bytes": result["peak_bytes"],
                "difference": difference(result, reference),
                **({"capture": result["capture"]} if "capture" in result else {}),
            }
            print(
                f"  {library:>10} {mode:<13} {row['ms']:>9.3f} ms  first {row['first_s']:>6.2f} s  "
                f"peak {row['peak_bytes'] / 2**20:>8.0f} MiB  losses within {row['difference']:.1e}"
            )
            if "capture" in row:
                c = row["capture"]
                excess = c["arena_bytes"] / max(c["lower_bound"], 1) - 1
                print(
                    f"             {c['ops']} ops of {c['recorded']} recorded, arena "
                    f"{c['arena_bytes']:,} bytes, {excess:.2%} above the bound"
                )
                if "nodes" in c:
                    print(f"             {nodes(c)}")
            if row["difference"] > TOLERANCE[dtype]:
                row["error"] = f"losses differ by {row['difference']:.1e} from the first run's"
                print(f"  {row['error']}")
        rows.append(row)
    return {
        "workload": name, "shape": str(config), "dtype": dtype, "samples": config.samples, "runs": rows
    }  # fmt: skip


def nodes(capture: dict[str, Any]) -> str:
    """The nodes of a captured step's graph, by kind, and those without the passes."""
    now, before = capture["nodes"], capture["nodes_recorded"] or {}
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(now.items()))
    text = f"{sum(now.values())} nodes ({kinds})"
    if not before:
        return text
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(before.items()))
    ratio = sum(before.values()) / sum(now.values())
    return f"{text} of {sum(before.values())} recorded ({kinds}): {ratio:.2f}x fewer"


def save(path: Path, record: dict[str, Any]) -> None:
    """Writes the results; workloads and dtypes that the same commit was measured for before, on the same
    machine, stay beside them."""
    if path.exists():
        old = json.loads(path.read_text())
        same = ("commit", "processor", "cores", "threads", "torch", "gpu")
        if all(old.get(key) == record.get(key) for key in same):
            steps = (*old["steps"], *record["steps"])
            merged = {(each["workload"], each["dtype"]): each for each in steps}
            commands = dict.fromkeys((*old["command"].split("; "), record["command"]))
            record = {**record, "steps": list(merged.values()), "command": "; ".join(commands)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def listed(known: Any, prefix: str = "") -> Any:
    """An argument type: names separated by commas, or "all"; after an optional prefix."""

    def parse(text: str) -> list[str]:
        names = text.removeprefix(prefix)
        chosen = list(known) if names == "all" else [n for n in names.split(",") if n != "none"]
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return chosen

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", type=listed(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--mode", type=listed(MODES), default=list(MODES))
    parser.add_argument(
        "--peer", type=listed(PEER_MODES, "torch:"), default=list(PEER_MODES), metavar="torch:MODES"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument(
        "--dtype", choices=list(TOLERANCE), help="default: the workload's; CPU float32"
    )
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument(
        "--check", type=int, default=10, help="steps before, whose losses are compared"
    )
    parser.add_argument("--rounds", type=int, default=1, help="processes of each run, in turns")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--verbose", action="store_true", help="show how a run failed")
    parser.add_argument("--save", action="store_true", help="write bench/results/steps_DEVICE.json")
    options = parser.parse_args()
    runs = runs_of(options.mode, options.peer, options.device)
    records = [measure(name, runs, options) for name in options.workload]
    if options.save:
        name = f"steps_{options.device}" + ("" if options.scale == "full" else f"_{options.scale}")
        record = {**describe_run(options.threads), "scale": options.scale, "steps": records}
        save(RESULTS / f"{name}.json", record)
    return int(any("error" in row for record in records for row in record["runs"]))


if __name__ == "__main__":
    raise SystemExit(main())
