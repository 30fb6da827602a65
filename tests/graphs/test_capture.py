"""Captured training steps against eager ones: same bits, whatever happens between replays."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from vibetensor.graphs import CapturedStep, CaptureError, capture


class Net(vt.nn.Module):
    """A little of everything a training step has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vt.nn.Linear(8, 16)
        self.norm = vt.nn.BatchNorm1d(16)
        self.drop = vt.nn.Dropout(0.25)
        self.outer = vt.nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        return self.outer(self.drop(F.gelu(self.norm(self.inner(x)))))


class Training:
    """A model, its optimizer and a step, made the same way each time."""

    def __init__(self, make_optimizer: Callable[[Any], Any] | None = None) -> None:
        vt.manual_seed(3)
        self.model = Net()
        make = make_optimizer or (lambda p: vt.optim.AdamW(p, lr=1e-2))
        self.optimizer = make(self.model.parameters())

    def step(self, x: Any, y: Any) -> Any:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        vt.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def state(self) -> list[np.ndarray]:
        values = [v.numpy().copy() for v in self.model.state_dict().values()]
        for state in self.optimizer.state.values():
            values += [
                v.detach().numpy().copy() for v in state.values() if isinstance(v, vt.Tensor)
            ]
        values += [p.grad.numpy().copy() for p in self.model.parameters() if p.grad is not None]
        return values


def batch(index: int, rows: int = 6) -> tuple[Any, Any]:
    rng = np.random.default_rng(index)
    x = vt.tensor(rng.standard_normal((rows, 8)).astype(np.float32))
    return x, vt.tensor(rng.integers(0, 4, rows))


def same(a: Training, b: Training) -> None:
    mine, other = a.state(), b.state()
    assert len(mine) == len(other)
    for x, y in zip(mine, other):
        np.testing.assert_array_equal(x, y)


def pair(make_optimizer: Callable[[Any], Any] | None = None) -> tuple[Training, Training]:
    return Training(make_optimizer), Training(make_optimizer)


def run_both(
    eager: Training,
    captured: Training,
    steps: range,
    step: CapturedStep,
    between: Callable[[Training, int], None] | None = None,
) -> None:
    """The same batches through both, each with the random numbers of its own run."""
    for index in steps:
        losses = []
        for training, function in ((eager, eager.step), (captured, step)):
            vt.manual_seed(100 + index)
            losses.append(function(*batch(index)).item())
            if between:
                between(training, index)
        assert losses[0] == losses[1], index
    same(eager, captured)


