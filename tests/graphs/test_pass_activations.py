"""gelu that is computed again beside its slope, as a result of the product with that slope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions
from tests.graphs.rewritten import check_bits, op_names
from vibetensor import _C
from vibetensor.graphs import record
from vibetensor.graphs.passes import activations, recompute

M, K, N = 24, 16, 40
PRODUCT = "_mm_activation_backward"
MADE = "gelu and its slope in one product"


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a kernel were chosen for every product; ops without one take two steps."""
    monkeypatch.setattr(activations, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(activations, "chosen_kernel", lambda *_: True)


def inputs(dtype: Any = vt.float32) -> tuple[Any, Any, Any]:
    vt.manual_seed(0)
    return tuple(vt.randn(*s).to(dtype) for s in ((M, K), (K, N), (M, N)))


def slope(grad: Any, w: Any, z: Any, form: str = "gelu", sums: bool = True) -> list[Any]:
    made = getattr(_C._ops, PRODUCT)(grad, w, z, form, sums)
    return [t for t in made if t is not None]


def gelu_first(grad: Any, w: Any, z: Any, **options: Any) -> list[Any]:
    y = F.gelu(z)
    return [grad.t() @ y, *slope(grad, w, z, **options), y * 1]


def gelu_last(grad: Any, w: Any, z: Any) -> list[Any]:
    made = slope(grad, w, z)
    y = F.gelu(z)
    return [made[0] * 1, grad.t() @ y, *made[1:], y]


def tanh_form(grad: Any, w: Any, z: Any) -> list[Any]:
    return [*slope(grad, w, z, "gelu_tanh"), F.gelu(z, approximate="tanh")]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [vt.float32, vt.float64, vt.bfloat16], ids=str)
@pytest.mark.parametrize(
    "function",
    [gelu_first, gelu_last, tanh_form, lambda *a: gelu_first(*a, sums=False)],
    ids=["gelu first", "product first", "tanh", "without sums"],
)
def test_one_product_makes_both(function: Callable[..., list[Any]], dtype: Any) -> None:
    tape = check_bits(activations.run, function, *inputs(dtype))
    assert "gelu" not in op_names(tape) and op_names(tape).count(PRODUCT) == 1
    assert [d.text for d in tape.decisions if d.made] == [MADE]


def other_form(grad: Any, w: Any, z: Any) -> list[Any]:
    return [*slope(grad, w, z), F.gelu(z, approximate="tanh")]


def other_place(grad: Any, w: Any, z: Any) -> list[Any]:
    return [*slope(grad, w, z), F.gelu(grad)]


def changed_between(grad: Any, w: Any, z: Any) -> list[Any]:
    y = F.gelu(z)
    z.mul_(0.5)
    return [*slope(grad, w, z), y]


def gradient_comes_later(grad: Any, w: Any, z: Any) -> list[Any]:
    y = F.gelu(z)
    grad.mul_(2)
    return [*slope(grad, w, z), y]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("function", "why"),
    [
        (other_form, None),
        (other_place, None),
        (changed_between, "the one cannot be where the other is"),
        (gradient_comes_later, "the one cannot be where the other is"),
    ],
)
def test_near_misses(function: Callable[..., list[Any]], why: str | None) -> None:
    tape = check_bits(activations.run, function, *inputs())
    assert {"gelu", PRODUCT} <= set(op_names(tape))
    assert [d.text.rpartition(": ")[2] for d in tape.decisions] == ([why] if why else [])


def test_without_a_kernel_both_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "DEVICES", ("cpu", "cuda"))
    given = inputs()
    with vt.no_grad():
        tape = activations.run(record(lambda: gelu_last(*given)).tape)
    assert "gelu" in op_names(tape)
    assert "no kernel for the product has both" in tape.decisions[-1].text


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_a_kernel_does_both_in_a_step(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with a row for such products: what `recompute` makes falls away again."""
    try:
        gpu = vt.cuda.get_device_name() if kind() == "cuda" else ""
    except RuntimeError:
        gpu = ""
    if gpu != "NVIDIA H200":
        pytest.skip("needs an H200, whose products were measured")
    monkeypatch.setattr(recompute, "LEAST_PEAK", 1 << 20)
    rows, width = 8192, 768

    class Block(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = vt.nn.LayerNorm(width)
            self.up, self.down = vt.nn.Linear(width, 4 * width), vt.nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            return x + self.down(F.gelu(self.up(self.norm(x)), approximate=form))

    def make() -> Any:
        net = vt.nn.Sequential(*(Block() for _ in range(4)))
        optimizer = vt.optim.SGD(net.parameters(), lr=1e-2)

        def step(x: Any) -> Any:
            optimizer.zero_grad()
            with vt.autocast("cuda", dtype=vt.bfloat16):
                loss = net(x).float().square().mean()
            loss.backward()
            optimizer.step()
            return loss, [p.grad * 1 for p in net.parameters()]

        return step

    vt.manual_seed(1)
    names = captured_names(make, [(vt.randn(rows, width),) for _ in range(4)], bound=3e-2)
    assert sum(MADE in d for d in decisions()) >= 2, decisions()
    assert names.count("gelu") + sum(MADE in d for d in decisions()) <= 4
