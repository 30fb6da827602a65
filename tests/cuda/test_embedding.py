"""The gradient of embedding: tables so small that rows repeat often, and others; and its forward."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor import _C

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# indices, rows of the table, columns: an alphabet, one row, positions, a vocabulary
SIZES = [(16384, 65, 384), (5000, 65, 33), (4096, 1, 8), (20000, 128, 100), (16383, 200, 64),
         (256, 256, 384), (1024, 1024, 768), (32768, 50304, 64), (4097, 3000, 40)]  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n,rows,columns", SIZES)
@pytest.mark.parametrize("drawn", ["evenly", "mostly one"])
def test_gradient(n: int, rows: int, columns: int, drawn: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, rows, n)
    if drawn == "mostly one":
        index[rng.random(n) < 0.9] = rows // 2
    grad = torch.from_numpy(rng.standard_normal((n, columns))).to(getattr(torch, dtype)).cuda()
    padding = rows - 1 if rows > 1 else -1
    there = torch.from_numpy(index).cuda()

    def function() -> np.ndarray:
        made = _C._ops.embedding_dense_backward(grad, there, rows, padding, False)
        assert made.dtype == grad.dtype
        return made.double().cpu().numpy()

    expected = np.zeros((rows, columns))
    np.add.at(expected, index, grad.double().cpu().numpy())
    if padding >= 0:
        expected[padding] = 0
    result = function()
    np.testing.assert_allclose(
        result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * np.abs(expected).max()
    )
    np.testing.assert_array_equal(function(), result)


@pytest.mark.parametrize("columns", [1, 3, 96, 128, 384, 768, 1028, 5000])
@pytest.mark.parametrize("n", [7, 5000])
def test_forward(n: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    table, index = rng.standard_normal((70, columns)), rng.integers(0, 70, n)
    made = torch.nn.functional.embedding(
        torch.from_numpy(index).cuda(), torch.from_numpy(table).float().cuda()
    )
    np.testing.assert_array_equal(made.cpu().numpy(), table.astype(np.float32)[index])