OPTIMIZERS = {
    "adamw": lambda p: vt.optim.AdamW(p, lr=1e-2),
    "adam amsgrad": lambda p: vt.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: vt.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: vt.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_steps_are_the_eager_ones(name: str, optimize: bool) -> None:
    eager, captured = pair(OPTIMIZERS[name])
    step = capture(captured.step, optimize=optimize)
    run_both(eager, captured, range(100), step)
    assert step.variants[0].replays >= 97


def test_random_numbers_go_on_as_in_eager() -> None:
    """Without seeding between steps: replays draw what eager steps would have drawn."""
    results = []
    for use_capture in (False, True):
        training = Training()
        step = capture(training.step) if use_capture else training.step
        vt.manual_seed(7)
        losses = [step(*batch(i)).item() for i in range(10)]
        results.append((losses, vt.rand(3).tolist()))
    assert results[0] == results[1]


def test_a_learning_rate_set_by_hand_reaches_replays() -> None:
    eager, captured = pair()
    step = capture(captured.step)

    def between(training: Training, index: int) -> None:
        training.optimizer.param_groups[0]["lr"] = 1e-2 / (index + 1)

    run_both(eager, captured, range(8), step, between)
    assert len(step.variants) == 1


def test_a_schedule_inside_the_step() -> None:
    eager, captured = pair()
    trainings = (eager, captured)
    schedules = [vt.optim.lr_scheduler.CosineAnnealingLR(t.optimizer, T_max=10) for t in trainings]

    def with_schedule(training: Training, schedule: Any) -> Callable[..., Any]:
        inner = training.step

        def step(x: Any, y: Any) -> Any:
            loss = inner(x, y)
            schedule.step()
            return loss

        return step

    plain, recorded = (with_schedule(t, s) for t, s in zip(trainings, schedules))
    eager.step = plain  # type: ignore[method-assign]
    run_both(eager, captured, range(12), capture(recorded))
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    assert schedules[0].last_epoch == schedules[1].last_epoch == 12


def test_gradients_accumulate_over_calls() -> None:
    """The captured part ends with backward; zero_grad and the optimizer run every third call."""

    def micro(training: Training) -> Callable[..., Any]:
        def step(x: Any, y: Any) -> Any:
            loss = F.cross_entropy(training.model(x), y) / 3
            loss.backward()
            return loss

        return step

    def between(training: Training, index: int) -> None:
        if index % 3 == 2:
            training.optimizer.step()
            training.optimizer.zero_grad()

    eager, captured = pair()
    step = capture(micro(captured))
    eager.step = micro(eager)  # type: ignore[method-assign]
    run_both(eager, captured, range(15), step, between)
    assert len(step.variants) == 2  # gradients absent, gradients present


def test_training_and_evaluation_are_two_courses() -> None:
    training = Training()
    training.model.train()
    evaluate = capture(lambda x: training.model(x))
    x, _ = batch(0)
    first = [evaluate(x) for _ in range(4)]
    assert any(not np.array_equal(first[2].numpy(), other.numpy()) for other in first[3:])
    training.model.eval()
    quiet = [evaluate(x).numpy() for _ in range(4)]
    for value in quiet[1:]:
        np.testing.assert_array_equal(value, quiet[0])
    with vt.no_grad():
        np.testing.assert_array_equal(training.model(x).numpy(), quiet[0])


def test_new_shapes_are_captured_on_demand() -> None:
    eager, captured = pair()
    step = capture(captured.step)
    for index in range(12):
        rows = 4 + index % 3
        losses = []
        for function in (eager.step, step):
            vt.manual_seed(index)
            losses.append(function(*batch(index, rows)).item())
        assert losses[0] == losses[1]
    same(eager, captured)
    assert len(step.variants) == 3


def test_beyond_the_budget_steps_run_eagerly() -> None:
    eager, captured = pair()
    step = capture(captured.step, max_variants=1)
    for index in range(3):
        for function in (eager.step, step):
            vt.manual_seed(index)
            function(*batch(index, 5))
    with pytest.warns(UserWarning, match="max_variants"):
        vt.manual_seed(9)
        step(*batch(9, 7))
    vt.manual_seed(9)
    eager.step(*batch(9, 7))
    same(eager, captured)
    assert len(step.variants) == 1


def test_results_keep_their_values() -> None:
    training = Training()
    step = capture(training.step)
    losses = [step(*batch(i)) for i in range(10)]
    values = [loss.item() for loss in losses]
    assert len(set(values)) == 10
    other = Training()
    vt.manual_seed(3)
    eager = Training()
    del other
    assert values[0] == eager.step(*batch(0)).item()


def test_gradients_are_where_eager_code_finds_them() -> None:
    eager, captured = pair()
    step = capture(captured.step)

    def between(training: Training, index: int) -> None:
        # As a logger would: reads, and sometimes drops, what the step left.
        norm = sum(p.grad.square().sum().item() for p in training.model.parameters())
        assert norm > 0
        if index % 2:
            training.optimizer.zero_grad()

    run_both(eager, captured, range(10), step, between)


def test_weights_that_move_are_noticed() -> None:
    eager, captured = pair()
    step = capture(captured.step)

    def between(training: Training, index: int) -> None:
        if index == 4:
            for p in training.model.parameters():
                p.data = p.data.clone() * 0.5

    run_both(eager, captured, range(9), step, between)


def test_weights_that_are_replaced_or_frozen_are_noticed() -> None:
    eager, captured = pair()
    step = capture(captured.step)

    def between(training: Training, index: int) -> None:
        if index == 4:
            training.model.inner.weight.requires_grad_(False)
        if index == 7:
            bias = vt.nn.Parameter(vt.full((4,), 0.5))
            training.model.outer.bias = bias

    run_both(eager, captured, range(11), step, between)


def test_alternating_modes_record_once_each() -> None:
    training = Training()
    forward = capture(lambda x: training.model(x).sum())
    x, _ = batch(0)
    for index in range(12):
        training.model.train(index % 2 == 0)
        forward(x)
    assert len(forward.variants) == 2
    assert sum(variant.replays for variant in forward.variants) == 10


def test_loading_state_between_replays() -> None:
    eager, captured = pair()
    saved: dict[int, Any] = {}
    step = capture(captured.step)

    def between(training: Training, index: int) -> None:
        if index == 3:
            saved[id(training)] = (
                {k: v.clone() for k, v in training.model.state_dict().items()},
                training.optimizer.state_dict(),
            )
            saved[id(training)] = copy.deepcopy(saved[id(training)])
        if index == 6:
            model, optimizer = saved[id(training)]
            training.model.load_state_dict(model)
            training.optimizer.load_state_dict(optimizer)

    run_both(eager, captured, range(12), step, between)


def test_options_of_the_optimizer_that_change() -> None:
    eager, captured = pair()
    step = capture(captured.step)

    def between(training: Training, index: int) -> None:
        if index == 4:
            training.optimizer.param_groups[0]["weight_decay"] = 0.5

    run_both(eager, captured, range(9), step, between)


def test_saving_between_replays(tmp_path: Any) -> None:
    eager, captured = pair()
    step = capture(captured.step)
    path = tmp_path / "state.pt"

    def between(training: Training, index: int) -> None:
        if index == 5:
            vt.save(training.model.state_dict(), path)
            loaded = vt.load(path)
            for key, value in training.model.state_dict().items():
                np.testing.assert_array_equal(loaded[key].numpy(), value.numpy())

    run_both(eager, captured, range(10), step, between)


def test_arguments_and_results_of_any_structure() -> None:
    w = vt.full((3,), 2.0)

    @capture
    def function(inputs: dict[str, Any], pairs: list[Any], scale: float = 1.0) -> Any:
        total = inputs["a"] * scale + pairs[0][1] * w
        return {"total": total, "parts": (total.sum(), [total[1:], "name"]), "weight": w}

    for i in range(5):
        a = np.full(3, float(i), dtype=np.float32)
        out = function({"a": a}, [(0, vt.full((3,), 1.0 + i))], scale=3.0)
        np.testing.assert_array_equal(out["total"].numpy(), a * 3 + (1 + i) * 2)
        assert out["parts"][0].item() == (a * 3 + (1 + i) * 2).sum()
        assert out["parts"][1][1] == "name"
        assert out["weight"].tolist() == [2.0, 2.0, 2.0]
    assert function.variants[0].replays == 4
    assert function({"a": a}, [(0, w)], scale=4.0)["total"].tolist() == (a * 4 + 4).tolist()
    assert len(function.variants) == 2


def test_constants_in_the_key_are_told_apart() -> None:
    double = capture(lambda x, factor: x * factor)
    x = vt.ones(2, dtype=vt.int64)
    for _ in range(3):
        assert double(x, 2).dtype == vt.int64
        assert double(x, 2.0).dtype == vt.float32
        assert double(x, True).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("what", "read"),
    [
        ("item", lambda t: t.sum().item()),
        ("float", lambda t: float(t.sum())),
        ("bool", lambda t: bool(t.sum() > 0)),
        ("tolist", lambda t: t.tolist()),
        ("numpy", lambda t: t.detach().numpy()),
        ("print", lambda t: repr(t)),
        ("nonzero", lambda t: t.nonzero()),
        ("mask", lambda t: t[t > 0]),
        ("unique", lambda t: t.unique()),
    ],
)
def test_host_reads_are_refused_with_their_line(what: str, read: Callable[[Any], Any]) -> None:
    training = Training()
    before = training.state()

    def step(x: Any) -> Any:
        y = training.model(x).detach()
        read(y)
        return y

    training.model.eval()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cannot be captured.*test_capture\.py:\d+"):
            capture(step)(batch(0)[0])
    for mine, other in zip(training.state(), before):
        np.testing.assert_array_equal(mine, other)
    # Nothing of the failed recording is left on the thread.
    assert capture(lambda x: x + 1)(vt.ones(1)).item() == 2


