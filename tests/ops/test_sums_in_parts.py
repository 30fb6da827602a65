"""Sums over rows that are left in parts, and the op that adds those of many up: on the CPU bit for bit
what the finished sums are, elsewhere within a rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor import _C

ops = _C._ops
FLOATS = [vt.float32, vt.float64, vt.bfloat16, vt.float16]


def _same(mine: Any, other: Any) -> None:
    assert mine.dtype == other.dtype and mine.shape == other.shape
    a, b = mine.double().cpu().numpy(), other.double().cpu().numpy()
    if mine.device.type == "cpu":
        np.testing.assert_array_equal(a, b)
        return
    bound = 8 * max(float(vt.finfo(mine.dtype).eps), 1e-6)
    np.testing.assert_allclose(a, b, rtol=bound, atol=bound * np.abs(b).max(initial=1.0))


def _finished(parts: list[Any], like: list[Any]) -> list[Any]:
    made = [vt.full(t.shape, float("nan"), dtype=t.dtype) for t in like]
    assert ops._add_parts_(made, parts) is None
    return made


@pytest.mark.parametrize(
    "shape", [(3, 5), (1, 1), (7, 64), (2, 3, 17), (300, 129), (0, 8)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 16, 200])
def test_gradients_of_a_norm(
    shape: tuple, dtype: Any, affine: bool, centred: bool, parts: int
) -> None:
    vt.manual_seed(2)
    n = [shape[-1]]
    low = vt.bfloat16 if dtype == vt.float32 else None
    x, grad, kept = (vt.randn(shape).to(dtype) for _ in range(3))
    weight = vt.randn(n).to(dtype) if affine else None
    if centred:
        _, mean, rstd = ops.native_layer_norm(x, n, weight, weight, 1e-5)
        args = (grad, kept, x, n, mean, rstd, weight, weight, low, [], True)
        run, sums = ops._residual_layer_norm_backward, (1, 2, 4)
    else:
        _, rstd = ops._rms_norm(x, n, weight, 1e-5)
        args = (grad, kept, x, n, rstd, weight, low, [], True)
        run, sums = ops._residual_rms_norm_backward, (1, 3)
    want, made = run(*args), run(*args, parts)
    for i, (a, b) in enumerate(zip(made, want)):
        assert (a is None) == (b is None)
        if a is not None and i not in sums:
            _same(a, b)
    places = [i for i in sums if want[i] is not None]
    for i in places:
        assert made[i].shape == (parts, n[0])
        assert made[i].dtype == (vt.float64 if dtype == vt.float64 else vt.float32)
    finished = _finished([made[i] for i in places], [want[i] for i in places])
    # Groups of rows are at most the parts, which is another order of the sum.
    if parts >= 16 or vt.get_default_device().type != "cpu":
        for mine, i in zip(finished, places):
            _same(mine, want[i])
    else:
        for mine, i in zip(finished, places):
            assert mine.double().numpy() == pytest.approx(
                want[i].double().numpy(), rel=2e-2, abs=2e-2
            )


@pytest.mark.parametrize("shape", [(7, 5), (200, 24), (3, 65, 40), (1, 1, 1), (0, 4), (2, 0, 3)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("parts", [1, 3, 64])
@pytest.mark.parametrize("layout", ["dense", "apart", "transposed"])
def test_parts_of_rows(shape: tuple, dtype: Any, parts: int, layout: str) -> None:
    vt.manual_seed(1)
    if layout == "apart":
        x = vt.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., : shape[-1]]
    elif layout == "transposed":
        x = vt.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    else:
        x = vt.randn(shape).to(dtype)
    made = ops._row_parts(x, parts)
    wide = vt.float64 if dtype == vt.float64 else vt.float32
    assert made.shape == (*shape[:-2], parts, shape[-1]) and made.dtype == wide
    want = x.sum(-2)
    matrices = [made] if len(shape) == 2 else list(made)
    targets = [want] if len(shape) == 2 else list(want)
    for mine, other in zip(_finished(matrices, targets), targets):
        _same(mine, other)


@pytest.mark.parametrize("count", [1, 3, 400])
def test_parts_of_many(count: int) -> None:
    vt.manual_seed(1)
    parts, targets = [], []
    for i in range(count):
        rows, n = (i * 7) % 41, (i * 13) % 90
        wide = vt.float64 if i % 5 == 4 else vt.float32
        parts.append(vt.randn(rows, n).to(wide))
        targets.append(vt.full((n,), float("nan"), dtype=FLOATS[i % 4]))
    ops._add_parts_(targets, parts)
    for part, made in zip(parts, targets):
        want = part.double().sum(0)
        eps = max(float(vt.finfo(made.dtype).eps), float(vt.finfo(part.dtype).eps))
        bound = 64 * eps
        np.testing.assert_allclose(
            made.double().cpu().numpy(), want.cpu().numpy(), rtol=bound, atol=bound * 8
        )


def test_nothing_to_add() -> None:
    assert ops._add_parts_([], []) is None


def test_what_does_not_fit_is_refused() -> None:
    x, parts = vt.zeros(4), vt.zeros(3, 4)
    with pytest.raises(RuntimeError, match="same length, got 1 and 2"):
        ops._add_parts_([x], [parts, parts])
    with pytest.raises(RuntimeError, match="rows of 4 elements"):
        ops._add_parts_([x], [vt.zeros(3, 5)])
    with pytest.raises(RuntimeError, match="rows of 4 elements"):
        ops._add_parts_([x], [vt.zeros(4)])
    with pytest.raises(RuntimeError, match="float32 or float64"):
        ops._add_parts_([x], [parts.half()])
    with pytest.raises(RuntimeError, match="floats of 16 bits"):
        ops._add_parts_([x.long()], [parts])
    with pytest.raises(RuntimeError, match="contiguous"):
        ops._add_parts_([x], [vt.zeros(4, 3).t()])
    with pytest.raises(RuntimeError, match="matrix"):
        ops._row_parts(x, 2)
    with pytest.raises(RuntimeError, match="floats"):
        ops._row_parts(parts.long(), 2)
    with pytest.raises(RuntimeError, match="positive number of parts, got 0"):
        ops._row_parts(parts, 0)
    stats = vt.zeros(3, 1)
    with pytest.raises(RuntimeError, match="must not be negative, got -1"):
        ops._residual_rms_norm_backward(parts, None, parts, [4], stats, None, None, [], False, -1)
