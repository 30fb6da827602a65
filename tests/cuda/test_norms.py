"""Norms and sums over rows on the device against NumPy in float64: dtypes, lengths that take each of
the kernels, few and many rows, unaligned memory. What is computed twice is the same bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor import _C

ops = _C._ops
HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = [(F32, BF16), (F32, HALF), (F32, F32), (BF16, BF16), (HALF, HALF), (F64, F64)]
# By a warp a row with 2, 3, 4 and 6 pieces a thread; by a block; neither.
SHAPES = [(1, 4), (700, 100), (3001, 384), (333, 520), (1000, 768), (129, 772), (200, 2048),
          (33, 4100), (9, 4448), (9, 6912), (17, 8192), (9, 8200), (40, 7), (5, 20000)]  # fmt: skip
OFFSETS = [0, 1]


def _eps(*dtypes: Any) -> float:
    return 4 * max(float(torch.finfo(d).eps) for d in dtypes)


def _made(shape: tuple[int, ...], dtype: Any, offset: int = 0) -> torch.Tensor:
    """Normal numbers, off a 16-byte boundary if asked."""
    n = int(np.prod(shape))
    return torch.randn(n + offset, device="cuda").to(dtype)[offset:].view(shape)


def _f64(t: torch.Tensor) -> np.ndarray:
    return t.double().cpu().numpy()


def _close(got: torch.Tensor, want: np.ndarray, eps: float) -> None:
    """Within eps of the largest value."""
    assert got.shape == want.shape
    error = np.abs(_f64(got) - want).max() / np.abs(want).max()
    assert error <= eps, error


def _poison(bytes_: int) -> None:
    """What is allocated next is full of NaN."""
    torch.full((bytes_ // 4 + 1,), float("nan"), device="cuda")


def _same(first: Any, second: Any) -> None:
    for a, b in zip(first, second):
        assert (a is None and b is None) or bool((a == b).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("offset", OFFSETS)
def test_forward(
    shape: tuple, dtypes: tuple, centred: bool, with_residual: bool, offset: int
) -> None:
    torch.manual_seed(1)
    (m, n), (wide, narrow) = shape, dtypes
    x, r = _made(shape, wide, offset), _made(shape, narrow, offset)
    w, b = _made((n,), wide), _made((n,), narrow)
    total = x + r if with_residual else x
    ref = _f64(total)
    mean = ref.mean(-1, keepdims=True) if centred else np.zeros((m, 1))
    rstd = 1 / np.sqrt(((ref - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    want = (ref - mean) * rstd * _f64(w) + (_f64(b) if centred else 0)

    def run(first: torch.Tensor, second: torch.Tensor | None) -> Any:
        _poison(m * n * 8)
        if centred:
            return ops._residual_layer_norm(first, second, [n], w, b, 1e-5, narrow)
        return ops._residual_rms_norm(first, second, [n], w, 1e-5, narrow)

    out, added, *statistics = run(x, r if with_residual else None)
    _close(out, want, _eps(narrow))
    _close(statistics[-1], rstd, 1e-5)
    if centred:
        assert np.abs(_f64(statistics[0]) - mean).max() < 1e-5
    if with_residual:
        assert bool((added == total).all())
        _same(run(r, x), (out, added, *statistics))
    else:
        _same(run(x, None), (out, added, *statistics))


@pytest.mark.parametrize(
    "shape", [(512, 65, 384), (3, 7, 1024), (4, 256, 77), (2, 3, 5000)], ids=str
)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("added", ["wide", "narrow"])
@pytest.mark.parametrize("rows", [1, 2])
def test_forward_of_rows_that_come_again(
    shape: tuple, dtypes: tuple, added: str, rows: int
) -> None:
    torch.manual_seed(1)
    wide, narrow = dtypes
    x = _made(shape, wide)
    r = _made(shape[1:] if rows == 2 else shape[2:], wide if added == "wide" else narrow)
    w, b, n = _made(shape[2:], wide), _made(shape[2:], narrow), shape[2]
    total = x + r
    ref = _f64(total)
    mean = ref.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(((ref - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    _poison(total.numel() * 8)
    out, found, means, rstds = ops._residual_layer_norm(x, r, [n], w, b, 1e-5, narrow)
    assert bool((found == total).all())
    _close(out, (ref - mean) * rstd * _f64(w) + _f64(b), _eps(narrow))
    _close(rstds, rstd, 1e-5)
    assert np.abs(_f64(means) - mean).max() < 1e-5
    _same(ops._residual_layer_norm(x, r, [n], w, b, 1e-5, narrow), (out, found, means, rstds))
    full = ops._residual_layer_norm(x, r.expand(shape).contiguous(), [n], w, b, 1e-5, narrow)
    _same(full[1:2], (found,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("offset", OFFSETS)
def test_backward(
    shape: tuple, dtypes: tuple, centred: bool, with_residual: bool, offset: int
) -> None:
    torch.manual_seed(2)
    (m, n), (wide, narrow) = shape, dtypes
    x, r = _made(shape, wide, offset), _made(shape, wide)
    dy, w = _made(shape, narrow, offset), _made((n,), wide)
    ref, gradient = _f64(x), _f64(dy)
    mean = ref.mean(-1, keepdims=True) if centred else np.zeros((m, 1))
    rstd = 1 / np.sqrt(((ref - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    h, scaled = (ref - mean) * rstd, gradient * _f64(w)
    along = (scaled * h).mean(-1, keepdims=True)
    constant = scaled.mean(-1, keepdims=True) if centred else 0
    want = rstd * (scaled - constant - h * along) + (_f64(r) if with_residual else 0)
    kept = torch.float64 if wide == F64 else torch.float32
    means, rstds = (torch.tensor(v).to(kept).cuda() for v in (mean, rstd))
    low = narrow if wide != narrow else None

    def run() -> Any:
        _poison(m * n * 8)
        args = (dy, r if with_residual else None, x, [n])
        if centred:
            return ops._residual_layer_norm_backward(*args, means, rstds, w, w, low, [], True)
        return ops._residual_rms_norm_backward(*args, rstds, w, low, [], True)

    made = run()
    total, weight, *bias, copy, sums = made
    if m == 1 or n <= 4:
        return _same(run(), made)  # the gradient may be nothing but rounding
    _close(total, want, _eps(wide) + 1e-6)
    _close(weight, (gradient * h).sum(0), _eps(weight.dtype) + 3e-6)
    if centred:
        _close(bias[0], gradient.sum(0), _eps(weight.dtype) + 3e-6)
    if low is None:
        assert copy is None
    else:
        assert bool((copy == total.to(low)).all())
    rows = total if copy is None else copy
    _close(sums, _f64(rows).sum(0), _eps(rows.dtype) + 3e-6)
    _same(run(), made)
    return None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("offset", OFFSETS)
def test_backward_of_a_sum(shape: tuple, dtypes: tuple, count: int, offset: int) -> None:
    torch.manual_seed(3)
    wide, narrow = dtypes
    x, r, w = _made(shape, wide), _made(shape, wide), _made(shape[1:], wide)
    first, *terms = (_made(shape, narrow, offset) for _ in range(count + 1))
    total = first.to(wide)
    for term in terms:
        total = total + term.to(wide)
    _, rstd = ops._rms_norm(x, [shape[1]], w, 1e-5)
    rest = (r, x, [shape[1]], rstd, w, None)
    want = ops._residual_rms_norm_backward(total, *rest, [], False)
    got = ops._residual_rms_norm_backward(first, *rest, terms, False)
    _close(got[0], _f64(want[0]), _eps(wide) + 1e-6)
    _close(got[1], _f64(want[1]), _eps(wide) + 3e-6)
    _same(ops._residual_rms_norm_backward(first, *rest, terms, False), got)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_total_in_the_place_of_the_residual(in_place: bool) -> None:
    """As a captured step lays it out: the sum of gradients where the residual was."""
    from vibetensor.graphs import capture

    torch.manual_seed(3)
    w = torch.randn(384, device="cuda").requires_grad_()
    data = [torch.randn(500, 384, device="cuda") for _ in range(3)]

    def step(x: torch.Tensor) -> torch.Tensor:
        x = (x * 1).detach().requires_grad_()
        y = torch.nn.functional.layer_norm(x, (384,), w)
        grad = torch.autograd.grad((y * y * y).sum() + (x * x).sum(), [x])[0]
        return grad.mul_(2) if in_place else grad * 2

    captured = capture(step)
    for x in data:
        want = _f64(step(x))
        _close(captured(x), want, 1e-5)


@pytest.mark.parametrize("shape", [(64, 1024), (65, 1000), (4097, 384), (1000, 77), (777, 2304),
                                   (2000, 33), (300, 5000), (100000, 1), (70000, 3)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, HALF, F32, F64], ids=str)
@pytest.mark.parametrize("first", [0, 1, 8])
def test_sums_over_rows(shape: tuple[int, int], dtype: Any, first: int) -> None:
    torch.manual_seed(4)
    m, n = shape
    x = torch.randn(m, n + 8, device="cuda").to(dtype)[:, first : first + n]
    want = _f64(x).sum(0)
    scale = float(np.abs(_f64(x)).sum(0).max() / np.abs(want).max())
    _poison(n * 4)
    _close(x.sum(0), want, _eps(dtype) + 1e-6 * scale)
    _close(x.mean(0), want / m, _eps(dtype) + 1e-6 * scale)
    if dtype != F64:
        _close(x.sum(0, dtype=F32), want, 1e-6 * scale)
    _same([x.contiguous().view(1, m, n).sum((0, 1))], [x.contiguous().sum(0)])
    _same([x.t().sum(1)], [x.sum(0)])
    other = torch.randn(m, 16, device="cuda").to(dtype)
    _close(ops._mm_row_sums(x.t(), other)[1], want, _eps(dtype) + 1e-6 * scale)
