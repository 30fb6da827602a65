"""An eager training step and memory-bound ops on a GPU, beside torch in the same run.

python bench/train_cuda.py [--save]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

import numpy as np
import torch
from side_by_side import median_times, report
from step_pair import step_pair
from workloads import WORKLOADS

import vibetensor.torch as vt


def synchronize() -> None:
    """Waits until the device is idle."""
    vt.cuda.synchronize()
    torch.cuda.synchronize()


def train_rows(steps: int) -> list[dict[str, Any]]:
    """The miniGPT step of both libraries, in turns."""
    pair = step_pair(WORKLOADS["minigpt"].full, "cuda", "bfloat16", 2e-2)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(0, steps, 5):
        for function, sink in zip(pair, times):
            function()
            synchronize()
            start = time.perf_counter()
            for _ in range(5):
                function()
            synchronize()
            sink.append((time.perf_counter() - start) / 5)
    return [
        {
            "case": "miniGPT L6 d384 T256 B64, bf16, eager",
            "vibetensor": statistics.median(times[0]) * 1e3,
            "torch": statistics.median(times[1]) * 1e3,
            "unit": "ms",
            "goal": 0.8,
        }
    ]


def bandwidth_rows() -> list[dict[str, Any]]:
    """Ops on 1 GiB of float32; the copy is the ceiling that the others are held to."""
    n = 1 << 28
    host = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    pairs = [(vt, vt.from_numpy(host).cuda()), (torch, torch.from_numpy(host).cuda())]
    # Bytes moved per element.
    cases: dict[str, tuple[Any, int]] = {
        "copy": (lambda t, a: t.empty_like(a).copy_, 8),
        "add": (lambda t, a: lambda: a + a, 8),
        "mul scalar": (lambda t, a: lambda: a * 1.5, 8),
        "gelu": (lambda t, a: lambda: t.nn.functional.gelu(a), 8),
        "sum": (lambda t, a: lambda: a.sum(), 4),
        "sum rows": (lambda t, a: lambda: a.view(-1, 4096).sum(1), 4),
        "sum columns": (lambda t, a: lambda: a.view(-1, 4096).sum(0), 4),
        "softmax": (lambda t, a: lambda: a.view(-1, 1024).softmax(-1), 8),
        "layer_norm": (
            lambda t, a: lambda: t.nn.functional.layer_norm(a.view(-1, 1024), (1024,)),
            8,
        ),
        "bf16 cast": (lambda t, a: lambda: a.to(t.bfloat16), 6),
    }
    rows = []
    ceiling = 0.0
    for name, (make, bytes_moved) in cases.items():
        ours, theirs = (make(t, a) for t, a in pairs)
        if name == "copy":
            ours, theirs = (functools.partial(f, a) for f, (_, a) in zip((ours, theirs), pairs))
        a, b = median_times(ours, theirs, 5, 9, sync=synchronize, through=True)
        rate = n * bytes_moved / a / 1e12
        ceiling = max(ceiling, rate if name == "copy" else 0)
        rows.append(
            {
                "case": f"1 GiB {name} ({rate:.2f} TB/s, {rate / ceiling:.0%} of copy)",
                "vibetensor": a * 1e3,
                "torch": b * 1e3,
                "unit": "ms",
                "limit": None if name == "copy" else n * bytes_moved / (0.85 * ceiling * 1e9),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50, help="timed training steps")
    parser.add_argument("--save", action="store_true", help="write bench/results/train_cuda.json")
    parser.add_argument("--only", choices=["train", "bandwidth"], help="one part")
    options = parser.parse_args()
    rows = []
    if options.only != "train":
        rows += bandwidth_rows()
    if options.only != "bandwidth":
        rows += train_rows(options.steps)
    return 0 if report("train_cuda", rows, 1, options.save) else 1


if __name__ == "__main__":
    raise SystemExit(main())
