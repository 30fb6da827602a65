"""Cost of a call on tiny tensors, beside torch in the same run.

python bench/overhead.py [--device cuda] [--save]

On a GPU the limits are in microseconds of the host, so that rounds are taken on cores that nobody else
keeps busy (quiet_core.py); how many had to be taken elsewhere is printed and saved.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from quiet_core import QuietCore
from side_by_side import median_times, report

import vibetensor.torch as vt

# On the CPU the goal is a ratio to torch; on a GPU, where the driver's launch is most of a call,
# it is in microseconds.
GOALS = {
    "a + b": 0.5,
    "a + b, with grad": 0.5,
    "a.view(3)": 0.4,
    "empty(3)": 0.5,
    "(a * b).sum().backward()": 0.4,
}
CUDA_LIMITS = {
    "a + b": 2.5,
    "a + b, with grad": 3,
    "a += b": 2.2,
    "mm 64x64": 6,
    "a.view(3)": 0.5,
    "empty(3)": 0.7,
    "(a * b).sum().backward()": 25,
}


def cases(library: Any, device: str) -> dict[str, Any]:
    """The calls, as closures over one library's tensors."""

    def draw(*size: int) -> Any:
        return library.randn(*size).to(device)

    a, b = draw(3), draw(3)
    ga, gb = draw(3).requires_grad_(), draw(3).requires_grad_()
    m, n = draw(64, 64), draw(64, 64)
    empty = library.empty if device == "cpu" else lambda n: library.empty(n, device=device)
    return {
        "a + b": lambda: a + b,
        "a + b, with grad": lambda: ga + gb,
        "a += b": lambda: a.add_(b),
        "a * 2.0": lambda: a * 2.0,
        "a.view(3)": lambda: a.view(3),
        "a[1]": lambda: a[1],
        "a.sum()": lambda: a.sum(),
        "empty(3)": lambda: empty(3),
        "mm 64x64": lambda: m @ n,
        "(a * b).sum().backward()": lambda: (ga * gb).sum().backward(),
    }


def synchronize() -> None:
    """Waits until the device is idle, so that rounds start with an empty queue."""
    vt.cuda.synchronize()
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/overhead[_DEVICE].json"
    )
    parser.add_argument("--device", default="cpu", help="where the tensors are")
    parser.add_argument("--calls", type=int, default=20000, help="calls a round")
    options = parser.parse_args()
    vt.set_num_threads(1)
    torch.set_num_threads(1)
    on_cpu = options.device == "cpu"
    ours, theirs = cases(vt, options.device), cases(torch, options.device)
    rows = []
    core = None
    if not on_cpu:
        for call in (*ours.values(), *theirs.values()):  # starts the threads of both
            call()
        core = QuietCore()
    for name in ours:
        calls = options.calls // (10 if "backward" in name or "mm" in name else 1)
        if not on_cpu:
            calls //= 20  # a round must fit the launch queue, or the device's pace is measured
        sync = None if on_cpu else synchronize
        a, b = median_times(ours[name], theirs[name], calls, sync=sync, core=core)
        rows.append(
            {
                "case": name,
                "vibetensor": a * 1e6,
                "torch": b * 1e6,
                "unit": "us",
                "goal": GOALS.get(name) if on_cpu else None,
                "limit": None if on_cpu else CUDA_LIMITS.get(name),
            }
        )
    name = "overhead" if on_cpu else f"overhead_{options.device}"
    return 0 if report(name, rows, 1, options.save, core) else 1


if __name__ == "__main__":
    raise SystemExit(main())
