"""Tensors that are computed again instead of kept: which, and with which bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.fusions import captured_names, decisions
from tests.graphs.rewritten import check_bits, op_names
from vibetensor.graphs import record
from vibetensor.graphs.passes import epilogues, recompute
from vibetensor.graphs.plan import plan
from vibetensor.graphs.tape import Tape

MADE = "again instead of"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass takes the steps of these tests for large ones."""
    monkeypatch.setattr(recompute, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(recompute, "LEAST_PEAK", 1000)


def peak_between(x: Any) -> Any:
    """Something of x's columns that takes much more memory than x, for a while."""
    return vt.cat([x] * 8, 1).sum(1, keepdim=True)


def check(function: Callable[..., Any], *tensors: Any) -> Tape:
    """The pass alone, bit for bit; what it does not lower it must leave."""
    sizes = []

    def rewrite(tape: Tape) -> Tape:
        made = recompute.run(tape)
        sizes.extend(plan(t, str(tensors[0].device)).lower_bound for t in (tape, made))
        assert made.bound == 0
        return made

    tape = check_bits(rewrite, function, *tensors)
    fired = any(d.made for d in tape.decisions)
    assert (sizes[1] < sizes[0]) == fired, (sizes, tape.decisions)
    return tape


def inputs() -> tuple[Any, Any]:
    vt.manual_seed(0)
    return vt.randn(64, 32), vt.randn(32, 32)


def kept(x: Any, w: Any, between: Callable[[Any, Any], Any] | None = None) -> list[Any]:
    """gelu(x @ w), read before and after the peak; so is what it is made from."""
    a = x @ w
    g = F.gelu(a)
    peak = peak_between(g @ w)
    if between:
        between(a, g)
    return [peak.t() @ g, a.exp().sum(0)]


def test_what_is_made_from_what_is_kept_is_computed_again() -> None:
    tape = check(kept, *inputs())
    assert op_names(tape).count("gelu") == 2
    (made,) = [d for d in tape.decisions if d.made]
    assert "gelu again instead of 8,192 bytes kept" in str(made)


def test_it_runs_right_before_the_first_late_read() -> None:
    names = op_names(check(kept, *inputs()))
    last = len(names) - 1 - names[::-1].index("gelu")
    assert names[last + 1] == "mm"


@pytest.mark.parametrize(
    "between",
    [lambda a, g: a.mul_(2), lambda a, g: g.mul_(2)],
    ids=["what it is made from", "it"],
)
def test_what_changes_in_between_is_kept(between: Callable[[Any, Any], Any]) -> None:
    names = op_names(check(lambda x, w: kept(x, w, between), *inputs()))
    assert names.count("gelu") == 1


def test_what_nothing_else_keeps_is_not_kept_for_it() -> None:
    def function(x: Any, w: Any) -> list[Any]:
        g = F.gelu(x @ w)
        return [peak_between(g @ w).t() @ g]

    assert op_names(check(function, *inputs())).count("gelu") == 1


def test_random_ops_and_products_are_kept() -> None:
    def function(x: Any, w: Any) -> list[Any]:
        a = x @ w
        g = F.dropout(a, 0.5)
        peak = peak_between(g @ w)
        return [peak.t() @ g, a.exp().sum(0)]

    given = inputs()
    tape = record(lambda: function(*given)).tape
    assert op_names(recompute.run(tape)) == op_names(tape)


def test_parameters_and_inputs_are_there_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "MOST_MOVED", 3.0)

    def function(x: Any, w: Any) -> list[Any]:
        half = w.to(vt.bfloat16)
        peak = peak_between(x.to(vt.bfloat16) @ half)
        return [peak @ half[:1], half.float()]

    tape = check(function, *inputs())
    assert any("_to_dtype again" in str(d) for d in tape.decisions)


def test_what_reads_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Any, w: Any) -> list[Any]:
        a = x @ w
        half = a.to(vt.bfloat16)
        peak = peak_between(half @ w.to(vt.bfloat16))
        rest = [peak.t() @ half]
        for _ in range(30):
            w = w @ w
        return [*rest, a @ w]

    tape = check(function, *inputs())
    assert any("moves 3.0 bytes for each one saved" in str(d) for d in tape.decisions)
    monkeypatch.setattr(recompute, "MOST_MOVED", 3.0)
    assert any(d.made for d in check(function, *inputs()).decisions)


def test_small_steps_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "LEAST_PEAK", 1 << 20)
    assert op_names(check(kept, *inputs())).count("gelu") == 1


class Block(vt.nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm(32)
        self.up, self.down = vt.nn.Linear(32, 128), vt.nn.Linear(128, 32)

    def forward(self, x: Any) -> Any:
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


def make(norm: Any) -> Callable[..., Any]:
    model = vt.nn.Sequential(*[Block(norm) for _ in range(3)], vt.nn.Linear(32, 512))
    optimizer = vt.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    step.state = list(model.parameters())  # type: ignore[attr-defined]
    return step


def batches() -> list[tuple]:
    vt.manual_seed(1)
    return [(vt.randn(256, 32), vt.randint(0, 512, (256,))) for _ in range(4)]


@pytest.mark.parametrize("norm", [vt.nn.LayerNorm, vt.nn.RMSNorm])
def test_training_keeps_its_bits(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captured_names(lambda: make(norm), batches())
    assert sum(f"gelu {MADE}" in d for d in decisions()) == 3, decisions()
    monkeypatch.setattr(recompute, "MOST_MOVED", 3.0)
    captured_names(lambda: make(norm), batches())
    kind = "layer" if norm is vt.nn.LayerNorm else "rms"
    normed = [d for d in decisions() if f"_residual_{kind}_norm {MADE}" in d]
    assert normed


def test_activations_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogues, "DEVICES", ("cpu", "cuda"))
    names = captured_names(lambda: make(vt.nn.LayerNorm), batches(), bound=1e-4)
    assert "_linear_activation" in names
    assert sum(MADE in d for d in decisions()) == 3
