"""Cost of a call on tiny tensors, beside torch in the same run.

python bench/overhead.py [--save]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from side_by_side import median_times, report

import vibetensor.torch as vt

GOALS = {
    "a + b": 0.5,
    "a + b, with grad": 0.5,
    "a.view(3)": 0.4,
    "empty(3)": 0.5,
    "(a * b).sum().backward()": 0.4,
}


def cases(library: Any) -> dict[str, Any]:
    """The calls, as closures over one library's tensors."""
    a, b = library.randn(3), library.randn(3)
    ga, gb = library.randn(3).requires_grad_(), library.randn(3).requires_grad_()
    m, n = library.randn(64, 64), library.randn(64, 64)
    empty = library.empty
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write bench/results/overhead.json")
    parser.add_argument("--calls", type=int, default=20000, help="calls a round")
    options = parser.parse_args()
    vt.set_num_threads(1)
    torch.set_num_threads(1)
    ours, theirs = cases(vt), cases(torch)
    rows = []
    for name in ours:
        calls = options.calls // (10 if "backward" in name or "mm" in name else 1)
        a, b = median_times(ours[name], theirs[name], calls)
        rows.append(
            {
                "case": name,
                "vibetensor": a * 1e6,
                "torch": b * 1e6,
                "unit": "us",
                "goal": GOALS.get(name),
            }
        )
    return 0 if report("overhead", rows, 1, options.save) else 1


if __name__ == "__main__":
    raise SystemExit(main())
