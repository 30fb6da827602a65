"""Training steps and large-tensor ops on the CPU, beside torch in the same run, threads equal.

python bench/train_cpu.py [--threads 2] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from side_by_side import SETTLE, median_times, report
from step_pair import step_pair
from workloads.gpt import GPTConfig

import vibetensor.torch as vt

TURN = 5  # steps timed in a row

WORKLOADS = {  # and what their ratio to torch is held to
    "miniGPT L4 d128 T64 B12": (GPTConfig(4, 128, 4, 64, 12, 65), 0.7),
    "miniGPT L6 d384 T256 B4": (GPTConfig(6, 384, 6, 256, 4, 65), 1.0),
}


def train_rows(steps: int) -> list[dict[str, Any]]:
    rows = []
    for name, (config, goal) in WORKLOADS.items():
        pair = step_pair(config, "cpu", "float32", 1e-3)
        # In turns of a few steps: in training a step follows one of its own. A turn starts with a
        # pause and a step that is not timed, as the other library's threads spin for a while.
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(0, steps, TURN):
            for function, sink in zip(pair, times):
                time.sleep(SETTLE)
                function()
                for _ in range(TURN):
                    start = time.perf_counter()
                    function()
                    sink.append(time.perf_counter() - start)
        rows.append(
            {
                "case": name,
                "vibetensor": statistics.median(times[0]) * 1e3,
                "torch": statistics.median(times[1]) * 1e3,
                "unit": "ms",
                "goal": goal,
            }
        )
    return rows


AT_MEMORY_SPEED = ("16M sum", "16M sum rows", "16M max rows", "16M bf16 cast")


def op_rows() -> list[dict[str, Any]]:
    """Ops on 16M floats."""
    n = 1 << 24
    rows = []
    data = torch.randn(n)
    other = torch.randn(n)
    # The same numbers, each in memory of its own library.
    pairs = [(torch, data, other), (vt, vt.tensor(data.numpy()), vt.tensor(other.numpy()))]
    cases = {
        "16M add": lambda t, a, b: lambda: a + b,
        "16M mul scalar": lambda t, a, b: lambda: a * 1.5,
        "16M exp": lambda t, a, b: lambda: a.exp(),
        "16M tanh": lambda t, a, b: lambda: a.tanh(),
        "16M gelu": lambda t, a, b: lambda: t.nn.functional.gelu(a),
        "16M sum": lambda t, a, b: lambda: a.sum(),
        "16M sum rows": lambda t, a, b: lambda: a.view(4096, 4096).sum(1),
        "16M sum columns": lambda t, a, b: lambda: a.view(4096, 4096).sum(0),
        "16M max rows": lambda t, a, b: lambda: a.view(4096, 4096).amax(1),
        "16M softmax": lambda t, a, b: lambda: a.view(16384, 1024).softmax(-1),
        "16M layer_norm": lambda t, a, b: (
            lambda: t.nn.functional.layer_norm(a.view(16384, 1024), (1024,))
        ),
        "16M bf16 cast": lambda t, a, b: lambda: a.to(t.bfloat16),
    }
    for name, make in cases.items():
        theirs, ours = make(*pairs[0]), make(*pairs[1])
        # Where memory is all that both wait for, a few percent decide, and its speed has phases.
        rounds = 101 if name in AT_MEMORY_SPEED else 21
        a, b = median_times(ours, theirs, 20, rounds)
        rows.append(
            {"case": name, "vibetensor": a * 1e3, "torch": b * 1e3, "unit": "ms", "goal": 1.0}
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="timed training steps")
    parser.add_argument("--save", action="store_true", help="write bench/results/train_cpu.json")
    options = parser.parse_args()
    vt.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    rows = [*train_rows(options.steps), *op_rows()]
    return 0 if report("train_cpu", rows, options.threads, options.save) else 1


if __name__ == "__main__":
    raise SystemExit(main())
