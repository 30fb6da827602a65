"""Storages and graph nodes return to where they were."""

from __future__ import annotations

import gc

import pytest

import vibetensor.torch as vt
from vibetensor import _C


def _counts() -> tuple[int, int]:
    gc.collect()
    counts = _C._live_counts()
    return counts["storages"], counts["nodes"]


def _train() -> None:
    model = vt.nn.Sequential(vt.nn.Linear(4, 8), vt.nn.ReLU(), vt.nn.Linear(8, 2))
    optimizer = vt.optim.AdamW(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(vt.randn(5, 4)).square().mean().backward()
        optimizer.step()


def _hooks() -> None:
    x = vt.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: grad * 2)
    y.retain_grad()
    y.sum().backward()


def _function() -> None:
    class Square(vt.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 2 * x

    x = vt.ones(3, requires_grad=True)
    Square.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def _abandoned_graph() -> None:
    x = vt.ones(3, requires_grad=True)
    y = x
    for _ in range(100):
        y = (y * 1.01).tanh()


def _failed_ops() -> None:
    x = vt.ones(3, requires_grad=True)
    for _ in range(10):
        with pytest.raises(RuntimeError):
            (x * 2) @ vt.ones(4, 5)


@pytest.mark.parametrize("work", [_train, _hooks, _function, _abandoned_graph, _failed_ops])
def test_nothing_is_left_behind(work) -> None:
    work()
    before = _counts()
    for _ in range(3):
        work()
    assert _counts() == before
