"""What capture promises, and what other systems' captures are known to get wrong: a test each, for what
the other files here do not show already."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind, random_state
from vibetensor import _C
from vibetensor.graphs import CapturedStep, capture

from .test_capture import Training, batch, pair, run_both, same


class Stop(Exception):
    """Raised into a step."""


def allocated() -> int:
    """Bytes of tensors that are alive."""
    gc.collect()
    return _C._cpu_memory_stats()["allocated_bytes"]


def ops_of(function: Callable[[], Any]) -> list[str]:
    """The ops that Python and backward start."""
    seen: list[str] = []
    with vt.library.Mode(lambda original, name, args: (seen.append(name), original())[1]):
        function()
    return seen


class FailAt:
    """A mode in which the op of that number fails, before or after it has run."""

    def __init__(self, number: int, after: bool) -> None:
        self.left, self.after = number, after

    def __call__(self, original: Any, name: str, args: Any) -> Any:
        self.left -= 1
        if self.left != -1:
            return original()
        if self.after:
            original()
        raise Stop(name)


# --- whole step, one replay


def test_a_replay_runs_neither_the_function_nor_its_ops() -> None:
    training = Training()
    calls = []

    def step(x: Any, y: Any) -> Any:
        calls.append(1)
        return training.step(x, y)

    function = capture(step)
    x, y = batch(9)
    seen: set[str] = set()
    with contextlib.ExitStack() as overridden:  # under a Mode it would not be replayed
        for name, _ in vt.library.ops():
            overridden.enter_context(
                vt.library.override(name, lambda original, op, args: (seen.add(op), original())[1])
            )
        for index in range(3):
            function(*batch(index))
        assert len(calls) == 2 and "linear" in seen
        seen.clear()
        function(x, y)
        assert len(calls) == 2
        assert seen <= {"copy_", "fill_"}  # inputs and rates
        training.step(x, y)
    assert "linear" in seen


def test_a_replay_takes_no_memory() -> None:
    """The arena is there; only a kernel's own small workspace comes and goes."""
    training = Training()

    def step(x: Any, y: Any) -> None:
        training.step(x, y)

    function = capture(step)
    batches = [batch(index, 512) for index in range(6)]
    for index in range(3):
        function(*batches[index])
    before = allocated()
    held = before + _C._cpu_memory_stats()["cached_bytes"]
    (plan,) = function.variants[0].lowered.plans.values()
    _C._cpu_reset_peak_memory()
    for index in range(3, 6):
        function(*batches[index])
    after = _C._cpu_memory_stats()
    assert plan.nbytes > 64_000
    assert after["peak_bytes"] - before <= plan.nbytes // 10
    assert after["allocated_bytes"] == before
    assert after["allocated_bytes"] + after["cached_bytes"] == held


def test_dropout_masks_differ_at_every_replay_and_are_the_eager_ones() -> None:
    ones = vt.ones(64)
    runs = []
    for wrap in (lambda f: f, capture):
        step = wrap(lambda x: F.dropout(x, 0.5))
        vt.manual_seed(11)
        runs.append([tuple(step(ones).tolist()) for _ in range(12)])
    assert runs[0] == runs[1]
    assert len(set(runs[1])) == 12


# --- inputs, results and state that come and go


def test_inputs_may_be_freed_and_their_memory_used_again() -> None:
    weight = vt.arange(2048.0)
    step = capture(lambda x, y: (x * weight + y).sum())
    for index in range(8):
        x = vt.full((2048,), index + 1.0)
        y = np.full(2048, float(index), dtype=np.float32)
        result = step(x, y)
        y[:] = np.nan
        x.fill_(float("nan"))
        del x, y
        rubbish = [vt.full((2048,), float("nan")) for _ in range(8)]
        expected = (np.arange(2048.0) * (index + 1) + index).sum()
        np.testing.assert_allclose(result.item(), expected, rtol=1e-6)
        del rubbish
    assert step.variants[0].replays == 7


