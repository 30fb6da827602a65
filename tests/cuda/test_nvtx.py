"""Ranges of ops around the launches of a captured step, where NVIDIA's library is there."""

from __future__ import annotations

import pytest

import vibetensor.torch as torch
from vibetensor.graphs import capture


def test_marked_steps_are_the_same() -> None:
    if not torch.cuda.nvtx.is_available():
        pytest.skip("needs the package nvidia-nvtx")
    x = torch.ones(4, 4, device="cuda")
    expected = ((x @ x).tanh() + 1).cpu().tolist()
    with torch.cuda.nvtx.op_ranges():
        step = capture(lambda x: (x @ x).tanh() + 1)
        for _ in range(4):
            assert step(x).cpu().tolist() == expected


def test_depths_of_ranges() -> None:
    """From 0 where a profiler is attached; without one the library keeps none, and says so by a
    negative number."""
    nvtx = torch.cuda.nvtx
    pushed = [nvtx.range_push(name) for name in ("outer", "inner")]
    popped = [nvtx.range_pop(), nvtx.range_pop()]
    assert all(type(depth) is int for depth in (*pushed, *popped))
    if pushed[0] >= 0:
        assert pushed == [0, 1] and popped == [1, 0]
    else:
        assert max(*pushed, *popped) < 0
