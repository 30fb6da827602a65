"""The benchmarks' workloads at a tiny size: captured training is eager training, bit for bit, or within
the bound that the passes state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from workloads import WORKLOADS, load_initial_weights

import vibetensor.torch as vt
from tests.graphs.default_device import kind, random_state, set_random_state
from vibetensor.graphs import CapturedStep, Tape, capture, passes
from vibetensor.graphs.passes import dead_code
from vibetensor.graphs.rewrite import make_op
from vibetensor.train.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state

STEPS = 100
MICRO_STEPS = 2  # whose gradients add up to one update's
# A pass bounds what its own ops change. A step's results depend on many of them, and on what backward
# and the optimizer make of the differences.
AMPLIFIED = 100.0

Snapshot = dict[str, np.ndarray]


class Training:
    """A workload with dropout, clipping, accumulation, a cosine schedule, and random numbers of its own."""

    def __init__(self, name: str, *, seed: int = 0, dtype: str = "float32") -> None:
        workload = WORKLOADS[name]
        self.config = dataclasses.replace(workload.tiny, dropout=0.1)
        self.draw = workload.batch
        self.dtype = dtype
        vt.manual_seed(seed)
        self.model = workload.make(vt, self.config)
        load_initial_weights(vt, self.model, seed)
        self.optimizer = workload.make_optimizer(vt, self.model.parameters())
        self.schedule = vt.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=STEPS)
        self.random = rng_state()

    def loss(self, x: Any, y: Any) -> Any:
        with vt.autocast(kind(), dtype=vt.bfloat16, enabled=self.dtype == "bfloat16"):
            return self.model(x, y) / MICRO_STEPS

    def step(self, x: Any, y: Any) -> Any:
        """One update. x, y: batches, one after the other."""
        self.optimizer.zero_grad(set_to_none=True)
        total = vt.zeros(())
        for index in range(MICRO_STEPS):
            loss = self.loss(x[index], y[index])
            loss.backward()
            total = total + loss.detach()
        norm = vt.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return total, norm

    def data(self, index: int) -> tuple[Any, Any]:
        """The batches of a step: the same for all runs, others at each step."""
        rng = np.random.default_rng([index, 17])
        batches = [self.draw(self.config, rng) for _ in range(MICRO_STEPS)]
        return tuple(vt.tensor(np.stack(arrays)) for arrays in zip(*batches))  # type: ignore[return-value]

    def run(self, step: Callable[..., Any], steps: range) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step."""
        set_rng_state(self.random)
        results = [step(*self.data(index)) for index in steps]
        self.random = rng_state()
        return [(loss.item(), norm.item()) for loss, norm in results]

    def tensors(self) -> dict[str, Any]:
        """All that training changes, by name."""
        names = {p: name for name, p in self.model.named_parameters()}
        found = {f"weight {name}": value for name, value in self.model.state_dict().items()}
        found |= {f"gradient {name}": p.grad for p, name in names.items() if p.grad is not None}
        for p, state in self.optimizer.state.items():
            found |= {
                f"{key} {names[p]}": value
                for key, value in state.items()
                if isinstance(value, vt.Tensor)
            }
        return found

    def snapshot(self) -> Snapshot:
        return {name: value.detach().numpy().copy() for name, value in self.tensors().items()}


@dataclasses.dataclass(frozen=True)
class Expected:
    results: list[tuple[float, float]]
    end: Snapshot
    random: dict[str, Any]
    rate: float


@functools.cache
def eager(name: str, dtype: str = "float32") -> Expected:
    """What an eager run of a workload gives."""
    training = Training(name, dtype=dtype)
    results = training.run(training.step, range(STEPS))
    assert results[-1] != results[0] and np.isfinite(results).all()
    return Expected(
        results, training.snapshot(), training.random, training.optimizer.param_groups[0]["lr"]
    )