def test_what_a_capture_reads_lives_as_long_as_it() -> None:
    def made() -> CapturedStep:
        weight = vt.full((512,), 3.0)
        hidden = {"weight": weight}
        step = capture(lambda x: x * hidden.get("weight", 0))
        for _ in range(3):
            step(vt.ones(512))
        del hidden["weight"]
        return step

    step = made()
    rubbish = [vt.full((512,), 7.0) for _ in range(16)]
    assert step(vt.full((512,), 2.0)).tolist() == [6.0] * 512
    del rubbish


STATE_CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "data": lambda module, w: setattr(w, "data", w.detach() * 2),
    "set_": lambda module, w: w.set_(w.detach() * 2),
    "buffer": lambda module, w: setattr(module, "scale", module.scale * 2),
    "load_state_dict": lambda module, w: module.load_state_dict({"scale": module.scale * 2}),
    "assign": lambda module, w: module.load_state_dict({"scale": module.scale * 2}, assign=True),
    "register_buffer": lambda module, w: module.register_buffer("scale", module.scale * 2),
    "in place": lambda module, w: w.mul_(2),
}


@pytest.mark.parametrize("how", STATE_CHANGES)
def test_state_that_moves_or_changes_is_read_where_it_is(how: str) -> None:
    class Scale(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", vt.full((4,), 3.0))

        def forward(self, x: Any, w: Any) -> Any:
            return x * self.scale * w

    module, w = Scale(), vt.full((4,), 5.0)
    step = capture(lambda x: module(x, w))
    for round in range(4):
        for _ in range(3):
            x = vt.full((4,), 1.0 + round)
            assert step(x).tolist() == module(x, w).tolist()
        before = step(x).tolist()
        STATE_CHANGES[how](module, w)
        assert step(x).tolist() == [2 * v for v in before]


def test_results_and_their_views_outlive_later_replays() -> None:
    def step(x: Any) -> Any:
        y = x * 2
        return y, y[1:], y.view(2, 2).t(), {"sum": y.sum()}

    function = capture(step)
    kept = [function(vt.arange(4.0) + index) for index in range(8)]
    for index, (y, tail, turned, rest) in enumerate(kept):
        expected = (np.arange(4.0) + index) * 2
        assert y.tolist() == expected.tolist()
        assert tail.tolist() == expected[1:].tolist()
        np.testing.assert_array_equal(turned.numpy(), expected.reshape(2, 2).T)
        assert rest["sum"].item() == expected.sum()
        y.zero_()  # its views see it, later results do not
        assert tail.tolist() == [0, 0, 0]
    assert function(vt.ones(4))[0].tolist() == [2, 2, 2, 2]


def test_gradients_that_are_kept_by_clone_and_by_reference() -> None:
    eager, captured = pair()
    step = capture(captured.step)
    clones: dict[int, list[np.ndarray]] = {id(eager): [], id(captured): []}

    def between(training: Training, index: int) -> None:
        clones[id(training)].append(training.model.inner.weight.grad.clone().numpy())
        held = [p.grad for p in training.model.parameters()]
        assert all(a is b.grad for a, b in zip(held, training.model.parameters()))

    run_both(eager, captured, range(8), step, between)
    for mine, other in zip(*clones.values()):
        np.testing.assert_array_equal(mine, other)


# --- failures


@pytest.mark.parametrize(
    ("first", "after"),
    [(True, False), (False, True)],
    ids=["before an op of the first recording", "after an op of a later one"],
)
def test_a_step_that_fails_at_any_op_leaves_what_eager_leaves(first: bool, after: bool) -> None:
    """Weights, moments, gradients, random numbers, memory; and both go on alike."""

    failing: list[FailAt] = []

    def with_failure(training: Training) -> Callable[..., Any]:
        def step(x: Any, y: Any) -> Any:
            if not failing:
                return training.step(x, y)
            with vt.library.Mode(failing[0]):  # the ops of the step alone, not those around it
                return training.step(x, y)

        return step

    def trainings() -> tuple[tuple[Training, Any], tuple[Training, Any]]:
        # With counts of steps on the device: others are brought there by ops of the recording, so
        # that the ops would have other numbers.
        on_device = {} if kind() == "cpu" else {"fused": True}
        eager, captured = pair(lambda p: vt.optim.AdamW(p, lr=1e-2, **on_device))
        step = capture(with_failure(captured))
        both = (eager, with_failure(eager)), (captured, step)
        for index in range(0 if first else 2):
            for _, function in both:
                vt.manual_seed(index)
                function(*batch(index))
        assert len(step.variants) == (0 if first else 1)
        return both

    rows = 6 if first else 5  # another shape is another recording
    eager = trainings()[0][0]
    inputs = batch(4, rows)
    count = len(ops_of(lambda: eager.step(*inputs)))
    assert count > 30
    for at in range(count):
        both = trainings()
        random, left = [], []
        for _, function in both:
            inputs = batch(4, rows)
            function = _failing_call(function, inputs, failing, at, after)
            if not first:
                function()  # gives up the gradients
            before = _C._cpu_memory_stats()["allocated_bytes"]
            function()
            random.append(random_state().tolist())
            left.append(_C._cpu_memory_stats()["allocated_bytes"] - before)
        assert random[0] == random[1], at
        assert left[0] == left[1], at
        same(both[0][0], both[1][0])
        step = both[1][1]
        assert len(step.variants) == (0 if first else 1)
        for index in range(3):
            losses = []
            for _, function in both:
                vt.manual_seed(50 + index)
                losses.append(function(*batch(index, rows)).item())
            assert losses[0] == losses[1], at
        same(both[0][0], both[1][0])
        assert step.variants[-1].replays >= 1


def _failing_call(
    function: Any, inputs: Any, failing: list[FailAt], at: int, after: bool
) -> Callable[[], None]:
    def call() -> None:
        vt.manual_seed(4)
        failing.append(FailAt(at, after))
        try:
            with pytest.raises(Stop):
                function(*inputs)
        finally:
            failing.clear()

    return call


def test_an_error_that_the_function_swallows_is_not_lost() -> None:
    """The read would succeed in eager: going on with the other branch would be another program."""

    def reads(x: Any) -> Any:
        try:
            scale = x.sum().item()
        except RuntimeError:
            scale = 0.0
        return x * scale

    def indexes(x: Any) -> Any:
        try:
            return F.embedding(vt.tensor([7]), x[:, None])
        except IndexError:
            return x * 0

    x = vt.ones(3)
    with pytest.raises(RuntimeError, match=r"went on after an error.*item.*test_promises\.py:\d+"):
        capture(reads)(x)
    with pytest.raises(RuntimeError, match="went on after an error.*range"):
        capture(indexes)(x)
    assert reads(x).tolist() == [3, 3, 3]
    step = capture(lambda x: x + 1)
    assert [step(x).tolist() for _ in range(3)] == [[2, 2, 2]] * 3


def test_the_first_error_is_not_hidden_by_later_ones() -> None:
    def step(x: Any) -> Any:
        try:
            x.sum().item()  # the first
        finally:
            x.mean().tolist()

    with pytest.raises(RuntimeError, match="cannot be captured") as caught:
        capture(step)(vt.ones(3))
    errors: list[str] = []
    error: BaseException | None = caught.value
    while error is not None:
        errors.append(str(error))
        error = error.__context__
    assert "item" in errors[-1] and "test_promises.py" in errors[-1]
    # What runs after the failure, runs.
    assert capture(lambda x: x + 1)(vt.ones(1)).item() == 2


def test_a_replay_that_fails_says_why_and_the_next_one_works() -> None:
    table, seen = vt.arange(4.0)[:, None], vt.zeros(1)

    def step(index: Any) -> Any:
        seen.add_(1)
        return F.embedding(index, table).sum()

    function = capture(step)
    for value in range(3):
        assert function(vt.tensor([value])).item() == value
    with pytest.raises(IndexError, match="range"):
        function(vt.tensor([9]))
    before = allocated()
    assert function(vt.tensor([3])).item() == 3
    assert seen.item() == 5
    assert allocated() == before


def test_memory_of_captures_is_given_back() -> None:
    def run(count: int) -> None:
        training = Training()
        step = capture(training.step)
        for rows in range(2, 2 + count):
            for index in range(3):
                step(*batch(index, rows))
        assert len(step.variants) == count

    def alive() -> tuple[int, Any]:
        gc.collect()
        if vt.cuda.device_count():  # graphs go when the device is done with them
            vt.cuda.synchronize()
            vt.cuda.empty_cache()
        return allocated(), _C._live_counts()

    run(2)
    before = alive()
    run(5)
    assert alive() == before
    training = Training()
    step = capture(training.step)
    step(*batch(0))  # makes the moments
    step.reset()
    training.optimizer.zero_grad()
    before = alive()
    for index in range(5):
        step(*batch(index))
    step.reset()
    training.optimizer.zero_grad()
    assert alive() == before


# --- the garbage collector, other threads


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """The garbage collector runs at every few allocations."""
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*thresholds)


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, tensor: Any) -> None:
        self.me, self.tensor = self, tensor