def test_an_error_at_any_op_leaves_everything_usable() -> None:
    """The step fails at each op in turn; what follows is as if the failed call had not been."""
    training = Training()
    training.model.eval()

    modes: list[Any] = []

    def step(x: Any) -> Any:
        # Inside: calls under a mode are not recorded.
        mode = vt.library.Mode(modes[0]) if modes else contextlib.nullcontext()
        with vt.no_grad(), mode:
            return training.model(x).softmax(-1).sum(0)

    x = batch(0)[0]
    expected = step(x).numpy()
    seen: list[str] = []
    modes.append(lambda original, name, args: (seen.append(name), original())[1])
    step(x)

    class Stop(Exception):
        pass

    assert len(seen) > 5
    for at in range(len(seen)):
        left = [at]

        def failing(original: Any, name: str, args: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            return original()

        captured = capture(step)
        modes[:] = [failing]
        with pytest.raises(Stop):
            captured(x)
        modes.clear()
        assert captured.variants == []
        for _ in range(3):
            np.testing.assert_array_equal(captured(x).numpy(), expected)
        assert captured.variants[0].replays == 2


def test_the_guide_is_true(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "capture.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    space: dict[str, Any] = {}
    exec(blocks[1], space)
    assert space["train_step"].variants[0].replays == 48
    assert space["schedule"].last_epoch == 50
    assert space["loss"].item() < 2.5
    exec(next(block for block in blocks if "def look(" in block), space)
    x = vt.randn(32, 4)
    slowest = space["look"](space["train_step"], x, x.sum(1, keepdim=True), tmp_path)
    assert 0 < slowest.share < 1 and space["schedule"].last_epoch == 50
    assert {file.name for file in tmp_path.iterdir()} == {"step.html", "step.json", "step.dot"}


def test_gradients_that_nobody_asked_for() -> None:
    """An op with outputs that are not made: layer norm without a bias, a convolution of data."""
    norm = vt.nn.LayerNorm(6, bias=False)
    conv = vt.nn.Conv2d(2, 6, 2, bias=False)

    def gradients(x: Any) -> Any:
        norm.weight.grad = conv.weight.grad = None
        norm(conv(x).flatten(2).transpose(1, 2)).square().sum().backward()
        return norm.weight.grad, conv.weight.grad

    step = capture(gradients)
    for i in range(5):
        x = vt.full((1, 2, 3, 3), 0.5 * i).cumsum(-1)
        got, expected = step(x), gradients(x)
        for mine, other in zip(got, expected):
            np.testing.assert_array_equal(mine.numpy(), other.numpy())
    assert step.variants[0].replays == 3


def test_a_step_that_hoards_is_refused() -> None:
    hoard: list[Any] = []

    def step(x: Any) -> Any:
        hoard.append(x * 2)
        return x + 1

    function = capture(step)
    with pytest.raises(CaptureError, match="leaves new tensors behind"):
        for _ in range(8):
            function(vt.ones(2))


def test_a_generator_of_its_own_is_refused() -> None:
    generator = vt.Generator(device=vt.ones(1).device).manual_seed(1)
    with pytest.raises(RuntimeError, match="default generator"):
        capture(lambda x: x + vt.rand(2, generator=generator))(vt.ones(2))


def test_reset_gives_memory_back() -> None:
    step = capture(lambda x: (x @ x).relu() @ x)
    x = vt.ones(64, 64)
    for _ in range(3):
        step(x)
    assert "2 replays" in step.report()
    step.reset()
    assert step.variants == []
    with pytest.raises(CaptureError, match="not been captured"):
        step.tape()


def test_modes_that_the_function_sets() -> None:
    """A step that calls train(), an evaluation that calls eval() and goes back: as in eager, and they
    replay."""
    runs = []
    for wrap in (lambda f: f, capture):
        vt.manual_seed(1)
        model = vt.nn.Sequential(vt.nn.Linear(4, 8), vt.nn.Dropout(0.5), vt.nn.Linear(8, 1))
        optimizer = vt.optim.SGD(model.parameters(), lr=0.1)

        @wrap
        def train_step(x: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            model.train()
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        @wrap
        def evaluate(x: Any, model: Any = model) -> Any:
            before = model.training
            model.eval()
            with vt.no_grad():
                y = model(x)
            model.train(before)
            return y.sum()

        vt.manual_seed(2)
        x = vt.randn(3, 4)
        seen = []
        for _ in range(5):
            for _ in range(3):
                seen.append(train_step(x).item())
                assert all(module.training for module in model.modules())
            model.eval()
            seen += [model(x).sum().item(), evaluate(x).item()]
            assert not any(module.training for module in model.modules())
            seen.append(train_step(x).item())
            seen.append(evaluate(x).item())
            assert all(module.training for module in model.modules())
            model.eval()
        runs.append(seen)
        if isinstance(train_step, CapturedStep) and isinstance(evaluate, CapturedStep):
            assert train_step._captures == 2 and evaluate._captures == 2
            assert sum(v.replays for v in train_step.variants) >= 15
    assert runs[0] == runs[1]


def test_compiled_functions_that_leave_modes_changed_run_as_they_are() -> None:
    layer = vt.nn.Dropout(0.5)
    function = vt.compile(lambda x: (layer(x) + 1, layer.eval())[0])
    x = vt.ones(3)
    for i in range(3):
        layer.train()
        vt.manual_seed(0)
        wanted = layer(x) + 1
        vt.manual_seed(0)
        told = (
            pytest.warns(UserWarning, match="in another mode")
            if i == 0
            else contextlib.nullcontext()
        )
        with told:
            assert function(x).tolist() == wanted.tolist()
        assert not layer.training


def test_attributes_that_another_function_sets_are_watched() -> None:
    class Scaled(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tau = 1.0

        def forward(self, x: Any) -> Any:
            return x * self.tau

    model, x = Scaled(), vt.ones(2)

    def halve(x: Any) -> Any:
        y = model(x)
        model.tau = model.tau * 0.5
        return y

    train, evaluate = capture(halve), capture(lambda x: model(x))
    for _ in range(3):
        assert evaluate(x).tolist() == [1.0, 1.0]
    train(x)
    model.tau = 7.0
    assert evaluate(x).tolist() == [7.0, 7.0]


def test_a_generator_of_its_own_that_stands_where_the_default_one_does() -> None:
    generator = vt.Generator(device=vt.ones(1).device).manual_seed(3)
    vt.manual_seed(3)
    step = capture(lambda x: x + vt.rand(3, generator=generator))
    with pytest.raises(RuntimeError, match="default generator"):
        for _ in range(4):
            step(vt.zeros(3))


def test_results_made_of_the_hosts_data_are_new_each_time() -> None:
    @capture
    def step(x: Any) -> Any:
        return (x * x).mean(), vt.tensor(4.0), vt.tensor([1.0, 2.0])

    total = vt.zeros(())
    for _ in range(5):
        loss, count, pair_of = step(vt.ones(4))
        assert (loss.item(), count.item(), pair_of.tolist()) == (1.0, 4.0, [1.0, 2.0])
        total += count
        count.add_(1)
        pair_of.mul_(10)
    assert total.item() == 20.0


def test_arguments_in_the_memory_of_state_that_the_step_changes_are_refused_by_replays_too() -> (
    None
):
    state = vt.zeros(3)

    @capture
    def step(x: Any) -> Any:
        state.add_(1)
        return x * 2

    for _ in range(3):
        step(vt.ones(3))
    for argument in (state, state[:], state.detach()):
        with pytest.raises(CaptureError, match="also uses by another way"):
            step(argument)
    count = state[0].item()
    assert step(vt.ones(3)).tolist() == [2.0] * 3 and state[0].item() == count + 1


def test_one_hot_of_so_many_classes() -> None:
    step = capture(lambda i: F.one_hot(i, 4))
    for classes in ([1, 2], [3, 0], [0, 0]):
        index = vt.tensor(classes)
        assert step(index).tolist() == F.one_hot(index, 4).tolist()


def test_gradients_of_arguments() -> None:
    """As attacks on inputs take them: the argument is a copy, whose .grad is the function's own."""
    model = vt.nn.Linear(3, 2)
    plain = copy.deepcopy(model)

    def attack(model: Any, x: Any) -> Any:
        x = x.requires_grad_()
        first = x.grad is None
        model(x).sum().backward()
        return x.detach() + 0.1 * x.grad.sign() * first

    step = capture(lambda x: attack(model, x))
    for i in range(6):
        vt.manual_seed(i)
        x = vt.randn(2, 3)
        assert step(x).tolist() == attack(plain, x.clone()).tolist()
        assert model.weight.grad.tolist() == plain.weight.grad.tolist()
    assert sum(v.replays for v in step.variants) >= 3


def test_a_captured_function_inside_another() -> None:
    weight = vt.ones(2)
    inner = capture(lambda x: x * weight)
    for _ in range(3):
        inner(vt.ones(2))
    outer = capture(lambda x: inner(x) + 1)
    for i in range(5):
        assert outer(vt.full((2,), float(i))).tolist() == [i + 1.0] * 2
        weight.add_(0)
    assert outer.variants[0].replays >= 3 and inner(vt.ones(2)).tolist() == [1.0] * 2
