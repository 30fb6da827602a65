"""Residual adds in the norms beside them."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions


class _Block:
    """One residual block and a norm after it, with a gradient for all it reads."""

    def __init__(self, shape: tuple[int, ...], norm: str, dtype: Any = vt.float32) -> None:
        n = shape[-1]
        self.norm = norm
        self.weights = [vt.randn(n).to(dtype).requires_grad_() for _ in range(4)]
        self.mix = vt.randn(n, n).to(dtype).requires_grad_()
        self.first = vt.randn(n).to(dtype).requires_grad_()
        self.state = [*self.weights, self.mix, self.first]

    def normed(self, x: Any, at: int) -> Any:
        if self.norm == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], self.weights[at], self.weights[at + 1])
        return F.rms_norm(x, x.shape[-1:], self.weights[at])

    def __call__(self, x: Any, r: Any) -> Any:
        for tensor in self.state:
            tensor.grad = None
        h = x * self.first + r
        z = self.normed(h + self.normed(h, 0) @ self.mix, 2)
        loss = (z * z).float().sum()
        loss.backward()
        return loss, z, [t.grad for t in self.state if t.grad is not None]


def _inputs(shape: tuple[int, ...], dtype: Any = vt.float32) -> list[tuple]:
    vt.manual_seed(3)
    return [tuple(vt.randn(*shape).to(dtype) for _ in range(2)) for _ in range(4)]


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 33), (1, 1), (6, 256)])
@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16, vt.float64], ids=str)
def test_forward_and_backward(norm: str, shape: tuple, dtype: Any) -> None:
    names = captured_names(lambda: _Block(shape, norm, dtype), _inputs(shape, dtype))
    assert names.count(f"_residual_{norm}") == 2
    assert names.count(f"_residual_{norm}_backward") >= 1
    assert f"native_{norm}" not in names and f"_{norm}" not in names


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_under_autocast(norm: str) -> None:
    def make() -> Any:
        block = _Block((4, 24), norm)
        linears = [vt.nn.Linear(24, 24) for _ in range(3)]
        weights = [p for linear in linears for p in linear.parameters()]

        def step(x: Any, r: Any) -> Any:
            for tensor in [*block.state, *weights]:
                tensor.grad = None
            with vt.autocast(kind(), dtype=vt.bfloat16):
                h = x + linears[0](block.normed(r, 0))
                h = h + linears[1](block.normed(h, 2))
                loss = linears[2](block.normed(h, 0)).float().square().mean()
            loss.backward()
            return loss, [w.grad for w in weights], [w.grad for w in block.weights]

        return step

    names = captured_names(make, _inputs((4, 24)))
    assert names.count(f"_residual_{norm}") == 3
    assert names.count(f"_residual_{norm}_backward") == 3
    # The rows' casts and those of the gradients are gone; weights' and the loss's stay.
    assert any("_to_dtype" in d and "add" in d for d in decisions())


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("readers", [1, 2, 3, 4, 5])
def test_gradients_of_several_products(norm: str, readers: int) -> None:
    def make() -> Any:
        block = _Block((4, 24), norm)
        linears = [vt.nn.Linear(24, 24, bias=False) for _ in range(readers)]
        weights = [linear.weight for linear in linears]

        def step(x: Any, r: Any) -> Any:
            for tensor in [*block.state, *weights]:
                tensor.grad = None
            h = x * block.first
            with vt.autocast(kind(), dtype=vt.bfloat16):
                normed = block.normed(h + r, 0)
                loss = sum(linear(normed).float().square().mean() for linear in linears)
            loss.backward()
            return loss, block.first.grad, [w.grad for w in [*weights, *block.weights]]

        return step

    names = captured_names(make, _inputs((4, 24)))
    assert names.count(f"_residual_{norm}_backward") == 1
    # Those of the losses, and of gradients beyond four. On an accelerator some are in chains.
    found, most = names.count("add_") + names.count("add"), readers + max(readers - 4, 0)
    assert found == most if kind() == "cpu" else found <= most


def test_a_sum_of_gradients_that_is_read_stays() -> None:
    weight = vt.randn(8).requires_grad_()

    def step(x: Any, r: Any) -> Any:
        x = (x * 1).detach().requires_grad_()
        normed = F.rms_norm(x, x.shape[-1:], weight)
        seen = []
        normed.register_hook(lambda grad: seen.append(grad.sum()))
        with vt.autocast(kind(), dtype=vt.bfloat16):
            loss = (normed @ r.t()).float().sum() + (normed @ x.detach().t()).float().sum()
        (grad,) = vt.autograd.grad(loss, [x])
        return loss, grad, *seen

    names = captured_names(_one(step), _inputs((8, 8)))
    assert "sum.dim" in names and {"add", "add_"} & set(names)


def _one(function: Any) -> Any:
    return lambda: function


@pytest.mark.parametrize(
    "case, why",
    [
        (lambda x, r: F.layer_norm(x + r[:, :1], x.shape[-1:]), "broadcast"),
        (lambda x, r: F.layer_norm(x[:1] + r[:, :1], x.shape[-1:]), "broadcast"),
        (lambda x, r: F.layer_norm(vt.add(x, r, alpha=2), x.shape[-1:]), "2 times"),
        (lambda x, r: F.layer_norm(x + r.t().contiguous().t(), x.shape[-1:]), "not contiguous"),
        (lambda x, r: F.layer_norm(x + 1.0, x.shape[-1:]), "broadcast"),
    ],
)
def test_near_misses(case: Any, why: str) -> None:
    names = captured_names(_one(case), _inputs((5, 8)))
    assert "_residual_layer_norm" not in names and "add" in names
    assert any(why in d for d in decisions()), decisions()


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(3, 8), (1, 3, 8), (8,), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_rows_that_come_again(norm: str, shape: tuple, first: bool) -> None:
    def make() -> Any:
        rows, weight = vt.randn(*shape).requires_grad_(), vt.randn(8).requires_grad_()

        def step(x: Any, r: Any) -> Any:
            rows.grad = weight.grad = None
            total = rows + x * 1 if first else x * 1 + rows
            loss = (_norm(norm, total, weight) * r).sum() + total.square().sum()
            loss.backward()
            return loss, rows.grad, weight.grad

        return step

    names = captured_names(make, _inputs((4, 3, 8)), 0 if kind() == "cpu" else 1e-5)
    assert f"_residual_{norm}" in names


def test_the_sum_stays_readable() -> None:
    def step(x: Any, r: Any) -> Any:
        total = x + r
        twice = total * 2
        normed = F.layer_norm(total, x.shape[-1:])
        return normed, twice, total

    names = captured_names(_one(step), _inputs((5, 8)))
    assert names == ["_residual_layer_norm", "mul"]


def test_a_sum_that_changes_before_the_norm_stays() -> None:
    def step(x: Any, r: Any) -> Any:
        total = x + r
        total[0] = 1.0
        return F.layer_norm(total, x.shape[-1:])

    names = captured_names(_one(step), _inputs((5, 8)))
    assert "_residual_layer_norm" not in names


def test_a_weight_that_changes_between_stays() -> None:
    weight = vt.ones(8)

    def step(x: Any, r: Any) -> Any:
        total = x + r
        weight.add_(total[0])
        return F.layer_norm(total, x.shape[-1:], weight)

    def make() -> Any:
        weight.fill_(1.0)
        return step

    names = captured_names(make, _inputs((5, 8)))
    assert "_residual_layer_norm" not in names
    assert any("changes between" in d for d in decisions())


def test_a_sum_in_place() -> None:
    def step(x: Any, r: Any) -> Any:
        total = x * 1.0
        total += r
        return F.rms_norm(total, x.shape[-1:]), total

    names = captured_names(_one(step), _inputs((5, 8)))
    assert "_residual_rms_norm" in names


def test_two_norms_of_one_sum() -> None:
    weight = vt.randn(8)

    def step(x: Any, r: Any) -> Any:
        total = x + r
        return F.layer_norm(total, x.shape[-1:]), F.layer_norm(total, x.shape[-1:], weight), total

    names = captured_names(_one(step), _inputs((5, 8)))
    assert sorted(names) == ["_residual_layer_norm", "native_layer_norm"]


def test_two_norms_whose_gradients_are_added() -> None:
    weight = vt.randn(8).requires_grad_()

    def step(x: Any, r: Any) -> Any:
        weight.grad = None
        h = x * weight
        loss = (F.layer_norm(h, x.shape[-1:]) * r).sum() + (F.rms_norm(h, x.shape[-1:]) * r).sum()
        loss.backward()
        return loss, weight.grad

    names = captured_names(_one(step), _inputs((5, 8)))
    assert sum(name.endswith("_norm_backward") for name in names) == 2
    assert sum(name.startswith("_residual") for name in names) == 1


def _norm(kind: str, x: Any, weight: Any) -> Any:
    shape = x.shape[-1:]
    return (F.layer_norm if kind == "layer_norm" else F.rms_norm)(x, shape, weight)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_weight_that_is_a_part_of_the_sum(norm: str, in_place: bool) -> None:
    def step(x: Any, y: Any) -> Any:
        total = (x * 1).add_(y) if in_place else x + y
        return _norm(norm, total, total[1]), total

    names = captured_names(lambda: lambda x, y: step(x, y), _inputs((4, 8)))
    assert f"_residual_{norm}" not in names
    assert any("part of the sum" in d for d in decisions())


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("added", ["itself", "the weight's", "to the weight's", "to the weight"])
def test_sums_of_gradients_of_one_norm(norm: str, added: str) -> None:
    def make() -> Any:
        weight = vt.randn(8, requires_grad=True)

        def step(x: Any, _: Any) -> Any:
            x = (x * 1).detach().requires_grad_()
            loss = (_norm(norm, x, weight) ** 3).sum()
            grad, of_weight = vt.autograd.grad(loss, [x, weight])
            with vt.no_grad():
                if added == "itself":
                    return grad + grad
                if added == "the weight's":
                    return grad + of_weight
                return (of_weight if added == "to the weight's" else weight).add_(grad) * 1

        step.state = [weight]
        return step

    names = captured_names(make, _inputs((8,)))
    assert f"_residual_{norm}_backward" not in names
    assert any("stay two ops" in d for d in decisions())