def assert_agree(mine: Snapshot, other: Snapshot, bound: float, rate: float) -> None:
    """Bit for bit with a bound of 0, else relative to each tensor's largest element."""
    assert mine.keys() == other.keys()
    for name, expected in other.items():
        if bound == 0:
            np.testing.assert_array_equal(mine[name], expected, err_msg=name)
            continue
        # Adam divides by the gradient's size: where that is noise, so is the update's sign.
        away = 2 * rate if name.startswith("weight") else 0.0
        limit = AMPLIFIED * bound * np.abs(expected).max(initial=0) + away
        np.testing.assert_allclose(mine[name], expected, rtol=0, atol=limit, err_msg=name)


def assert_each_step_agrees(name: str, dtype: str, steps: int) -> CapturedStep:
    """Captured steps, each from the eager run's state, so that differences do not add up. The bound
    is the one that the capture's passes state."""
    trainings = Training(name, dtype=dtype), Training(name, dtype=dtype)
    step = capture(trainings[1].step)
    for index in range(steps):
        before = [t.optimizer.param_groups[0]["lr"] for t in trainings]
        (theirs,) = trainings[0].run(trainings[0].step, range(index, index + 1))
        (mine,) = trainings[1].run(step, range(index, index + 1))
        assert before[0] == before[1]
        ran = step.tape() if step.variants else step._once
        bound = ran.bound if ran else 0.0
        np.testing.assert_allclose(mine, theirs, rtol=AMPLIFIED * bound, err_msg=str(index))
        shots = [t.snapshot() for t in trainings]
        assert_agree(shots[1], shots[0], bound, before[0])
        if bound:
            expected = trainings[0].tensors()
            with vt.no_grad():
                for key, tensor in trainings[1].tensors().items():
                    tensor.copy_(expected[key])
    assert step.variants[0].replays >= steps - 3
    return step


def assert_equal_run(name: str, dtype: str, step_of: Callable[[Training], CapturedStep]) -> None:
    training = Training(name, dtype=dtype)
    step = step_of(training)
    expected = eager(name, dtype)
    assert training.run(step, range(STEPS)) == expected.results
    assert_agree(training.snapshot(), expected.end, 0, 0)
    assert training.random["vibetensor"] == expected.random["vibetensor"]
    assert training.optimizer.param_groups[0]["lr"] == expected.rate
    assert (len(step.variants), step.variants[0].replays) == (1, STEPS - 2)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_hundred_captured_steps_are_the_eager_ones(name: str) -> None:
    assert_equal_run(name, "float32", lambda training: capture(training.step, optimize=False))


UNDER_AUTOCAST = ("minigpt", "vit", "llama1b")  # one of each architecture


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_a_hundred_steps_under_autocast_are_the_eager_ones(name: str) -> None:
    assert_equal_run(name, "bfloat16", lambda training: capture(training.step, optimize=False))


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_hundred_steps_with_passes_are_the_eager_ones(name: str) -> None:
    """Bit for bit where the passes that applied are, else each step within their bound."""
    training = Training(name)
    step = capture(training.step)
    training.run(step, range(3))
    if step.tape().bound == 0:
        assert_equal_run(name, "float32", lambda training: capture(training.step))
    else:
        assert_each_step_agrees(name, "float32", STEPS)


