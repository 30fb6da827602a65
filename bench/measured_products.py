"""Captured training steps with and without measured algorithms of cuBLASLt, by turns in one process.

python bench/measured_products.py [--workload minigpt ...] [--table FILE] [--steps 20] [--turns 11]

--table: rows to read before the step with them is captured, as tune.py --workload writes them; by default
those that were compiled in. The two steps have models of their own from the same state, so that memory
for both is needed (llama1b: 100 GB).
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
from train_process import Clock, build
from workloads import WORKLOADS

import vibetensor.torch as vt
from vibetensor.torch.cuda import _backend, tunable


def captured(name: str, batches: list[Any]) -> tuple[Any, list[float]]:
    """The workload's step once it is replayed, and its losses until then."""
    workload = WORKLOADS[name]
    options = {"workload": name, "scale": "full", "device": "cuda", "mode": "capture",
               "dtype": workload.dtype}  # fmt: skip
    vt.manual_seed(0)
    step, steady = build(options, vt)
    losses = [step(*batch)[0].item() for batch in batches]
    if not steady():
        raise RuntimeError(f"{name}: the step was not captured")
    return step, losses


def compare(name: str, table: str | None, steps: int, turns: int) -> None:
    """Prints the median milliseconds of a step, without rows and with them."""
    workload = WORKLOADS[name]
    rng = np.random.default_rng(0)
    batches = [
        tuple(vt.from_numpy(a).cuda() for a in workload.batch(workload.config("full"), rng))
        for _ in range(6)
    ]
    tunable.enable(False)
    without, first_losses = captured(name, batches)
    tunable.enable(True)
    if table:
        tunable.read_file(table)
    with_rows, losses = captured(name, batches)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        pairs = list(zip((without, with_rows), times))
        for step, sink in pairs if turn % 2 == 0 else reversed(pairs):
            step(*batches[0])
            clock = Clock(vt, "cuda")
            clock.mark()
            for i in range(steps):
                step(*batches[i % len(batches)])
                clock.mark()
            sink.append(statistics.median(clock.times()))
    a, b = (statistics.median(t) for t in times)
    lower = sum(y < x for x, y in zip(*times))
    print(f"{name}: {a:.3f} ms without rows, {b:.3f} with ({a - b:+.3f} ms less, {a / b - 1:+.1%}; "
          f"lower in {lower} of {turns} turns)", flush=True)  # fmt: skip
    print(f"  losses {' '.join(f'{x:.4f}' for x in first_losses)}\n"
          f"         {' '.join(f'{x:.4f}' for x in losses)}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", action="append", choices=sorted(WORKLOADS))
    parser.add_argument("--table", help="a table of rows; default: those compiled in")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=11, help="turns of both steps")
    given = parser.parse_args()
    if not vt.cuda.is_available():
        raise SystemExit("this needs a GPU that this build of vibetensor can use")
    print(f"{vt.cuda.get_device_name()}, cuBLASLt {_backend.required().cublaslt_version()}")
    for name in given.workload or ("minigpt", "vit", "gpt2"):
        compare(name, given.table, given.steps, given.turns)
        vt.cuda.empty_cache()


if __name__ == "__main__":
    main()
