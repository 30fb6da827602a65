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


def _failing_hook() -> None:
    def fail(grad):
        raise ValueError("from the hook")

    x = vt.ones(3, requires_grad=True)
    y = (x * 2).tanh()
    y.register_hook(fail)
    with pytest.raises(ValueError, match="from the hook"):
        y.exp().sum().backward()


def _saved_tensors_hooks() -> None:
    x = vt.ones(3, requires_grad=True)
    with vt.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = (x * x).tanh()
    y.sum().backward()
    (x * x).exp()


def _loader() -> None:
    data = vt.utils.data.TensorDataset(vt.arange(10), vt.ones(10, 2))
    seen = sum(int(index.sum()) for index, _ in vt.utils.data.DataLoader(data, batch_size=4))
    assert seen == 45


WORK = [
    _train,
    _hooks,
    _function,
    _abandoned_graph,
    _failed_ops,
    _failing_hook,
    _saved_tensors_hooks,
    _loader,
]


@pytest.mark.parametrize("work", WORK)
def test_nothing_is_left_behind(work) -> None:
    work()
    before = _counts()
    for _ in range(3):
        work()
    assert _counts() == before


@pytest.mark.parametrize("through_backward", [False, True])
def test_deep_graph_is_freed_without_recursion(through_backward) -> None:
    before = _counts()
    x = vt.ones(1, requires_grad=True)
    y = x
    for _ in range(100_000):
        y = y + 1
    assert _counts()[1] >= before[1] + 100_000
    if through_backward:
        y.sum().backward()
        assert x.grad.item() == 1
    del x, y
    assert _counts() == before
