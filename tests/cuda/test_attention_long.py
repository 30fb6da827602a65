"""Attention of whole tiles of 128 rows of 64 16-bit floats, the shapes of Hopper's kernels, forward and
backward, against float64. Elsewhere the same calls go to other kernels, and the tests hold as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor.graphs import capture
from vibetensor.torch.nn.attention import SDPBackend, sdpa_kernel

OURS = SDPBackend.FLASH_ATTENTION


def _poison() -> None:
    """Leaves NaN in the memory that outputs and scratch will get."""
    tensors = [torch.full((1 << n,), float("nan"), device="cuda") for n in range(12, 26)]
    del tensors


def _reference(operands: list[Any], causal: bool, scale: float) -> list[np.ndarray]:
    """Output and gradients of query, key and value, in float64."""
    q, k, v, g = (x.double().cpu().numpy() for x in operands)
    sharing = q.shape[1] // k.shape[1]
    k, v = k.repeat(sharing, 1), v.repeat(sharing, 1)
    scores = q @ k.swapaxes(-1, -2) * scale
    if causal:
        scores[..., ~np.tri(q.shape[2], dtype=bool)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = p @ v
    dp = g @ v.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale

    def shared(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], -1, sharing, *x.shape[2:]).sum(2)

    return [out, ds @ k, shared(ds.swapaxes(-1, -2) @ q), shared(p.swapaxes(-1, -2) @ g)]


def _run(operands: list[Any], causal: bool, scale: float | None = None) -> list[np.ndarray]:
    _poison()
    leaves = [x.detach().requires_grad_() for x in operands[:3]]
    gqa = operands[0].shape[1] != operands[1].shape[1]
    y = F.scaled_dot_product_attention(*leaves, is_causal=causal, scale=scale, enable_gqa=gqa)
    y.backward(operands[3])
    results = [y.detach(), *(leaf.grad for leaf in leaves)]
    return [x.double().cpu().numpy() for x in results]


def _check(actual: list[np.ndarray], expected: list[np.ndarray], dtype: Any) -> None:
    # Weights, slopes, the output that slopes are centred by and results are rounded once each; sums
    # are in float32.
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    for a, e in zip(actual, expected):
        error = np.abs(a - e)
        assert error.max() <= 3 * rounding * np.abs(e).max()
        assert np.sqrt((error**2).mean()) <= rounding * np.sqrt((e**2).mean())


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("b", "heads", "key_heads", "t"),
    [
        (1, 1, 1, 256),
        (2, 3, 3, 384),  # an odd number of tiles
        (1, 8, 2, 640),
        (1, 2, 1, 1024),
        (12, 12, 12, 256),  # more heads than an H200 has multiprocessors
        (3, 64, 16, 256),
    ],
)
def test_against_float64(
    b: int, heads: int, key_heads: int, t: int, dtype: Any, causal: bool
) -> None:
    """Operands between NaN: what is read beyond a row, a head or a batch shows. Bits repeat."""
    torch.manual_seed(t)
    counts = [heads, key_heads, key_heads, heads]
    around = torch.full((b, t + 2, sum(counts) + 2, 64), float("nan"), device="cuda").to(dtype)
    operands, at = [], 1
    for count in counts:
        operand = around[:, 1:-1, at : at + count].transpose(1, 2)
        operand.copy_(torch.randn(b, count, t, 64, device="cuda").to(dtype))
        operands.append(operand)
        at += count
    with sdpa_kernel(OURS):
        actual, again = _run(operands, causal), _run(operands, causal)
    _check(actual, _reference(operands, causal, 1 / 8), dtype)
    for a, r in zip(actual, again):
        assert np.array_equal(a, r)


@pytest.mark.parametrize("shape", [(32, 12, 12, 1024), (8, 32, 8, 2048)], ids=str)
def test_models_shapes(shape: tuple[int, int, int, int]) -> None:
    """The layouts of GPT-2 and Llama, by whichever kernels are faster: three heads of all against
    float64, and bits that repeat."""
    b, heads, key_heads, t = shape
    torch.manual_seed(0)
    qkv = torch.randn(b, t, heads + 2 * key_heads, 64, device="cuda").to(torch.bfloat16)
    g = torch.randn(b, t, heads, 64, device="cuda").to(torch.bfloat16).transpose(1, 2)
    parts = [x.transpose(1, 2) for x in qkv.split([heads, key_heads, key_heads], 2)]
    actual = _run([*parts, g], True)
    sharing = heads // key_heads
    for batch, kv in ((0, 0), (b // 2, key_heads // 2), (b - 1, key_heads - 1)):
        rows, key_rows = slice(kv * sharing, (kv + 1) * sharing), slice(kv, kv + 1)
        cut = [rows, key_rows, key_rows, rows]
        operands = [x[batch : batch + 1, c] for x, c in zip([*parts, g], cut)]
        got = [x[batch : batch + 1, c] for x, c in zip(actual, [rows, rows, key_rows, key_rows])]
        _check(got, _reference(operands, True, 1 / 8), torch.bfloat16)


@pytest.mark.parametrize("scale", [0.0, -0.25, 40.0])
def test_scales(scale: float) -> None:
    torch.manual_seed(1)
    operands = [torch.randn(1, 2, 256, 64, device="cuda").to(torch.bfloat16) for _ in range(4)]
    with sdpa_kernel(OURS):
        actual = _run(operands, True, scale)
    for a, e in zip(actual, _reference(operands, True, scale)):
        assert np.abs(a - e).max() <= 5e-2 * max(np.abs(e).max(), 1e-3)


def test_numbers_without_end() -> None:
    """Scores of -inf give zeros; a NaN stays in its own head's rows."""
    q = torch.ones(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.full_like(q, float("-inf"))
    with sdpa_kernel(OURS), torch.no_grad():
        assert (F.scaled_dot_product_attention(q, k, q).float().cpu().numpy() == 0).all()
        q[0, 1, 200, 3] = float("nan")
        y = F.scaled_dot_product_attention(q, q, torch.ones_like(q), is_causal=True)
    seen = np.isnan(y.float().cpu().numpy())
    assert seen[0, 1, 200:].all() and not seen[0, 0].any() and not seen[0, 1, :200].any()


def test_in_a_captured_step() -> None:
    """Gradients go to slices of one tensor, and a replay has the bits of the step outside."""
    torch.manual_seed(2)
    x = torch.randn(4, 256, 3 * 40 * 64, device="cuda").to(torch.bfloat16)

    def step(x: Any) -> tuple[Any, Any]:
        leaf = (x * 1).requires_grad_()
        q, k, v = (z.view(4, 256, 40, 64).transpose(1, 2) for z in leaf.split(40 * 64, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.float().square().sum().backward()
        return y * 1, leaf.grad * 1

    with sdpa_kernel(OURS):
        expected = [r.detach().float().cpu().numpy() for r in step(x)]
        captured = capture(step)
        for _ in range(3):
            for a, e in zip(captured(x), expected):
                assert np.array_equal(a.detach().float().cpu().numpy(), e)
