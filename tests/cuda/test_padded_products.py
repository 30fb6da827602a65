"""Products of 16-bit matrices that do not lie in pieces of 16 bytes: their copies are padded, and
nothing beside the result is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch

F = torch.nn.functional
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}
# m, n, k: odd columns, odd depth, odd rows, all of them
SIZES = [(4096, 65, 512), (4096, 384, 65), (65, 384, 8192), (1025, 257, 1023), (512, 50257, 64)]


def _matrix(rng: np.random.Generator, rows: int, columns: int, layout: str, dtype: str) -> Any:
    """rows x columns on the device: as its transpose, as a part of a larger one, or at an odd place."""
    draw = {
        "plain": (rows, columns),
        "transposed": (columns, rows),
        "part": (rows, columns + 3),
        "shifted": (rows * columns + 1,),
    }[layout]
    made = torch.from_numpy(rng.standard_normal(draw)).to(getattr(torch, dtype)).cuda()
    if layout == "transposed":
        return made.t()
    if layout == "part":
        return made[:, :columns]
    return made[1:].view(rows, columns) if layout == "shifted" else made


def _check(ours: Any, a: Any, b: Any, dtype: str, added: Any = 0.0) -> None:
    expected = a.double().cpu().numpy() @ b.double().cpu().numpy() + added
    error = np.abs(ours.double().cpu().numpy() - expected)
    scale = np.sqrt(a.shape[1])
    assert error.max() <= TOLERANCE[dtype] * (np.abs(expected).max() + scale)
    assert error.mean() <= TOLERANCE[dtype] / 4 * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layouts", ["plain plain", "plain transposed", "transposed plain",
                                     "part shifted", "shifted part"])  # fmt: skip
@pytest.mark.parametrize("size", SIZES)
def test_mm(size: tuple[int, int, int], layouts: str, dtype: str) -> None:
    m, n, k = size
    rng = np.random.default_rng(0)
    first, second = layouts.split()
    a, b = _matrix(rng, m, k, first, dtype), _matrix(rng, k, n, second, dtype)
    _check(a @ b, a, b, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bias_and_results_inside_of_other_tensors(dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, w = _matrix(rng, 4096, 512, "plain", dtype), _matrix(rng, 65, 512, "plain", dtype)
    bias = torch.from_numpy(rng.standard_normal(65)).to(getattr(torch, dtype)).cuda()
    _check(F.linear(a, w, bias), a, w.t(), dtype, bias.double().cpu().numpy())
    whole = torch.full((4096, 70), 3.0, dtype=getattr(torch, dtype), device="cuda")
    torch.mm(a, w.t(), out=whole[:, 2:67])
    _check(whole[:, 2:67], a, w.t(), dtype)
    rest = torch.cat([whole[:, :2], whole[:, 67:]], 1).cpu().float().numpy()
    np.testing.assert_array_equal(rest, np.full((4096, 5), 3.0, np.float32))
    added = _matrix(rng, 4096, 65, "plain", dtype)
    _check(
        torch.addmm(added, a, w.t(), beta=2.0), a, w.t(), dtype, 2 * added.double().cpu().numpy()
    )
    # A sum of ones over an odd depth: padding adds nothing, whatever lies behind the operands.
    ones = torch.ones(2048, 257, dtype=getattr(torch, dtype), device="cuda")
    result = (ones @ torch.ones_like(ones).t()).double().cpu().numpy()
    np.testing.assert_array_equal(
        result, np.full_like(result, 257.0 if dtype == "float16" else 256.0)
    )
