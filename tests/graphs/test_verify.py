"""verify=True: a replay is compared with the function, and what differs is named."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CaptureMismatch, Tape, capture, passes, record
from vibetensor.graphs.verify import agree, all_agree, state_tensors
from vibetensor.torch import nn

from .test_capture import Training, batch, pair, run_both


def test_a_true_capture_passes_and_goes_on() -> None:
    eager, captured = pair()
    step = capture(captured.step, verify=True)
    run_both(eager, captured, range(12), step)
    assert step.variants[0].verified
    assert step.variants[0].replays == 10


def test_a_schedule_and_gradients_that_add_up_pass() -> None:
    training, eager = Training(), Training()
    schedules = [
        vt.optim.lr_scheduler.ExponentialLR(t.optimizer, gamma=0.9) for t in (training, eager)
    ]

    def make(t: Training, schedule: Any) -> Any:
        def step(x: Any, y: Any) -> Any:
            loss = t.model(x).square().mean() + y.sum() * 0
            loss.backward()
            t.optimizer.step()
            schedule.step()
            return loss

        return step

    step = capture(make(training, schedules[0]), verify=True)
    other = make(eager, schedules[1])
    for index in range(8):
        losses = []
        for function in (step, other):
            vt.manual_seed(index)
            losses.append(function(*batch(index)).item())
        assert losses[0] == losses[1]
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    assert any(variant.verified for variant in step.variants)


def test_a_number_that_python_changes_is_named() -> None:
    count = 0

    def step(x: Any) -> Any:
        nonlocal count
        count += 1
        return x * (0.1 * count)  # frozen

    function = capture(step, verify=True)
    x = vt.ones(3)
    function(x)
    with pytest.raises(CaptureMismatch, match=r"0\.1.* is .*0\.2.*test_verify\.py:\d+"):
        function(x)
    # Without it the number of the first call stays, silently.
    count = 0
    silent = capture(step)
    for _ in range(3):
        np.testing.assert_allclose(silent(x).numpy(), 0.1, rtol=1e-6)


def test_another_course_is_named() -> None:
    count = 0

    def step(x: Any) -> Any:
        nonlocal count
        count += 1
        return x.exp() if count == 1 else x.tanh()

    function = capture(step, verify=True)
    function(vt.ones(3))
    with pytest.raises(CaptureMismatch, match="exp .* has become tanh"):
        function(vt.ones(3))


def test_a_wrong_pass_is_caught_at_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that joins two ops which are not equal."""
    training = Training()
    training.model.eval()
    x, _ = batch(0)

    def wrong(tape: Tape) -> Tape:
        ops = list(tape.ops)
        at = next(i for i, op in enumerate(ops) if op.name == "gelu")
        # Reads the batch norm's input in place of its output.
        other = next(op for op in ops if op.name == "linear").outputs[0]
        ops[at] = dataclasses.replace(
            ops[at], args=(other, *ops[at].args[1:]), inputs=[other, *ops[at].inputs[1:]]
        )
        return tape.replaced(ops)

    monkeypatch.setattr(passes, "run", wrong)

    @capture(verify=True)
    def step(x: Any) -> Any:
        with vt.no_grad():
            return training.model(x)

    expected = step(x).numpy()
    with pytest.raises(CaptureMismatch, match=r"first to differ .* gelu\(.*test_capture\.py:\d+"):
        step(x)
    monkeypatch.undo()
    again = capture(lambda x: training.model(x), verify=True)  # so the first call runs the function
    np.testing.assert_array_equal(again(x).numpy(), expected)


def _classifier(norm: Any) -> tuple[Any, Any]:
    """A model in float64, and a step of it. A device's passes add some terms in another order."""
    model = nn.Sequential(nn.Linear(16, 32), norm, nn.ReLU(), nn.Linear(32, 4)).double()
    optimizer = vt.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return model, step


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_another_order_of_sums_is_no_mismatch(norm: Any) -> None:
    """Nor in weights and moments, nor in a gradient that is all roundings: that of a bias before a
    batch norm."""
    _, step = _classifier(norm(32))
    captured = capture(step, verify=True)
    for index in range(4):
        vt.manual_seed(index)
        captured(vt.randn(64, 16, dtype=vt.float64), vt.randint(0, 4, (64,)))
    assert captured.variants[0].verified


def test_state_is_compared_as_what_it_is() -> None:
    model, step = _classifier(nn.BatchNorm1d(32))
    found = state_tensors(
        record(lambda: step(vt.randn(64, 16, dtype=vt.float64), vt.randint(0, 4, (64,))))
    )
    dtypes = {tensor.data_ptr(): tensor.dtype for tensor in found.values()}
    assert {dtypes[p.data_ptr()] for p in model.parameters()} == {vt.float64}
    assert dtypes[model[1].running_var.data_ptr()] == vt.float64
    assert dtypes[model[1].num_batches_tracked.data_ptr()] == vt.int64