def _name_of(one: ModuleType) -> str:
    return one.__name__.rsplit(".", 1)[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("one", passes.ALL, ids=_name_of)
def test_each_pass_keeps_to_its_bound(
    one: ModuleType, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no other pass but the one that removes what nothing reads."""
    monkeypatch.setattr(passes, "ALL", (one, dead_code) if one is not dead_code else (one,))
    for name in WORKLOADS if dtype == "float32" else UNDER_AUTOCAST:
        step = assert_each_step_agrees(name, dtype, 6)
        assert not one.BITWISE or step.tape().bound == 0, name


def test_the_comparison_knows_a_pass_that_breaks_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a fusion: another form of gelu, away from the recorded one by 1e-4 or so."""

    def approximates(bound: float) -> ModuleType:
        def run(tape: Tape) -> Tape:
            ops = [
                make_op("gelu", (op.inputs[0],), op.outputs, op, approximate="tanh")
                if op.name == "gelu"
                else op
                for op in tape.ops
            ]
            return tape.replaced(ops, bound=bound)

        made = ModuleType("approximates")
        made.run = run  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(passes, "ALL", (approximates(1e-2),))
    assert_each_step_agrees("reverse", "float32", 10)
    monkeypatch.setattr(passes, "ALL", (approximates(1e-12),))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_each_step_agrees("reverse", "float32", 10)


def _save_with_serialization(training: Training, folder: Path) -> None:
    state = {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "random": (vt.get_rng_state(), random_state()),
    }
    vt.save(state, folder / "state.pt")


def _load_with_serialization(training: Training, folder: Path) -> None:
    state = vt.load(folder / "state.pt")
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.schedule.load_state_dict(state["schedule"])
    on_host, on_device = state["random"]
    vt.set_rng_state(on_host), set_random_state(on_device)


def _save_checkpoint(training: Training, folder: Path) -> None:
    save_checkpoint(
        folder, 1, training.model, training.optimizer, config={}, scheduler=training.schedule
    )


def _load_checkpoint(training: Training, folder: Path) -> None:
    load_checkpoint(
        folder / "step_1", training.model, training.optimizer, scheduler=training.schedule
    )


CHECKPOINTS = {
    "vt.save": (_save_with_serialization, _load_with_serialization),
    "checkpoint": (_save_checkpoint, _load_checkpoint),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_run_goes_on_from_a_checkpoint(name: str, how: str, tmp_path: Path) -> None:
    """Saved between replays in mid-run, loaded into fresh objects, captured again: as if it had
    never stopped. So does the run that was saved."""
    save, load = CHECKPOINTS[how]
    half = STEPS // 2
    expected = eager(name)
    first = Training(name)
    step = capture(first.step, optimize=False)
    assert first.run(step, range(half)) == expected.results[:half]
    set_rng_state(first.random)
    save(first, tmp_path)
    second = Training(name, seed=99)
    second.run(second.step, range(2))  # weights, moments and random numbers of its own
    load(second, tmp_path)
    second.random = rng_state()
    assert second.random["vibetensor"] == first.random["vibetensor"]
    again = capture(second.step, optimize=False)
    assert second.run(again, range(half, STEPS)) == expected.results[half:]
    assert_agree(second.snapshot(), expected.end, 0, 0)
    assert again.variants[0].replays >= half - 2
    assert first.run(step, range(half, half + 3)) == expected.results[half : half + 3]


@pytest.mark.parametrize("name", WORKLOADS)
def test_accumulation_over_calls_is_the_eager_one(name: str) -> None:
    """One captured function for a micro-step, called several times, and one for the update."""

    def run(wrap: Callable[..., Any]) -> tuple[list[float], Snapshot, list[Any]]:
        training = Training(name)

        def micro_step(x: Any, y: Any) -> Any:
            loss = training.loss(x, y)
            loss.backward()
            return loss

        def update() -> Any:
            norm = vt.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
            training.optimizer.step()
            training.schedule.step()
            return norm

        add, finish = wrap(micro_step), wrap(update)
        set_rng_state(training.random)
        results = []
        for index in range(20):
            training.optimizer.zero_grad(set_to_none=True)
            x, y = training.data(index)
            results += [add(x[micro], y[micro]).item() for micro in range(MICRO_STEPS)]
            results.append(finish().item())
        return results, training.snapshot(), [add, finish]

    theirs, their_end, _ = run(lambda function: function)
    mine, end, captures = run(lambda function: capture(function, optimize=False))
    assert mine == theirs
    assert_agree(end, their_end, 0, 0)
    assert all(sum(v.replays for v in step.variants) >= 17 for step in captures)
