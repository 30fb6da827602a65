"""Products that do what comes after them. The pass rewrites for CUDA; here it is made to for the CPU,
whose kernels give the same bits for activations."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions
from vibetensor.graphs.passes import epilogues


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogues, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(epilogues, "FORWARD", tuple(ACTIVATIONS))
    monkeypatch.setattr(epilogues, "BACKWARD", tuple(ACTIVATIONS))
    monkeypatch.setattr(epilogues, "SUMS", ())


ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


TINY = 1e-30  # bit for bit here, whatever the pass states for CUDA


def _mlp(activation: str, sizes: tuple[int, int, int], *, bias: bool = True, steps: int = 1) -> Any:
    first, hidden, last = sizes
    up, down = vt.nn.Linear(first, hidden, bias=bias), vt.nn.Linear(hidden, last, bias=bias)
    weights = [*up.parameters(), *down.parameters()]
    x_weight = vt.randn(first).requires_grad_()

    def step(x: Any) -> Any:
        for weight in weights:
            weight.grad = None
        for _ in range(steps):
            (down(ACTIVATIONS[activation](up(x * x_weight))).square().mean() / steps).backward()
        return [w.grad for w in weights]

    step.state = weights
    return step


def _inputs(*shape: int, dtype: Any = vt.float32) -> list[tuple]:
    vt.manual_seed(3)
    return [(vt.randn(*shape).to(dtype),) for _ in range(4)]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rows", [(3,), (2, 17), (96,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_activations(activation: str, rows: tuple, bias: bool, autocast: bool) -> None:
    def make() -> Any:
        step = _mlp(activation, (24, 72, 5), bias=bias)

        def under(x: Any) -> Any:
            with vt.autocast(kind(), dtype=vt.bfloat16, enabled=autocast):
                return step(x)

        under.state = step.state
        return under

    names = captured_names(make, _inputs(*rows, 24), TINY)
    assert names.count("_linear_activation") == 1
    assert names.count("_mm_activation_backward") == 1
    for name in ("relu", "silu", "gelu", "gelu_backward", "silu_backward", "threshold_backward"):
        assert name not in names
    assert names.count("_mm_row_sums") == (2 if bias else 0)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16])
def test_column_sums(
    activation: str, steps: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epilogues, "SUMS", tuple(ACTIVATIONS))

    def make() -> Any:
        step = _mlp(activation, (24, 72, 5), steps=steps)

        def under(x: Any) -> Any:
            with vt.autocast(kind(), dtype=vt.bfloat16, enabled=dtype is vt.bfloat16):
                return step(x)

        under.state = step.state
        return under

    names = captured_names(make, _inputs(2, 17, 24), TINY if steps == 1 else 1e-2)
    assert names.count("_mm_activation_backward") == steps
    assert names.count("_mm_row_sums") >= 1  # the other bias
    made = [d for d in decisions() if "derivative + sum as one op" in d]
    assert len(made) == steps


def test_accumulation() -> None:
    names = captured_names(lambda: _mlp("gelu", (24, 72, 5), steps=3), _inputs(40, 24), 1e-5)
    assert names.count("addmm") == 4


def test_derivative_of_something_else_stays() -> None:
    weight = vt.randn(6, 3).requires_grad_()

    def step(x: Any) -> Any:
        weight.grad = None
        F.gelu(x @ weight).mul(2.0).square().sum().backward()
        return weight.grad

    names = captured_names(lambda: step, _inputs(6, 6))
    assert "gelu" in names and "_linear_activation" not in names


def test_an_activation_in_place_stays() -> None:
    weight = vt.randn(4, 6)

    def step(x: Any) -> Any:
        return F.linear(x, weight).relu_(), F.linear(x * 2, weight).relu()

    names = captured_names(lambda: step, _inputs(6, 6), TINY)
    assert names.count("_linear_activation") == 1 and "relu_" in names


def test_what_is_read_elsewhere_is_kept() -> None:
    weight = vt.randn(4, 6)

    def step(x: Any) -> Any:
        linear = F.linear(x, weight)
        return linear, F.silu(linear), linear.sum()

    names = captured_names(lambda: step, _inputs(6, 6), TINY)
    assert names == ["_linear_activation", "sum.dim"]


def test_a_part_of_a_product_stays() -> None:
    weight = vt.randn(4, 6)

    def step(x: Any) -> Any:
        return F.gelu(F.linear(x, weight)[:, 1:3])

    names = captured_names(lambda: step, _inputs(6, 6))
    assert "gelu" in names


def test_adding_to_a_wider_gradient_stays() -> None:
    def make() -> Any:
        weight = vt.randn(5, 24).requires_grad_()

        def step(x: Any) -> Any:
            weight.grad = None
            for _ in range(2):
                with vt.autocast(kind(), dtype=vt.bfloat16):
                    loss = F.linear(x, weight).float().square().mean()
                loss.backward()
            return weight.grad

        return step

    names = captured_names(make, _inputs(6, 24), TINY)
    assert "addmm" not in names and "add_" in names
    assert not any("mm + add_" in d for d in decisions())


def test_nothing_is_rewritten_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogues, "DEVICES", ("cuda",))
    names = captured_names(lambda: _mlp("gelu", (24, 72, 5), steps=2), _inputs(40, 24))
    assert "gelu" in names and "gelu_backward" in names and "addmm" not in names


def test_what_the_library_does_not_have_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogues, "FORWARD", ("relu", "gelu_tanh"))
    monkeypatch.setattr(epilogues, "BACKWARD", ("gelu_tanh",))
    names = captured_names(lambda: _mlp("silu", (24, 72, 5)), _inputs(40, 24), TINY)
    assert "silu" in names and "silu_backward" in names
    assert any("no product has silu" in d for d in decisions())


def test_relu_of_a_linear_that_is_read_too_stays() -> None:
    weight = vt.randn(4, 6)

    def step(x: Any) -> Any:
        linear = F.linear(x, weight)
        return F.relu(linear), linear

    assert captured_names(lambda: step, _inputs(6, 6)) == ["linear", "relu"]
