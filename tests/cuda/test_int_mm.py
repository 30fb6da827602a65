"""Products of int8 matrices on the device, by tensor cores and without."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch


@pytest.mark.parametrize(
    "size",
    [
        (17, 16, 8),
        (64, 64, 64),
        (128, 256, 96),
        (1, 16, 8),
        (33, 17, 5),
        (40, 48, 1000),
        (31, 4096, 24),
    ],
)
def test_every_layout(size: tuple[int, int, int]) -> None:
    m, k, n = size
    rng = np.random.default_rng(m + k + n)
    a = rng.integers(-128, 128, (m, k), dtype=np.int8)
    b = rng.integers(-128, 128, (k, n), dtype=np.int8)
    expected = a.astype(np.int64) @ b.astype(np.int64)
    ours_a, ours_b = torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda()
    padded = torch.zeros(m, k + 3, dtype=torch.int8, device="cuda")[:, 1 : k + 1]
    padded.copy_(ours_a)
    for left in (ours_a, ours_a.t().contiguous().t(), padded):
        for right in (ours_b, ours_b.t().contiguous().t()):
            product = torch._int_mm(left, right)
            assert product.dtype == torch.int32 and product.is_cuda
            np.testing.assert_array_equal(product.cpu().numpy(), expected)


def test_extremes_and_nothing() -> None:
    low = torch.full((32, 64), -128, dtype=torch.int8, device="cuda")
    assert (torch._int_mm(low, low.t().contiguous()[:, :8].contiguous()) == 64 << 14).all().item()
    empty = torch._int_mm(low[:, :0], low[:0, :8])
    assert empty.shape == (32, 8) and not empty.any().item()


def test_what_is_wrong_is_named() -> None:
    x = torch.ones(32, 32, dtype=torch.int8, device="cuda")
    with pytest.raises(RuntimeError, match="_int_mm: Expected self and mat2 to be int8"):
        torch._int_mm(x, x.int())
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch._int_mm(x, x[:16])
    with pytest.raises(RuntimeError, match="dimension 2"):
        torch._int_mm(x, x[0])
    with pytest.raises(RuntimeError, match="same device"):
        torch._int_mm(x, x.cpu())
