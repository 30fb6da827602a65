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
    assert torch.cuda.nvtx.range_push("outer") == 0
    assert torch.cuda.nvtx.range_pop() == 0
