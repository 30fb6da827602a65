"""A .grad that the user has put in place of the one a capture works on, where a replay fails."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CaptureMismatch, capture


class _Stop(Exception):
    pass


class _Fails:
    """A schedule whose step raises when asked to."""

    def __init__(self, optimizer: Any) -> None:
        self.asked = False
        self.inner = vt.optim.lr_scheduler.LambdaLR(optimizer, self.rate)

    def rate(self, epoch: int) -> float:
        if self.asked:
            raise _Stop
        return 1.0


@pytest.mark.parametrize("where", ["act", "op"])
def test_an_error_in_a_replay_gives_the_bound_gradient_back(where: str) -> None:
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.SGD([p], lr=0.0)
    schedule = _Fails(optimizer)
    table = vt.arange(4.0)

    @capture
    def step(x: Any, index: Any) -> Any:
        (p * x).sum().backward()
        row = table[index]
        optimizer.step()
        schedule.inner.step()
        return row

    p.grad = bound = vt.zeros(2)
    good = vt.tensor([1])
    for _ in range(4):
        step(vt.ones(2), good)
    assert p.grad is bound and bound.tolist() == [4, 4]
    p.grad = own = vt.full((2,), 10.0)
    schedule.asked = where == "act"
    with pytest.raises(_Stop if where == "act" else IndexError):
        step(vt.ones(2), vt.tensor([9]) if where == "op" else good)
    schedule.asked = False
    assert bound.tolist() == [4, 4]
    # What ran before the error is done, as in eager code.
    assert p.grad is own and own.tolist() == ([10, 10] if where == "act" else [11, 11])
    step(vt.ones(2), good)
    assert bound.tolist() == [4, 4] and p.grad is own
    assert all(g.users is None for v in step.variants for g in v.gradients)


def test_a_backward_through_a_gradient_that_was_overwritten_is_refused() -> None:
    p, scale = vt.nn.Parameter(vt.ones(2)), vt.ones(2, requires_grad=True)

    @capture
    def step(x: Any) -> None:
        p.grad = None
        (p * x).sum().backward()

    for _ in range(3):
        step(vt.ones(2))
    loss = (p.grad * scale).sum()
    loss.backward(retain_graph=True)
    step(vt.full((2,), 3.0))
    assert p.grad.tolist() == [3, 3]  # the tensor that the call before left, too
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_mismatch_gives_the_bound_gradient_back() -> None:
    p, counter = vt.nn.Parameter(vt.ones(2)), []

    @capture(verify=True)
    def step(x: Any) -> None:
        counter.append(0)
        (p * (x * float(len(counter)))).sum().backward()

    p.grad = bound = vt.zeros(2)
    for _ in range(2):
        step(vt.ones(2))
    held = bound.tolist()
    p.grad = users = vt.full((2,), 10.0)
    with pytest.raises(CaptureMismatch):
        step(vt.ones(2))
    assert bound.tolist() == held
    # The function itself has run, and nothing else.
    assert p.grad is users and users.tolist() == [10.0 + len(counter)] * 2
    assert all(g.users is None for v in step.variants for g in v.gradients)
