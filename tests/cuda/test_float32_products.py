"""Products of float32 matrices on tensor cores: as exact as float32 arithmetic for all layouts and
sizes, numbers at the ends of the range, and the same bits each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch

F = torch.nn.functional
# Of Σ |a b|: sums in float32 stay below about this, products of TF32 (2^-10) do not.
BOUND = 6e-7
# All of them for the kernel; the library takes smaller ones.
SIZES = [(512, 512, 256), (1030, 2060, 45), (4101, 257, 100), (256, 256, 8192), (2050, 36, 1001),
         # Divided among few blocks and many, of 64 columns and of 128.
         (4096, 128, 512), (4090, 126, 390), (384, 128, 4096), (301, 61, 4100), (128, 128, 20000),
         (1000, 250, 20001), (130, 66, 40000)]  # fmt: skip


def _matrix(rng: np.random.Generator, rows: int, columns: int, transposed: bool) -> Any:
    """rows x columns on the device, in rows that are multiples of 16 bytes apart, between NaN."""
    outer, inner = (columns, rows) if transposed else (rows, columns)
    around = np.full((outer + 2, (inner + 3) // 4 * 4 + 4), np.nan, dtype=np.float32)
    around[1:-1, :inner] = rng.standard_normal((outer, inner), dtype=np.float32)
    part = torch.from_numpy(around).cuda()[1:-1, :inner]
    return part.t() if transposed else part


def _double(x: Any) -> np.ndarray:
    return x.double().cpu().numpy()


@pytest.mark.parametrize("turned", [(a, b) for a in (False, True) for b in (False, True)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mm(size: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    m, n, k = size
    rng = np.random.default_rng(m)
    a, b = _matrix(rng, m, k, turned[0]), _matrix(rng, k, n, turned[1])
    ours = a @ b
    x, y = _double(a), _double(b)
    assert (np.abs(_double(ours) - x @ y) / (np.abs(x) @ np.abs(y))).max() < BOUND
    assert np.array_equal(ours.cpu().numpy(), (a @ b).cpu().numpy())


def test_bias_added_and_batches() -> None:
    rng = np.random.default_rng(0)
    a, w = _matrix(rng, 1000, 256, False), _matrix(rng, 384, 256, False)
    x, y = _double(a), _double(w).T
    scale = np.abs(x) @ np.abs(y) + 4
    bias = torch.from_numpy(rng.standard_normal(384, dtype=np.float32)).cuda()
    assert (np.abs(_double(F.linear(a, w, bias)) - (x @ y + _double(bias))) / scale).max() < BOUND
    whole = torch.full((1000, 400), 3.0, device="cuda")
    torch.mm(a, w.t(), out=whole[:, 5:389])
    assert (np.abs(_double(whole[:, 5:389]) - x @ y) / scale).max() < BOUND
    assert (whole[:, :5] == 3).all().item() and (whole[:, 389:] == 3).all().item()
    added = torch.from_numpy(rng.standard_normal((1000, 384), dtype=np.float32)).cuda()
    sums = torch.addmm(added, a, w.t(), beta=2.0, alpha=0.5)
    assert (np.abs(_double(sums) - (x @ y / 2 + 2 * _double(added))) / scale).max() < BOUND
    left, right = torch.randn(5, 256, 128, device="cuda"), torch.randn(5, 128, 256, device="cuda")
    p, q = _double(left), _double(right)
    assert (np.abs(_double(left @ right) - p @ q) / (np.abs(p) @ np.abs(q))).max() < BOUND


@pytest.mark.parametrize("exponents", [(0, 0), (-120, 100), (-126, 120), (-60, -60), (50, 50)],
                         ids=str)  # fmt: skip
def test_sizes_of_numbers(exponents: tuple[int, int]) -> None:
    """What is left out of a product is small beside it, however small or large its factors are."""
    rng = np.random.default_rng(1)
    a, b = (
        torch.from_numpy(np.ldexp(rng.uniform(1, 2, (512, 512)), e).astype(np.float32)).cuda()
        for e in exponents
    )
    x, y = _double(a), _double(b)
    assert (np.abs(_double(a @ b.t()) - x @ y.T) / (x @ y.T)).max() < BOUND


def test_subnormal_numbers() -> None:
    """They lose no more than their last bit."""
    rng = np.random.default_rng(1)
    a = np.ldexp(rng.uniform(1, 2, (512, 512)), -132).astype(np.float32)
    b = np.ldexp(rng.uniform(1, 2, (512, 512)), 100).astype(np.float32)
    ours = _double(torch.from_numpy(a).cuda() @ torch.from_numpy(b).cuda().t())
    expected = a.astype(np.float64) @ b.T.astype(np.float64)
    last_bits = 2.0**-149 * b.astype(np.float64).sum(1)
    assert (np.abs(ours - expected) <= BOUND * expected + last_bits).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3.4028e38])
def test_numbers_that_cannot_be_split(value: float) -> None:
    """They give what they give in float32, and where they are not nothing changes."""
    rng = np.random.default_rng(2)
    a = rng.uniform(-1, 1, (512, 512)).astype(np.float32)
    b = rng.uniform(-1, 1, (512, 512)).astype(np.float32)
    b[:, 7] = rng.choice([0.25, -0.25, 0.0], 512)
    a[200, 7] = value
    ours = (torch.from_numpy(a).cuda() @ torch.from_numpy(b).cuda().t()).cpu().numpy()
    with np.errstate(invalid="ignore"):
        expected = a.astype(np.float64) @ b.T.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))
    finite = np.isfinite(expected)
    scale = np.abs(np.where(np.isfinite(a), a, 0).astype(np.float64)) @ np.abs(b.T)
    assert (np.abs(ours[finite] - expected[finite]) / scale[finite]).max() < BOUND


@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize("size", [(512, 128, 4096), (128, 130, 4096), (70, 60, 20000)], ids=str)
def test_divided_sums_of_a_batch(batch: int, size: tuple[int, int, int]) -> None:
    """Into memory that was NaN, added to what was there, and with numbers that cannot be split."""
    m, n, k = size
    rng = np.random.default_rng(k)
    a, b = (rng.standard_normal(s, dtype=np.float32) for s in ((batch, k, m), (batch, k, n)))
    x, y = a.transpose(0, 2, 1).astype(np.float64), b.astype(np.float64)
    scale = np.abs(x) @ np.abs(y) + 4
    left, right = torch.from_numpy(a).cuda().transpose(1, 2), torch.from_numpy(b).cuda()
    out = torch.full((batch, m, n), float("nan"), device="cuda")
    torch.bmm(left, right, out=out)
    assert (np.abs(_double(out) - x @ y) / scale).max() < BOUND
    added = torch.randn(batch, m, n, device="cuda")
    sums = torch.baddbmm(added, left, right, beta=2.0, alpha=0.5)
    assert (np.abs(_double(sums) - (x @ y / 2 + 2 * _double(added))) / scale).max() < BOUND
    a[1, k // 2, 3] = np.inf
    ours = torch.bmm(torch.from_numpy(a).cuda().transpose(1, 2), right).cpu().numpy()
    assert np.isinf(ours[1, 3]).all() and np.isfinite(np.delete(ours[1], 3, axis=0)).all()
    assert np.isfinite(np.delete(ours, 1, axis=0)).all()


def test_precision_and_the_switch_of_tf32_agree() -> None:
    matmul = torch.backends.cuda.matmul
    a = torch.full((512, 512), 1 + 2.0**-12, device="cuda")
    try:
        torch.set_float32_matmul_precision("high")
        assert matmul.allow_tf32 and (a @ a)[0, 0].item() == 512  # rounded to TF32
        matmul.allow_tf32 = False
        assert torch.get_float32_matmul_precision() == "highest"
        assert abs((a @ a)[0, 0].item() / (512 * (1 + 2.0**-12) ** 2) - 1) < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")