@pytest.mark.usefixtures("eager_collector")
def test_the_garbage_collector_may_free_tensors_while_a_step_is_recorded() -> None:
    def make(training: Training) -> Callable[..., Any]:
        inner = training.step

        def step(x: Any, y: Any) -> Any:
            Cycle(x * 2)  # made inside, found whenever
            loss = inner(x, y)
            Cycle(loss)
            Cycle([p.grad for p in training.model.parameters()])
            return loss + Cycle(vt.ones(())).tensor * 0

        return step

    eager, captured = pair()
    eager.step = make(eager)  # type: ignore[method-assign]
    step = capture(make(captured))
    for _ in range(20):
        Cycle(vt.ones(1000))  # made before the recording, freed in it
    run_both(eager, captured, range(8), step)
    assert [variant.replays for variant in step.variants] == [6]


def test_a_recording_is_no_longer_than_the_step_with_the_collector_at_work(
    eager_collector: None,
) -> None:
    """Garbage of other code that is freed meanwhile leaves nothing on the tape."""
    step = capture(lambda x: (x * 2).relu() + 1)
    for _ in range(3):
        for _ in range(10):
            Cycle(vt.ones(100) * 3)
        step(vt.ones(4))
    assert [op.name for op in step.tape().ops if not op.is_view] == ["mul", "relu", "add"]


