"""Attention on CUDA: gradients in slices of one tensor, as a captured step writes them, with and
without cuDNN and where operands are empty; short sequences of every length; float32 on tensor
cores. Against the CPU in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor.graphs import capture
from vibetensor.torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN, OURS = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


def _run(operands: list[Any], **options: Any) -> list[Any]:
    """Attention of queries, keys and values, and their gradients by the fourth operand."""
    leaves = [x.detach().requires_grad_() for x in operands[:3]]
    y = F.scaled_dot_product_attention(*leaves, **options)
    y.backward(operands[3])
    return [y, *(leaf.grad for leaf in leaves)]


def _between_nan(values: list[Any]) -> list[Any]:
    """The same on the device, in one tensor of NaN: what is read beyond a row, a head or a batch shows."""
    b, heads, t, width = values[0].shape
    around = torch.full((b, t + 2, 6, heads, width), float("nan"), device="cuda")
    around = around.to(values[0].dtype)
    operands = [around[:, 1:-1, i + 1].transpose(1, 2) for i in range(4)]
    for operand, value in zip(operands, values):
        operand.copy_(value.cuda())
    return operands


def _split(qkv: Any, heads: int) -> list[Any]:
    b, t, width = qkv.shape
    return [z.view(b, t, heads, -1).transpose(1, 2) for z in qkv.split(width // 3, dim=2)]


def _slices(qkv: Any, heads: int) -> list[Any]:
    b, t, width = qkv.shape
    return qkv.reshape(b, t, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("kernels", [CUDNN, OURS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("parts", [_split, _slices])
@pytest.mark.parametrize(
    ("b", "t", "heads", "d", "causal"),
    [(4, 256, 3, 64, True), (8, 65, 2, 64, False), (2, 130, 2, 128, True), (2, 9, 3, 5, True)],
)
def test_gradients_of_a_projection(
    b: int, t: int, heads: int, d: int, causal: bool, parts: Any, dtype: Any, kernels: SDPBackend
) -> None:
    torch.manual_seed(t)
    width = heads * d
    x = torch.randn(b, t, 3 * width).to(dtype)
    weight = torch.randn(b, t, width).to(dtype)

    def step(x: Any, weight: Any) -> Any:
        leaf = (x * 1).requires_grad_()
        y = F.scaled_dot_product_attention(*parts(leaf * 1, heads), is_causal=causal)
        (y.transpose(1, 2).reshape(b, t, width) * weight).sum().backward()
        return leaf.grad * 1

    expected = step(x.double(), weight.double()).numpy()
    captured = capture(step)
    with sdpa_kernel(kernels):
        for _ in range(2):
            actual = captured(x.cuda(), weight.cuda()).double().cpu().numpy()
            error = np.abs(actual - expected).max() / np.abs(expected).max()
            assert error < {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}[dtype]
    tape = captured.variants[0].tape
    names = [op.name for op in tape.ops if not op.is_view]
    assert "cat" not in names and "clone" not in names, names


def test_gradients_without_keys_are_zeros_between_others() -> None:
    grads = torch.full((2, 3, 3, 2, 8), 7.0, device="cuda")
    q = torch.randn(2, 2, 3, 8, device="cuda")
    empty = torch.randn(2, 2, 0, 8, device="cuda")

    def step(q: Any, empty: Any) -> Any:
        leaf = (q * 1).requires_grad_()
        y = F.scaled_dot_product_attention(leaf, empty, empty)
        y.sum().backward()
        grads[:, :, 1].copy_(leaf.grad.transpose(1, 2))
        return y * 1

    capture(step)(q, empty)
    seen = grads.cpu().numpy()
    assert (seen[:, :, 1] == 0).all() and (seen[:, :, ::2] == 7).all()


LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 80, 81, 127, 128, 129, 192, 200, 255, 256, 257]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("t", LENGTHS)
def test_heads_of_every_length(t: int, width: int, dtype: Any, causal: bool) -> None:
    """Heads between NaN: what is read beyond a row, a head or a batch shows. Bits repeat."""
    b, heads = 2, 3
    torch.manual_seed(t)
    values = [torch.randn(b, heads, t, width).to(dtype) for _ in range(4)]

    expected = _run([x.double() for x in values], is_causal=causal)
    operands = _between_nan(values)
    with sdpa_kernel(OURS):
        actual, again = (_run(operands, is_causal=causal) for _ in range(2))
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-3
    scale = max(e.detach().abs().max().item() for e in expected[1:])
    for a, r, e in zip(actual, again, expected):
        a, r = (x.detach().double().cpu().numpy() for x in (a, r))
        assert np.array_equal(a, r)
        np.testing.assert_allclose(a, e.detach().numpy(), rtol=bound, atol=bound * min(scale, 1))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("width", [4, 16, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("t", [1, 15, 16, 17, 80, 129, 257])
def test_float32_heads(t: int, width: int, causal: bool) -> None:
    """Between NaN, as exact as float32: the bound is far below what TF32 would give (1e-3)."""
    b, heads = 2, 3
    torch.manual_seed(t)
    values = [torch.randn(b, heads, t, width) for _ in range(4)]

    expected = _run([x.double() for x in values], is_causal=causal)
    operands = _between_nan(values)
    actual, again = (_run(operands, is_causal=causal) for _ in range(2))
    for a, r, e in zip(actual, again, expected):
        a, r = (x.detach().cpu().numpy() for x in (a, r))
        assert np.array_equal(a, r)
        e = e.detach().numpy()
        scale = max(np.abs(e).max(), 1.0)  # one key alone has no gradient
        assert np.abs(a - e).max() < 3e-6 * scale


@pytest.mark.parametrize("width", [32, 64])
def test_queries_that_see_no_number(width: int) -> None:
    """Scores of -inf give zeros, as from the kernels of other widths."""
    for t in (65, 130):
        q = torch.ones(1, 1, t, width, device="cuda", dtype=torch.bfloat16)
        k = torch.full((1, 1, t, width), float("-inf"), device="cuda", dtype=torch.bfloat16)
        with sdpa_kernel(OURS), torch.no_grad():
            y = F.scaled_dot_product_attention(q, k, q)
        assert (y.float().cpu().numpy() == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.25, 40.0])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("t", [65, 130])
def test_scales(t: int, width: int, scale: float) -> None:
    torch.manual_seed(t)
    values = [torch.randn(1, 2, t, width).to(torch.bfloat16) for _ in range(4)]

    expected = _run([x.double() for x in values], is_causal=True, scale=scale)
    with sdpa_kernel(OURS):
        actual = _run([x.cuda() for x in values], is_causal=True, scale=scale)
    for a, e in zip(actual, expected):
        a, e = a.detach().double().cpu().numpy(), e.detach().numpy()
        assert np.abs(a - e).max() <= 5e-2 * max(np.abs(e).max(), 1e-3)
