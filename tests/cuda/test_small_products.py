"""Products small enough for our own kernel, on both sides of where the library takes over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch

TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "float16": 1.5e-3, "bfloat16": 1e-2}
SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (16, 16, 64),
    (17, 33, 65),
    (64, 64, 64),
    (63, 65, 129),
    (1, 200, 64),
    (200, 1, 500),
    (16, 16, 128),
    (16, 16, 129),
    (16, 16, 256),
    (16, 16, 257),
    (128, 128, 128),
    (129, 128, 128),
    (256, 256, 256),
    (255, 257, 256),
    (300, 300, 300),
    (5, 4, 0),
]


def _draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[Any, np.ndarray]:
    """A tensor on the device, and the values it really holds."""
    tensor = torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, dtype)).cuda()
    return tensor, tensor.cpu().double().numpy()


def _check(ours: Any, expected: np.ndarray, depth: int, dtype: str) -> None:
    scale = max(float(np.sqrt(depth)), 1.0) * 4
    np.testing.assert_allclose(
        ours.cpu().double().numpy(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_mm_of_every_layout(size: tuple[int, int, int], dtype: str) -> None:
    m, n, k = size
    rng = np.random.default_rng(m * 31 + n * 7 + k)
    a, ra = _draw(rng, (m, k), dtype)
    b, rb = _draw(rng, (k, n), dtype)
    expected = ra @ rb
    spread_a = torch.zeros(2 * m, 3 * k + 1, dtype=a.dtype, device="cuda")[::2, 1::3]
    spread_a.copy_(a)
    for left in (a, a.t().contiguous().t(), spread_a):
        for right in (b, b.t().contiguous().t()):
            _check(left @ right, expected, k, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bias_alpha_and_beta(dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, ra = _draw(rng, (33, 65), dtype)
    b, rb = _draw(rng, (65, 47), dtype)
    for shape in ((33, 47), (47,), (1, 47), (33, 1), ()):
        c, rc = _draw(rng, shape, dtype)
        _check(torch.addmm(c, a, b, beta=0.5, alpha=2), 0.5 * rc + 2 * (ra @ rb), 65, dtype)
    c, rc = _draw(rng, (47, 33), dtype)
    _check(torch.addmm(c.t(), a, b), rc.T + ra @ rb, 65, dtype)
    nan = torch.full((33, 47), float("nan"), dtype=a.dtype, device="cuda")
    _check(torch.addmm(nan, a, b, beta=0), ra @ rb, 65, dtype)
    v, rv = _draw(rng, (65,), dtype)
    w, rw = _draw(rng, (33,), dtype)
    _check(torch.mv(a, v), ra @ rv, 65, dtype)
    _check(torch.addmv(w, a, v, beta=3, alpha=-1), 3 * rw - ra @ rv, 65, dtype)
    _check(torch.dot(v, v), rv @ rv, 65, dtype)
    weight, rweight = _draw(rng, (47, 65), dtype)
    bias, rbias = _draw(rng, (47,), dtype)
    x, rx = _draw(rng, (2, 3, 65), dtype)
    linear = torch.nn.functional.linear(x, weight, bias)
    _check(linear, rx @ rweight.T + rbias, 65, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_batches_with_broadcast(dtype: str) -> None:
    rng = np.random.default_rng(1)
    a, ra = _draw(rng, (6, 17, 33), dtype)
    b, rb = _draw(rng, (33, 19), dtype)
    _check(torch.bmm(a, b.expand(6, 33, 19)), ra @ rb, 33, dtype)
    _check(
        torch.bmm(a[:1].expand(6, 17, 33), b.expand(6, 33, 19)),
        np.repeat(ra[:1] @ rb, 6, 0),
        33,
        dtype,
    )
    _check(a.reshape(2, 3, 17, 33) @ b, (ra @ rb).reshape(2, 3, 17, 19), 33, dtype)
    c, rc = _draw(rng, (6, 1, 19), dtype)
    ours = torch.baddbmm(c, a, b.expand(6, 33, 19), beta=2, alpha=0.5)
    _check(ours, 2 * rc + 0.5 * (ra @ rb), 33, dtype)
    many, rmany = _draw(rng, (70000, 2, 3), dtype)
    other, rother = _draw(rng, (70000, 3, 1), dtype)
    _check(torch.bmm(many, other), rmany @ rother, 3, dtype)


def test_float32_is_never_rounded_to_tf32() -> None:
    x = torch.full((64, 64), 1 + 2.0**-20, device="cuda")
    old = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        product = (x @ torch.eye(64, device="cuda")).cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = old
    assert torch.equal(product, x.cpu())


def test_what_is_not_finite_stays_in_its_row() -> None:
    a = torch.ones(20, 20, device="cuda")
    a[3, 4] = float("inf")
    a[5, 6] = float("nan")
    product = a @ torch.ones(20, 20, device="cuda")
    rows = torch.arange(20)
    assert product[3].isinf().all().item() and product[5].isnan().all().item()
    others = product.cpu()[(rows != 3) & (rows != 5)]
    assert (others == 20).all().item()


def test_results_do_not_vary() -> None:
    a, b = torch.randn(200, 200, device="cuda"), torch.randn(200, 200, device="cuda")
    first = a @ b
    assert all(torch.equal(a @ b, first) for _ in range(20))
