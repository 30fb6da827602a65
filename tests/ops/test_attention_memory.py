"""Attention keeps no matrix of scores: its memory grows with the length, not with its square."""

from __future__ import annotations

import pytest

import vibetensor.torch as torch
from tests.device import DEVICE
from vibetensor import _C
from vibetensor.torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counts the CPU's bytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["plain", "causal", "grouped", "dropout"])
def test_no_matrix_of_scores(case: str, dtype: torch.dtype) -> None:
    length, heads, width = 3000, 2, 8
    query = torch.randn(1, heads, length, width, dtype=dtype, requires_grad=True)
    shape = (1, 1 if case == "grouped" else heads, length, width)
    key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "grouped": {"enable_gqa": True, "is_causal": True},
        "dropout": {"dropout_p": 0.1},
    }[case]

    def step() -> None:
        out = scaled_dot_product_attention(query, key, value, **options)
        (out.float() * 2).sum().backward()

    step()  # gradients are there, and what threads keep for themselves
    before = _C._cpu_memory_stats()["allocated_bytes"]
    _C._cpu_reset_peak_memory()
    step()
    peak = _C._cpu_memory_stats()["peak_bytes"] - before
    row = heads * length * width * 4  # one float32 of each element of the query
    assert 0 < peak < 20 * row
    assert 20 * row < heads * length * length * 4 / 8
