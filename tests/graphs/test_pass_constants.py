"""Values that are the same in every replay: what runs once, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CaptureMismatch, capture, record
from vibetensor.graphs.passes import constants
from vibetensor.graphs.tape import Op, Tape


def _tape(function: Callable[[], Any]) -> Tape:
    with vt.no_grad():
        return constants.run(record(function).tape)


def _names(ops: list[Op]) -> list[str]:
    return [op.name for op in ops if not op.is_view]


def _replays(function: Callable[[Any], Any], inputs: list[Any], **options: Any) -> Any:
    """Compares replays with the function; the captured step."""
    step = capture(function, **options)
    for x in inputs:
        expected = function(x)
        np.testing.assert_array_equal(step(x).numpy(), expected.numpy())
    assert step.variants[0].replays >= len(inputs) - 3
    return step


def test_masks_and_their_casts_run_once() -> None:
    def causal(x: Any) -> Any:
        rows = vt.arange(x.shape[0])
        mask = (rows.unsqueeze(1) >= rows).to(x.dtype)
        return x * mask.log().to(vt.float32).clamp(min=-10)

    step = _replays(causal, [vt.randn(8, 8) for _ in range(6)])
    tape = step.variants[0].tape
    assert _names(tape.ops) == ["mul"]
    assert {"_arange_", "ge", "_to_dtype", "log", "_clamp_min"} <= set(_names(tape.setup))
    assert "# once" in str(tape)


def test_the_seed_of_backward_and_zeros_run_once() -> None:
    w = vt.randn(4, 4, requires_grad=True)

    def step(x: Any) -> Any:
        w.grad = None
        loss = (x @ w).mean() + vt.zeros(1).sum()
        loss.backward()
        return w.grad * 1.0

    captured = _replays(step, [vt.randn(4, 4) for _ in range(6)])
    assert "fill_" not in _names(captured.variants[0].tape.ops)


def test_what_changes_is_no_constant() -> None:
    x, i = vt.randn(4), vt.tensor([1, 2])
    tape = _tape(lambda: [vt.zeros(4).add_(x) + 1, x * 2, vt.rand(4) * 3, i + 1])
    assert not tape.setup  # filled and then changed, inputs, random numbers, a tensor from outside
    tape = _tape(lambda: vt.ones(3))
    assert not tape.setup  # a result is new memory each time


def test_a_value_that_is_read_before_it_is_done_stays() -> None:
    x = vt.randn(4)

    def twice() -> Any:
        a = vt.ones(4)
        b = x * a
        a.add_(1)  # the first product must see ones
        return b + x * a

    tape = _tape(twice)
    assert not tape.setup
    _replays(lambda x: (lambda a: x * a + x * a.add_(1))(vt.ones(4)), [vt.randn(4)] * 5)


def test_a_held_tensor_is_no_constant() -> None:
    held: list[Any] = []

    def function(x: Any) -> Any:
        if not held:
            held.append(vt.tensor([1.0, 2.0]))
        return x * (held[0] + 1)

    step = capture(function)
    x = vt.ones(2)
    for _ in range(4):
        step(x)
    held[0].fill_(9.0)  # state of the program, read anew by each replay
    assert step(x).tolist() == [10.0, 10.0]


def test_a_wrapped_array_is_no_constant() -> None:
    table = np.ones(2, np.float32)
    step = capture(lambda x: x * (vt.from_numpy(table) + 1))
    x = vt.ones(2)
    for _ in range(4):
        step(x)
    table[:] = 9  # as eager code would see it
    assert step(x).tolist() == [10.0, 10.0]


def test_learning_rates_stay_live() -> None:
    w = vt.zeros(3, requires_grad=True)
    optimizer = vt.optim.SGD([w], lr=1.0)

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        (w * x).sum().backward()
        optimizer.step()
        return w.detach() * 1.0

    captured = capture(step)
    for _ in range(4):
        captured(vt.ones(3))
    before = w.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.25
    captured(vt.ones(3))
    assert captured.variants[0].replays >= 2
    np.testing.assert_array_equal((before - w.detach()).numpy(), np.full(3, 0.25, np.float32))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vt.randn(64)
    monkeypatch.setattr(constants, "MOST_BYTES", 128)
    tape = _tape(lambda: [x * vt.arange(64), x[:16] * vt.arange(16)])
    assert _names(tape.setup) == ["_arange_"]
    assert any(not d.made and "too many" in d.text for d in tape.decisions)
    monkeypatch.setattr(constants, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(constants, "MOST_BYTES_IN_ALL", 600)
    tape = _tape(lambda: [x * vt.arange(64), x[:16] * vt.arange(16)])
    assert _names(tape.setup) == ["_arange_"]


def test_what_leads_to_a_constant_is_not_kept() -> None:
    def function(x: Any) -> Any:
        return x * vt.arange(4096).float().view(64, 64).sum(0)

    step = _replays(function, [vt.randn(64) for _ in range(5)])
    memory = step.variants[0].lowered.memory
    assert sum(b.nbytes for b in memory if b.role == "constant") == 64 * 4


def test_frozen_numbers_are_still_found() -> None:
    factor = [2.0]

    def function(x: Any) -> Any:
        factor[0] += 1.0
        return x * (vt.ones(3) * factor[0])

    step = capture(function, verify=True)
    with pytest.raises(CaptureMismatch, match="was .* and is"):
        for _ in range(5):
            step(vt.ones(3))


def test_a_number_promotes_as_a_number_in_a_replay() -> None:
    """0-d float32 times a Python number is float32 arithmetic, not float64 rounded."""
    rng = np.random.default_rng(0)
    values = [vt.tensor(np.float32(v)) for v in rng.standard_normal(50)]
    for function in (lambda x: x * 0.1, lambda x: x / 0.3, lambda x: x + 0.1):
        _replays(function, values, optimize=False)
        _replays(function, values)
