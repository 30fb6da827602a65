"""Gradients of biases in the norms that make the gradients of their rows."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions

WIDTH = 24


def _blocks(norm: str, autocast: bool) -> Any:
    """A step over two residual blocks: the gradient of a bias is the sum of what a norm writes."""
    linears = [vt.nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    weights = [vt.randn(WIDTH).requires_grad_() for _ in range(3)]
    state = [p for linear in linears for p in linear.parameters()] + weights

    def normed(x: Any, at: int) -> Any:
        shape = x.shape[-1:]
        if norm == "layer_norm":
            return F.layer_norm(x, shape, weights[at], weights[at])
        return F.rms_norm(x, shape, weights[at])

    def step(x: Any) -> Any:
        for tensor in state:
            tensor.grad = None
        with vt.autocast(kind(), dtype=vt.bfloat16, enabled=autocast):
            h = linears[0](x).float()
            h = h + linears[1](normed(h, 0))
            h = h + linears[2](normed(h, 1))
            loss = linears[3](normed(h, 2)).float().square().mean()
        loss.backward()
        return loss, [p.grad for p in state]

    step.state = state  # type: ignore[attr-defined]
    return step


def _joined() -> list[str]:
    return [d for d in decisions() if d.startswith("bias_gradients: ") and "as one op" in d]


def _inputs(*shape: int) -> list[tuple]:
    vt.manual_seed(3)
    return [(vt.randn(*shape),) for _ in range(4)]


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [(8,), (3, 5)])
def test_in_the_norm(norm: str, autocast: bool, rows: tuple) -> None:
    names = captured_names(lambda: _blocks(norm, autocast), _inputs(*rows, WIDTH))
    # The last layer's rows have another gradient; in float32 the last norm's has nothing to add.
    expected = 3 if autocast else 2
    assert names.count(f"_residual_{norm}_backward") == expected
    assert len(_joined()) == expected, decisions()
    assert names.count("sum.dim") + names.count("_mm_row_sums") == 4 - expected


def test_sums_of_something_else_stay() -> None:
    weight = vt.randn(8).requires_grad_()

    def step(x: Any, y: Any) -> Any:
        x = (x * 1).detach().requires_grad_()
        y = (y * 1).detach().requires_grad_()
        loss = F.layer_norm(x + y, x.shape[-1:], weight).square().sum() + (x * 3).sum()
        grad = vt.autograd.grad(loss, [x])[0]
        return grad.sum(-1), grad.sum(0, keepdim=True), grad[1:].sum(0), grad.double().sum(0)

    def inputs() -> list[tuple]:
        return [tuple(vt.randn(8, 8) for _ in range(2)) for _ in range(4)]

    names = captured_names(lambda: step, inputs())
    assert names.count("sum.dim") >= 4
    assert not _joined()


def test_rows_that_change_before_they_are_summed_stay() -> None:
    weight = vt.randn(8).requires_grad_()

    def step(x: Any) -> Any:
        x = (x * 1).detach().requires_grad_()
        loss = F.layer_norm(x, x.shape[-1:], weight).square().sum() + x.square().sum()
        grad = vt.autograd.grad(loss, [x])[0]
        grad[0] = 2.0
        return grad.sum(0)

    names = captured_names(lambda: step, _inputs(8, 8))
    assert names.count("sum.dim") >= 1
    assert not _joined()
