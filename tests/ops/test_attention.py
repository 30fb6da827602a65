"""Attention beyond the op table's samples: several blocks, masks, dropout, shared heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vibetensor.torch as vt  # noqa: E402
import vibetensor.torch.nn.functional as F  # noqa: E402


def _pair(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> tuple[Any, Any]:
    values = np.random.default_rng(seed).standard_normal(shape)
    ours = vt.as_tensor(values.copy()).to(getattr(vt, dtype)).requires_grad_()
    theirs = torch.from_numpy(values.copy()).to(getattr(torch, dtype)).requires_grad_()
    return ours, theirs


def _close(ours: Any, theirs: Any, tolerance: float) -> None:
    a, b = ours.detach().float().numpy(), theirs.detach().float().numpy()
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 3e-5), ("float64", 1e-7), ("bfloat16", 4e-2)]
)
@pytest.mark.parametrize(("length", "keys"), [(5, 5), (130, 130), (70, 300), (300, 70)])
@pytest.mark.parametrize("causal", [False, True])
def test_many_blocks(dtype: str, tolerance: float, length: int, keys: int, causal: bool) -> None:
    shapes = [(2, 3, length, 16), (2, 3, keys, 16), (2, 3, keys, 8)]
    pairs = [_pair(shape, i, dtype) for i, shape in enumerate(shapes)]
    ours = F.scaled_dot_product_attention(*[p[0] for p in pairs], is_causal=causal)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *[p[1] for p in pairs], is_causal=causal
    )
    _close(ours, theirs, tolerance)
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    for mine, other in pairs:
        _close(mine.grad, other.grad, tolerance * 10)


@pytest.mark.parametrize("seen", ["all", "causal", "mask"])
@pytest.mark.parametrize(("width", "value_width"), [(1, 40), (32, 32), (33, 20), (100, 64)])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (12, 13), (64, 64), (65, 257), (77, 512)])
def test_sizes_at_the_seams_of_the_blocks(
    length: int, keys: int, width: int, value_width: int, seen: str
) -> None:
    shapes = [(1, 2, length, width), (1, 2, keys, width), (1, 2, keys, value_width)]
    pairs = [_pair(shape, i) for i, shape in enumerate(shapes)]
    mask = np.random.default_rng(3).random((length, keys)) < 0.7
    results = []
    for library, inputs in (
        (vt, [ours for ours, _ in pairs]),
        (torch, [theirs.detach().double().requires_grad_() for _, theirs in pairs]),
    ):
        out = library.nn.functional.scaled_dot_product_attention(
            *inputs,
            attn_mask=library.tensor(mask) if seen == "mask" else None,
            is_causal=seen == "causal",
        )
        weight = np.random.default_rng(4).standard_normal(tuple(out.shape))
        grads = library.autograd.grad((out * library.tensor(weight).to(out.dtype)).sum(), inputs)
        results.append((out, *grads))
    for mine, other in zip(*results):
        _close(mine, other, 3e-5)


def test_heads_split_from_one_projection() -> None:
    ours, theirs = _pair((2, 70, 3 * 4 * 8), 0)
    results = []
    for library, x in ((vt, ours), (torch, theirs)):
        q, k, v = (t.view(2, 70, 4, 8).transpose(1, 2) for t in x.split(32, dim=2))
        out = library.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        results.append(out.transpose(1, 2).contiguous().view(2, 70, 32))
        results[-1].square().sum().backward()
    _close(*results, 3e-5)
    _close(ours.grad, theirs.grad, 1e-4)


def test_shared_key_heads() -> None:
    pairs = [_pair((2, 6, 20, 8), 0), _pair((2, 2, 20, 8), 1), _pair((2, 2, 20, 8), 2)]
    ours = F.scaled_dot_product_attention(*[p[0] for p in pairs], enable_gqa=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *[p[1] for p in pairs], enable_gqa=True
    )
    _close(ours, theirs, 3e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, other in pairs:
        _close(mine.grad, other.grad, 1e-4)


def test_float_mask_has_a_gradient() -> None:
    pairs = [_pair((1, 2, 6, 4), i) for i in range(3)] + [_pair((6, 6), 3)]
    ours = F.scaled_dot_product_attention(*[p[0] for p in pairs])
    theirs = torch.nn.functional.scaled_dot_product_attention(*[p[1] for p in pairs])
    _close(ours, theirs, 3e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    _close(pairs[3][0].grad, pairs[3][1].grad, 1e-4)


def test_row_without_visible_keys_is_zero() -> None:
    q = vt.ones(1, 1, 2, 4, requires_grad=True)
    mask = vt.tensor([[True, True], [False, False]])
    out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert out[0, 0, 1].abs().sum().item() == 0
    out.sum().backward()
    assert vt.isfinite(q.grad).all().item()


def test_dropout_is_the_same_in_forward_and_backward() -> None:
    v = vt.eye(64).reshape(1, 1, 64, 64).requires_grad_()
    q = vt.zeros(1, 1, 64, 4, requires_grad=True)
    vt.manual_seed(5)
    out = F.scaled_dot_product_attention(q, q, v, dropout_p=0.5)
    # With an identity as value the output is the dropped matrix itself.
    kept = (out != 0).float().mean().item()
    assert 0.4 < kept < 0.6
    np.testing.assert_allclose(out[out != 0].detach().numpy(), 2 / 64, rtol=1e-6)
    weight = vt.ones(64, 64)
    (grad,) = vt.autograd.grad((out[0, 0] * weight).sum(), v)
    np.testing.assert_allclose(
        grad[0, 0, :, 0].numpy(), out.detach()[0, 0].sum(0).numpy(), rtol=1e-5
    )
    vt.manual_seed(5)
    assert (F.scaled_dot_product_attention(q, q, v, dropout_p=0.5) == out).all().item()


@pytest.mark.parametrize("causal", [False, True])
def test_second_derivative(causal: bool) -> None:
    q, k, v = (vt.randn(1, 2, 4, 3, dtype=vt.float64).requires_grad_() for _ in range(3))

    def attention(*inputs: Any) -> Any:
        return F.scaled_dot_product_attention(*inputs, is_causal=causal)

    assert vt.autograd.gradcheck(attention, (q, k, v))
    assert vt.autograd.gradgradcheck(attention, (q, k, v))


def test_mask_with_causal_is_refused() -> None:
    x = vt.ones(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="attn_mask"):
        F.scaled_dot_product_attention(
            x, x, x, attn_mask=vt.ones(2, 2, dtype=vt.bool), is_causal=True
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("width", "value_width"), [(4, 0), (0, 4), (0, 0), (1, 1)])
def test_heads_without_columns(width: int, value_width: int, dtype: str) -> None:
    shapes = [(2, 2, 5, width), (2, 2, 7, width), (2, 2, 7, value_width)]
    pairs = [_pair(shape, i, dtype) for i, shape in enumerate(shapes)]
    poison = [vt.full((2, 2, 7, 4), 7.5) for _ in range(8)]
    del poison
    results = []
    for library, inputs in ((vt, [a for a, _ in pairs]), (torch, [b for _, b in pairs])):
        out = library.nn.functional.scaled_dot_product_attention(*inputs, scale=1.0)
        results.append((out, *library.autograd.grad(out.sum(), inputs, allow_unused=True)))
    for mine, other in zip(*results):
        if other is None:
            continue
        _close(mine, other, 3e-5)


@pytest.mark.parametrize("boolean", [False, True])
def test_rows_that_may_look_at_nothing(boolean: bool) -> None:
    """They are zero and give no gradient, also where the mask is trained."""
    blind = np.zeros((4, 3), dtype=np.float32)
    blind[1] = blind[3, :2] = -np.inf
    results = []
    for library in (vt, torch):
        q, k = (library.full((1, 1, n, 4), 0.5).requires_grad_() for n in (4, 3))
        mask = library.tensor(blind)
        mask = mask == 0 if boolean else mask.requires_grad_()
        out = library.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        out.square().sum().backward()
        grads = [q.grad, k.grad, *(() if boolean else (mask.grad,))]
        results.append([out, *grads])
    for ours, theirs in zip(*results):
        _close(ours, theirs, 1e-6)
