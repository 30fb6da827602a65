"""The loss and its gradient in one op, in all its kernels: rows of few classes, rows that wait in
shared memory, and others, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor import _C

F = torch.nn.functional
# Relative to the largest gradient; the loss is float32's but for float64.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-8}
SIZES = [(1, 1), (33, 65), (7, 1000), (40, 4104), (5, 12288), (5, 24576), (300, 32000), (5, 50257),
         (300, 50304), (3, 70000), (2, 120000)]  # fmt: skip
NONE, MEAN, SUM = 0, 1, 2


def _reference(
    x: np.ndarray, target: np.ndarray, reduction: int, ignored: int, smoothing: float, grad: Any
) -> tuple[np.ndarray, np.ndarray]:
    kept = target != ignored
    at = (np.arange(len(x)), np.where(kept, target, 0))
    top = x.max(1, keepdims=True)
    lse = top + np.log(np.exp(x - top).sum(1, keepdims=True))
    losses = np.where(
        kept, (1 - smoothing) * (lse[:, 0] - x[at]) + smoothing * (lse[:, 0] - x.mean(1)), 0
    )
    dx = np.exp(x - lse) - smoothing / x.shape[1]
    dx[at] -= 1 - smoothing
    by = kept.sum() if reduction == MEAN else 1
    dx *= np.where(kept, np.broadcast_to(grad, len(x)) / by, 0)[:, None]
    return losses if reduction == NONE else losses.sum() / by, dx


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows,classes", SIZES)
@pytest.mark.parametrize("reduction,smoothing", [(MEAN, 0.0), (SUM, 0.1), (NONE, 0.0)])
def test_against_float64(
    rows: int, classes: int, reduction: int, smoothing: float, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((rows, classes)) * 3)
    logits = logits.to(getattr(torch, dtype)).cuda()
    target = rng.integers(0, classes, rows)
    ignored = int(target[rows // 2]) if rows > 2 else -100
    wide = torch.float64 if dtype == "float64" else torch.float32
    grad = rng.random(rows) if reduction == NONE else np.array(1.7)
    loss, gradient = _C._ops._cross_entropy_index_gradient(
        logits, torch.from_numpy(target).cuda(), None, reduction, ignored, smoothing,
        torch.from_numpy(grad).to(wide).cuda(), wide,
    )  # fmt: skip
    expected, dx = _reference(
        logits.double().cpu().numpy(), target, reduction, ignored, smoothing, grad
    )
    np.testing.assert_allclose(
        loss.double().cpu().numpy(), expected, rtol=TOLERANCE["float64" if wide is torch.float64 else "float32"],
        atol=1e-6 if wide is torch.float32 else 1e-12,
    )  # fmt: skip
    largest = np.abs(dx).max()
    rtol = max(TOLERANCE[dtype], 1e-6 if dtype != "float64" else 0)
    error = np.abs(gradient.double().cpu().numpy() - dx)
    # Beside rounding: where 1 is subtracted from almost 1, what the arithmetic has there is left.
    arithmetic = TOLERANCE["float64" if dtype == "float64" else "float32"]
    # float16 keeps nothing finer than its smallest numbers.
    least = 2.0**-25 if dtype == "float16" else 0.0
    assert (error <= rtol * np.abs(dx) + 2 * arithmetic * largest + least).all()
    # 16-bit floats do not hide an error of the arithmetic behind that bound.
    assert error.mean() <= rtol * np.abs(dx).mean() + 1e-7 * largest + least


def test_logits_without_a_finite_number() -> None:
    """Rows of -inf, inf and NaN, which the other rows of a block must not see."""
    x = torch.randn(300, 32000).bfloat16()
    x[3] = float("-inf")
    x[3, 7] = 1.0
    x[5, 9] = float("nan")
    x[6, 11] = float("inf")
    x[8] = float("-inf")
    target = torch.randint(0, 32000, (300,))
    target[3] = 7
    loss, gradient = _C._ops._cross_entropy_index_gradient(
        x.cuda(),
        target.cuda(),
        None,
        NONE,
        -100,
        0.0,
        torch.ones(300, device="cuda"),
        torch.float32,
    )
    leaf = x.double().requires_grad_(True)
    losses = F.cross_entropy(leaf, target, reduction="none")
    losses.sum().backward()
    np.testing.assert_allclose(
        loss.cpu().numpy(), losses.detach().numpy(), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    np.testing.assert_allclose(
        gradient.float().cpu().numpy(), leaf.grad.numpy(), rtol=2**-8, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("rows,classes", [(33, 65), (300, 1000), (300, 50304)])
def test_gradient_in_the_place_of_the_logits(rows: int, classes: int) -> None:
    x = torch.randn(rows, classes, device="cuda").bfloat16().requires_grad_(True)
    target = torch.randint(0, classes, (rows,), device="cuda")

    def function(target: Any) -> Any:
        x.grad = None
        loss = F.cross_entropy(x * 1.0, target)
        loss.backward()
        return loss

    loss = function(target).item()
    gradient = x.grad.float().cpu().numpy()
    step = torch.cuda.capture(function)
    for _ in range(3):
        captured = step(target)
    ops = [op.name for op in step.variants[0].tape.ops]
    assert "_cross_entropy_index_gradient" in ops
    assert abs(captured.item() - loss) < 1e-4
    np.testing.assert_allclose(
        x.grad.float().cpu().numpy(), gradient, rtol=2**-7, atol=1e-6 * np.abs(gradient).max()
    )