def test_other_threads_train_on_while_a_step_is_captured_and_replayed() -> None:
    """Eager work elsewhere is neither recorded nor disturbed, and disturbs nothing."""

    def losses_of(training: Training, step: Callable[..., Any], count: int) -> list[float]:
        return [step(*batch(index)).item() for index in range(count)]

    def make() -> Training:
        training = Training()
        training.model.eval()  # no dropout: threads share one source of random numbers
        return training

    expected = losses_of(make_first := make(), make_first.step, 60)
    results: dict[str, list[float]] = {}
    ready = threading.Barrier(3)
    device = vt.get_default_device()

    def work(name: str, training: Training, step: Callable[..., Any]) -> None:
        vt.set_default_device(device)  # each thread has its own
        ready.wait()
        results[name] = losses_of(training, step, 60)

    others = [make() for _ in range(3)]
    captures = [capture(others[0].step), capture(others[1].step)]
    threads = [
        threading.Thread(target=work, args=(f"captured {i}", others[i], captures[i]))
        for i in range(2)
    ] + [threading.Thread(target=work, args=("eager", others[2], others[2].step))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: expected for name in ("captured 0", "captured 1", "eager")}
    lengths = {len(step.tape()) for step in captures}
    alone = make()
    step = capture(alone.step)
    losses_of(alone, step, 3)
    assert lengths == {len(step.tape())}
    assert all(variant.replays == 58 for step in captures for variant in step.variants)


