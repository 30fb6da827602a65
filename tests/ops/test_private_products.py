"""_int_mm and _addmm_activation: ops that torch has under a private name."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch


@pytest.mark.parametrize("size", [(1, 1, 1), (17, 16, 8), (33, 17, 5), (200, 300, 77), (5, 0, 3)])
def test_int_mm_of_every_layout(size: tuple[int, int, int]) -> None:
    m, k, n = size
    rng = np.random.default_rng(m + k + n)
    a = rng.integers(-128, 128, (m, k), dtype=np.int8)
    b = rng.integers(-128, 128, (k, n), dtype=np.int8)
    expected = a.astype(np.int64) @ b.astype(np.int64)
    for left in (torch.from_numpy(a), torch.from_numpy(np.asfortranarray(a))):
        for right in (torch.from_numpy(b), torch.from_numpy(np.asfortranarray(b))):
            product = torch._int_mm(left, right)
            assert product.dtype == torch.int32
            np.testing.assert_array_equal(product.numpy(), expected)


def test_int_mm_names_what_is_wrong() -> None:
    x = torch.ones(4, 4, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="_int_mm: Expected self and mat2 to be int8"):
        torch._int_mm(x, x.int())
    with pytest.raises(RuntimeError, match="4x4 and 2x4"):
        torch._int_mm(x, x[:2])
    with pytest.raises(RuntimeError, match="dimension 2"):
        torch._int_mm(x[0], x)


@pytest.mark.parametrize("use_gelu", [False, True])
def test_addmm_activation_and_its_gradients(use_gelu: bool) -> None:
    def inputs() -> list[torch.Tensor]:
        torch.manual_seed(0)
        sizes = ((5,), (3, 4), (4, 5))
        return [torch.randn(*s, dtype=torch.float64).requires_grad_() for s in sizes]

    ours, plain = inputs(), inputs()
    out = torch._addmm_activation(*ours, beta=0.5, alpha=2, use_gelu=use_gelu)
    sums = 0.5 * plain[0] + 2 * (plain[1] @ plain[2])
    expected = torch.nn.functional.gelu(sums, approximate="tanh") if use_gelu else sums.clamp(min=0)
    assert out.allclose(expected, rtol=1e-12)
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours, plain):
        assert a.grad is not None and a.grad.allclose(b.grad, rtol=1e-12)
