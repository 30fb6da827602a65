"""Runs that are recorded on an accelerator: their ops are put off, and everything is as if they had not
been."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from vibetensor.graphs import capture
from vibetensor.graphs.capture import CapturedStep
from vibetensor.graphs.put_off import PutOff
from vibetensor.graphs.record import record
from vibetensor.torch._recording import outside

pytestmark = pytest.mark.skipif(kind() == "cpu", reason="ops of the CPU run as they are recorded")


class Run:
    """A recording with its native tape."""

    def __init__(self, function: Any) -> None:
        self.caught_up = False
        self.recording = record(function, catch_up=self._catch_up)
        self.native = self.recording.native
        self.result = self.recording.result

    def _catch_up(self, native: Any) -> None:
        self.caught_up = True
        native.catch_up()


def test_ops_wait_until_somebody_runs_them() -> None:
    x = vt.arange(4.0)
    run = Run(lambda: (x.add_(1), x * 2))
    assert run.native.puts_off
    assert x.tolist() == [0, 1, 2, 3]
    run.native.catch_up()
    assert not run.native.puts_off
    assert x.tolist() == [1, 2, 3, 4]
    assert run.result[1].tolist() == [2, 4, 6, 8]


def test_random_numbers_are_those_of_a_run_in_its_time() -> None:
    vt.manual_seed(3)
    expected = [vt.rand(5).tolist(), vt.randn(5).tolist(), vt.rand(5).tolist()]
    vt.manual_seed(3)
    run = Run(lambda: (vt.rand(5), vt.randn(5)))
    assert run.native.puts_off
    run.native.catch_up()
    assert [t.tolist() for t in run.result] == expected[:2]
    assert vt.rand(5).tolist() == expected[2]


@pytest.mark.parametrize("look", ["address", "outside", "state outside", "resize"])
def test_what_is_looked_at_is_there(look: str) -> None:
    x = vt.arange(4.0)
    seen: list[Any] = []

    def function() -> Any:
        x.add_(1)
        y = x * 2
        if look == "address":
            assert y.data_ptr() != 0
        elif look == "resize":
            x.detach().resize_(6)
        else:
            with outside():
                seen.append((y if look == "outside" else x).tolist())
        return y + x

    run = Run(function)
    assert not run.native.puts_off
    assert seen == {"outside": [[2, 4, 6, 8]], "state outside": [[1, 2, 3, 4]]}.get(look, [])
    assert x.tolist()[:4] == [1, 2, 3, 4]
    assert run.result.tolist() == [3, 6, 9, 12]


def test_what_is_written_outside_is_read_as_it_was_before() -> None:
    x = vt.ones(3)

    def function() -> Any:
        y = x * 2
        with outside():
            x.fill_(5)
        return y + x

    run = Run(function)
    assert run.result.tolist() == [7, 7, 7]


def test_other_things_outside_disturb_nothing() -> None:
    x, other = vt.ones(3), vt.zeros(3)

    def function() -> Any:
        y = x * 2
        with outside():
            other.copy_(vt.zeros_like(x) + x + 1)
            assert other.tolist() == [2, 2, 2]
        return y

    run = Run(function)
    assert run.native.puts_off
    run.native.catch_up()
    assert run.result.tolist() == [2, 2, 2]


def test_memory_that_no_op_has_touched_can_be_used() -> None:
    x = vt.ones(3)
    kept: list[Any] = []

    def function() -> None:
        x.add_(1)
        kept.append(vt.empty(1000))

    Run(function).native.catch_up()
    kept[0].fill_(2)
    assert kept[0].sum().item() == 2000


def test_an_error_leaves_what_was_done_before() -> None:
    x, kept = vt.zeros(3), []

    def function() -> None:
        x.add_(1)
        kept.append(x * 3)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        capture(function)()
    assert x.tolist() == [1, 1, 1]
    assert kept[0].tolist() == [3, 3, 3]


def test_a_host_read_leaves_what_was_done_before() -> None:
    x = vt.zeros(3)

    def function() -> Any:
        x.add_(1)
        return x * x.sum().item()

    with pytest.raises(RuntimeError, match="cannot be captured"):
        capture(function)()
    assert x.tolist() == [1, 1, 1]


def test_what_is_kept_elsewhere_has_its_values() -> None:
    kept: list[Any] = []

    def function(x: Any) -> Any:
        y = x * 2
        kept.append(y)
        return y + 1

    step = capture(function)
    for index in range(3):
        assert step(vt.full((2,), float(index))).tolist() == [2 * index + 1] * 2
    with pytest.raises(RuntimeError, match="leaves new tensors behind"):
        step(vt.full((2,), 3.0))
    assert [t.tolist() for t in kept] == [[0, 0], [2, 2], [4, 4], [6, 6]]


class Training:
    def __init__(self) -> None:
        vt.manual_seed(0)
        self.model = vt.nn.Sequential(vt.nn.Linear(4, 8), vt.nn.Dropout(0.5), vt.nn.Linear(8, 3))
        self.optimizer = vt.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule = vt.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)

    def step(self, x: Any, y: Any) -> Any:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss

    def state(self) -> list[np.ndarray]:
        found = [p.detach().numpy().copy() for p in self.model.parameters()]
        return found + [p.grad.numpy().copy() for p in self.model.parameters()]


def test_first_calls_are_eager_steps() -> None:
    eager, captured = Training(), Training()
    step = capture(captured.step, optimize=False)
    for index in range(5):
        vt.manual_seed(index)
        x, y = vt.randn(6, 4), vt.randint(0, 3, (6,))
        losses = []
        for one in (eager.step, step):
            vt.manual_seed(100 + index)
            losses.append(one(x, y).item())
        assert losses[0] == losses[1]
        for mine, theirs in zip(captured.state(), eager.state()):
            np.testing.assert_array_equal(mine, theirs)
        assert captured.schedule.last_epoch == eager.schedule.last_epoch == index + 1
    assert step.variants[0].replays == 3


@pytest.mark.parametrize("call", [0, 1])
def test_a_program_that_fails_takes_back_what_relied_on_it(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that makes the optimizer's state, and the one that is kept."""
    training = Training()
    step: CapturedStep = capture(training.step)
    batch = vt.randn(6, 4), vt.randint(0, 3, (6,))
    for _ in range(call):
        step(*batch)
    rate, made = training.optimizer.param_groups[0]["lr"], len(training.optimizer.state)

    class Failing:
        def __init__(self, program: Any) -> None:
            self.program = program

        def run(self) -> None:
            raise MemoryError("no more")

    run = PutOff.run
    monkeypatch.setattr(
        PutOff, "run", lambda self, native, program: run(self, native, Failing(program))
    )
    with pytest.raises(MemoryError, match="no more"):
        step(*batch)
    monkeypatch.undo()
    assert all(p.grad is None for p in training.model.parameters())
    assert len(training.optimizer.state) == made
    assert training.schedule.last_epoch == call
    assert training.optimizer.param_groups[0]["lr"] == rate
    for _ in range(4):
        assert np.isfinite(step(*batch).item())
    assert training.schedule.last_epoch == call + 4
    assert sum(v.replays for v in step.variants) >= 2


def test_a_step_that_cannot_be_lowered_is_run_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vt.zeros(3)
    step = capture(lambda: x.add_(1) * 2)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no graph for this")

    module = importlib.import_module("vibetensor.graphs.capture")
    monkeypatch.setattr(module, "lower", refuse)
    with pytest.raises(RuntimeError, match="no graph for this"):
        step()
    assert x.tolist() == [1, 1, 1]
    monkeypatch.undo()
    assert step().tolist() == [4, 4, 4]
