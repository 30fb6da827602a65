"""varlen_attn on CUDA against the CPU in float64: windows, shared heads, widths, padding, capture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.graphs import capture
from vibetensor.torch.nn.attention.varlen import varlen_attn

TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def _run(operands: list[Any], cu: list[Any], window: tuple[int, int]) -> list[np.ndarray]:
    leaves = [x.detach().requires_grad_() for x in operands[:3]]
    out = varlen_attn(*leaves, *cu, 0, 0, window_size=window, enable_gqa=True)
    out.backward(operands[3])
    return [x.detach().double().cpu().numpy() for x in (out, *(leaf.grad for leaf in leaves))]


def _operands(tq: int, tk: int, heads: int, key_heads: int, d: int, dtype: str) -> list[Any]:
    rng = np.random.default_rng(tq + d)
    shapes = [(tq, heads, d), (tk, key_heads, d), (tk, key_heads, d), (tq, heads, d)]
    return [torch.tensor(rng.standard_normal(s)).to(getattr(torch, dtype)).double() for s in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [1, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (0, 0), (33, 2), (-1, 7), (200, -1)])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_against_float64(dtype: str, d: int, window: tuple[int, int], key_heads: int) -> None:
    q_lengths, k_lengths = [70, 0, 130, 5, 3, 0], [70, 3, 90, 50, 0, 0]
    cu = [torch.tensor(np.cumsum([2, *n]).astype(np.int32)) for n in (q_lengths, k_lengths)]
    operands = _operands(sum(q_lengths) + 5, sum(k_lengths) + 5, 4, key_heads, d, dtype)
    there = [x.to(getattr(torch, dtype)).cuda() for x in operands]
    want = _run(operands, cu, window)
    got = _run(there, [c.cuda() for c in cu], window)
    for a, b in zip(got, want, strict=True):
        atol = TOLERANCE[dtype] * max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=atol)


def test_slices_of_one_projection_between_nan() -> None:
    operands = _operands(50, 50, 2, 2, 64, "float32")
    around = torch.full((52, 5, 2, 64), float("nan"), device="cuda")
    there = [around[1:-1, i] for i in range(4)]
    for place, x in zip(there, operands, strict=True):
        place.copy_(x)
    cu = torch.tensor([0, 20, 50])
    for a, b in zip(
        _run(there, [cu.cuda(), cu.cuda()], (9, 0)), _run(operands, [cu, cu], (9, 0)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_starts_are_read_in_each_replay() -> None:
    operands = [x.float().cuda() for x in _operands(40, 40, 2, 2, 64, "float32")]

    def step(q: Any, k: Any, v: Any, cu: Any) -> Any:
        return varlen_attn(q, k, v, cu, cu, 40, 40, window_size=(8, 0))

    captured = capture(step)
    for starts in ([0, 10, 40], [0, 10, 40], [0, 39, 40], [0, 0, 40], [0, 20, 30]):
        cu = torch.tensor(starts, dtype=torch.int32, device="cuda")
        assert (captured(*operands[:3], cu) == step(*operands[:3], cu)).all()


def test_starts_out_of_range_stay_within_memory() -> None:
    operands = [x.float().cuda() for x in _operands(30, 30, 1, 1, 64, "float32")]
    cu = torch.tensor([-5, 12, 900], dtype=torch.int32, device="cuda")
    out = varlen_attn(*operands[:3], cu, cu, 30, 30)
    want = varlen_attn(*operands[:3], *[torch.tensor([0, 12, 30], device="cuda")] * 2, 30, 30)
    assert (out == want).all()


def test_wide_heads_are_refused() -> None:
    x = torch.randn(4, 1, 257, device="cuda")
    cu = torch.tensor([0, 4], device="cuda")
    with pytest.raises(RuntimeError, match="256"):
        varlen_attn(x, x, x, cu, cu, 4, 4)