# --- as many captures as there is budget for


def test_shapes_that_never_repeat_stay_within_the_budget() -> None:
    eager, captured = pair()
    step = capture(captured.step, max_variants=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sizes = []
        for index in range(24):
            losses = []
            for function in (eager.step, step):
                vt.manual_seed(index)
                losses.append(function(*batch(index, 2 + index)).item())
            assert losses[0] == losses[1]
            sizes.append(allocated())
    same(eager, captured)
    assert len(step.variants) == 4
    told = [str(w.message) for w in caught]
    assert len(told) == 2 and "is dropped" in told[0] and "run eagerly" in told[1]
    assert sizes[-1] <= max(sizes[:12])
    # Those that were captured still replay.
    rows = step.variants[0].inputs[0].shape[0]
    assert step(*batch(0, rows)) is not None
    assert sum(variant.replays for variant in step.variants) == 1


def test_weights_that_move_at_every_call_stay_within_the_budget() -> None:
    """No call would ever replay what the one before it recorded."""
    eager, captured = pair()
    step = capture(captured.step, max_variants=3)
    recorded = []

    def between(training: Training, index: int) -> None:
        training.model.inner.weight.data = training.model.inner.weight.data.clone()
        if training is captured:
            recorded.append(step.variants[:])

    with pytest.warns(UserWarning, match="places of its tensors"):
        run_both(eager, captured, range(12), step, between)
    made = {id(variant) for variants in recorded for variant in variants}
    assert len(made) <= 3
    # After a reset, and with tensors that stay, it is captured again.
    step.reset()
    run_both(eager, captured, range(12, 20), step)
    assert step.variants[0].replays >= 6


def test_weights_that_move_now_and_then_are_captured_again() -> None:
    eager, captured = pair()
    step = capture(captured.step, max_variants=2)
    made: dict[int, Any] = {}

    def between(training: Training, index: int) -> None:
        made.update((id(variant), variant) for variant in step.variants)
        if index % 12 == 11:
            training.model.inner.weight.data = training.model.inner.weight.data.clone()

    run_both(eager, captured, range(60), step, between)
    # Each serves until the weight has moved; the very first call runs eagerly.
    assert [variant.replays for variant in made.values()] == [10, 11, 11, 11, 11]


def test_a_number_that_changes_at_every_call_stays_within_the_budget() -> None:
    step = capture(lambda x, scale: x * scale, max_variants=3)
    with pytest.warns(UserWarning, match="max_variants"):
        for index in range(10):
            assert step(vt.ones(2), index * 0.5).tolist() == [index * 0.5] * 2
    assert len(step.variants) == 3


# --- numbers that Python holds


def test_a_rate_of_each_group_set_by_hand_between_calls() -> None:
    def make(p: Any) -> Any:
        p = list(p)
        return vt.optim.AdamW([{"params": p[:2], "lr": 1e-2}, {"params": p[2:], "lr": 1e-3}])

    eager, captured = pair(make)
    step = capture(captured.step)

    def between(training: Training, index: int) -> None:
        for number, group in enumerate(training.optimizer.param_groups):
            group["lr"] = 0.02 / (index + 1 + number)

    run_both(eager, captured, range(10), step, between)
    assert [variant.replays for variant in step.variants] == [8]


def test_a_schedule_stepped_outside_reaches_replays() -> None:
    eager, captured = pair()
    schedules = {
        id(t): vt.optim.lr_scheduler.CosineAnnealingLR(t.optimizer, T_max=10)
        for t in (eager, captured)
    }
    step = capture(captured.step)
    run_both(
        eager, captured, range(10), step, lambda training, index: schedules[id(training)].step()
    )
    rates = {t.optimizer.param_groups[0]["lr"] for t in (eager, captured)}
    assert len(rates) == 1 and len(step.variants) == 1