@pytest.mark.parametrize("left_out", [0, 1], ids=["weight", "small one"])
def test_wrong_state_is_caught_whatever_the_bound(
    left_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(tape: Tape) -> Tape:
        ops = [op for op in tape.ops if not op.is_view]
        del ops[left_out]
        return tape.replaced(ops, bound=1e-5)

    monkeypatch.setattr(passes, "run", wrong)
    states = [vt.ones(3), vt.full((3,), 1e-3)]

    @capture(verify=True)
    def step(x: Any) -> Any:
        states[0].add_(x)
        states[1].add_(x)

    step(vt.full((3,), 1e-3))
    with pytest.raises(CaptureMismatch, match="is not the function"):
        step(vt.full((3,), 1e-3))


def test_how_far_values_may_be() -> None:
    large, noise = vt.ones(3), vt.full((3,), 1e-9)
    assert agree(large + 1e-6, large, 1e-5) and not agree(large + 1e-4, large, 1e-5)
    assert not agree(large + 1e-6, large, 0.0)
    assert not agree(noise, -noise, 1e-5)
    kinds = ["gradient", "gradient"]
    assert all_agree([noise, large], [-noise, large], kinds, 1e-5)
    assert not all_agree([noise * 1e4, large], [-noise * 1e4, large], kinds, 1e-5)
    assert not all_agree([noise, large], [-noise, large], ["gradient", "weight"], 1e-5)
    assert not all_agree([noise, large], [-noise, large], kinds, 0.0)
    nan = vt.full((3,), float("nan"))
    assert not agree(nan, large, 1e-5) and not agree(large, nan, 1e-5) and agree(nan, nan, 1e-5)


def test_recordings_of_one_function_are_equal() -> None:
    training = Training()
    first = record(lambda: training.step(*batch(0))).tape
    second = record(lambda: training.step(*batch(0))).tape
    third = record(lambda: training.step(*batch(0))).tape
    assert first.diff(second)  # the first one makes the moments
    assert second.diff(third) == []


class Rates:
    """A step whose numbers come from `number(self)`, which Python computes."""

    def __init__(self, number: Any) -> None:
        self.weight = vt.ones(3, requires_grad=True)
        self.optimizer = vt.optim.SGD([self.weight], lr=0.1)
        self.schedule = vt.optim.lr_scheduler.StepLR(self.optimizer, 100)
        self.number = number

    def step(self, x: Any) -> Any:
        loss = (self.weight * x).sum() * self.number(self)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss


@pytest.mark.parametrize(
    "number",
    [
        lambda own: own.optimizer.param_groups[0]["lr"] * 3,
        lambda own: own.schedule.get_last_lr()[0] + 1,
        lambda own: 2.0 if own.schedule.last_epoch >= 0 and own.schedule.last_epoch < 2 else 3.0,
        lambda own: 1.5 + vt.initial_seed() % 7,
    ],
    ids=["rate", "last rate", "epoch", "seed"],
)
def test_numbers_that_follow_rates_steps_and_seeds_are_named(number: Any) -> None:
    """They are the same in two runs of the function, and frozen nevertheless."""
    own, x = Rates(number), vt.ones(3)
    step = capture(own.step, verify=True)
    with pytest.raises(
        CaptureMismatch, match=r"(?s)(the learning rate, a step|a replay would).*mul.*was"
    ):
        for _ in range(4):
            step(x)


def test_the_check_leaves_rates_steps_and_seeds_alone() -> None:
    own, plain, x = Rates(lambda own: 2.0), Rates(lambda own: 2.0), vt.ones(3)
    step = capture(own.step, verify=True)
    vt.manual_seed(5)
    for _ in range(5):
        np.testing.assert_array_equal(step(x).numpy(), plain.step(x).detach().numpy())
        assert own.schedule.state_dict() == plain.schedule.state_dict()
        assert own.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
        np.testing.assert_array_equal(own.weight.grad.numpy(), plain.weight.grad.numpy())
    assert vt.initial_seed() == 5 and step.variants[0].verified


def test_a_mode_that_the_function_sets_is_no_number() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    @capture(verify=True)
    def step(x: Any) -> Any:
        result = model(x)
        model.eval()
        return result

    for _ in range(2):
        model.train()
        step(vt.ones(2))
        assert not model.training and not model[1].training
    assert step.variants[0].verified


FACTOR = 2.0


def test_numbers_outside_of_the_function_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    offset, nothing = 1.0, None

    def shifted(x: Any) -> Any:
        return x * FACTOR + offset if nothing is None else x

    class Trainer:
        scale = 1
        power = 3

        def __init__(self) -> None:
            self.scale, self.calls = 2, 0

        @capture
        def step(self, x: Any) -> Any:
            self.calls += 1  # its own: an effect of Python's
            return shifted(x) * self.scale

    trainer, x = Trainer(), vt.ones(2)

    def expect(value: float, variants: int) -> None:
        for _ in range(3):
            assert trainer.step(x).tolist() == [value] * 2
        assert len(trainer.step.variants) == variants

    expect(6, 1)
    assert trainer.calls == 1
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    expect(8, 2)
    offset = 0.0
    expect(6, 3)
    assert "captured again: the name FACTOR was 2.0, is 3.0" in trainer.step.report()
    assert "captured again: the name offset was 1.0, is 0.0" in trainer.step.report()
    trainer.scale = 1
    expect(3, 4)
    nothing = 0
    expect(1, 5)
    nothing, offset, trainer.scale = None, 1.0, 2
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    expect(6, 5)  # the first one


def test_names_of_attributes_are_no_globals() -> None:
    source = """
def train(x):
    optimizer.step(x)
    return x * 2
"""
    optimizer = SimpleNamespace(step=lambda x: None)
    scope: dict[str, Any] = {"optimizer": optimizer}
    exec(source, scope)
    train = capture(scope["train"])
    for scope["step"] in range(6):  # a loop's variable, of the same name as the method
        train(vt.ones(2))
    assert len(train.variants) == 1

    class Trainer:
        def __init__(self) -> None:
            self.optimizer, self.step = optimizer, 0

        @capture
        def train(self, x: Any) -> Any:
            self.optimizer.step(x)
            return x * 2

    trainer = Trainer()
    for _ in range(6):
        trainer.train(vt.ones(2))
        trainer.step += 1
    assert len(trainer.train.variants) == 1
