"""A profiled replay: what it measures, and that it is no step."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import random_state, set_random_state
from vibetensor.graphs import CaptureError, capture
from vibetensor.graphs import profile as profiles
from vibetensor.graphs.profile import EventClock, HostClock, profile, seconds_text


class Training:
    """A small step with everything that a replay changes."""

    def __init__(self) -> None:
        vt.manual_seed(3)
        self.model = vt.nn.Sequential(
            vt.nn.Linear(4, 8), vt.nn.BatchNorm1d(8), vt.nn.Dropout(0.3), vt.nn.Linear(8, 1)
        )
        self.optimizer = vt.optim.AdamW(self.model.parameters(), lr=0.05)
        self.schedule = vt.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)
        self.step = capture(self.run)

    def run(self, x: Any, y: Any) -> Any:
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.model(x), y)
        loss.backward()
        vt.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss

    def batch(self, index: int, rows: int = 6) -> tuple[Any, Any]:
        x = vt.tensor(np.random.default_rng(index).normal(size=(rows, 4)).astype(np.float32))
        return x, x.sum(1, keepdim=True)

    def state(self) -> list[Any]:
        """Copies of all that a step changes."""
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, vt.Tensor)
        ]
        tensors = [*self.model.state_dict().values(), *moments]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        host = [self.schedule.last_epoch, self.optimizer.param_groups[0]["lr"]]
        return [t.detach().clone().numpy() for t in (*tensors, random_state())] + host


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("given", [False, True], ids=["last inputs", "given inputs"])
def test_a_profile_is_no_step(given: bool) -> None:
    plain, timed = Training(), Training()
    losses: list[list[float]] = []
    for one in (plain, timed):
        vt.manual_seed(11)
        seen = []
        for index in range(8):
            loss = one.step(*one.batch(index))
            if one is timed and index >= 2:
                before, gradients = one.state(), [p.grad for p in one.model.parameters()]
                kept = loss.item()
                one.step.profile(*(one.batch(99) if given else ()))
                assert same(one.state(), before)
                assert all(p.grad is g for p, g in zip(one.model.parameters(), gradients))
                assert loss.item() == kept
            seen.append(loss.item())
        losses.append(seen)
    assert losses[0] == losses[1] and len(set(losses[0])) == 8
    assert same(plain.state(), timed.state())
    assert [v.replays for v in plain.step.variants] == [v.replays for v in timed.step.variants]


def test_given_arguments_choose_the_capture() -> None:
    one = Training()
    for rows in (6, 6, 6, 3, 3):
        one.step(*one.batch(0, rows))
    wide, narrow = one.step.variants
    assert one.step.profile() is narrow.profile and wide.profile is None
    assert one.step.profile(*one.batch(1, 6)) is wide.profile
    with pytest.raises(CaptureError, match="no capture for these arguments"):
        one.step.profile(*one.batch(1, 5))
    with pytest.raises(CaptureError, match="has not been captured"):
        capture(lambda x: x).profile()
    loss = one.step(*one.batch(7, 3))  # its own inputs, not those of a profile
    twin = Training()
    for rows, index in ((6, 0), (6, 0), (6, 0), (3, 0), (3, 0), (3, 7)):
        expected = twin.step(*twin.batch(index, rows))
    assert loss.item() != 0 and expected.shape == loss.shape


def test_inputs_that_the_step_changes_are_as_they_were() -> None:
    @capture
    def step(x: Any) -> Any:
        x.mul_(2)
        return x.sum()

    for _ in range(3):
        assert step(vt.ones(3)).item() == 6
    for inputs in ((), (vt.full((3,), 5.0),)):
        step.profile(*inputs)
        assert step(vt.ones(3)).item() == 6


def test_arrays_of_every_kind_are_staged() -> None:
    step = capture(lambda x, y: (vt.as_tensor(x) * vt.as_tensor(y)).sum())
    for x, y in ((np.arange(3.0)[::-1], np.arange(3.0)), (np.arange(3.0), np.float64(2.0))):
        for _ in range(3):
            expected = step(x, y).item()
        assert expected == float((x * y).sum())
        assert step.profile(x, y).ops
        assert step(x, y).item() == expected


def test_an_op_that_raises_leaves_state_as_it_was() -> None:
    table = vt.arange(12.0).reshape(4, 3)
    total = vt.zeros(3)

    @capture
    def step(index: Any) -> None:
        total.add_(1)
        total.add_(vt.index_select(table, 0, index).sum(0))

    for _ in range(3):
        step(vt.tensor([1, 2]))
    before = total.tolist()
    random = random_state().tolist()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        step.profile(vt.tensor([1, 9]))
    assert total.tolist() == before and random_state().tolist() == random
    step.profile(vt.tensor([0, 1]))
    assert total.tolist() == before


class Ticks:
    """A clock on which the nth op of a run takes n seconds, and every run one tick more."""

    def __init__(self) -> None:
        self.marks = 0
        self.runs = 0

    def mark(self) -> None:
        self.marks += 1

    def seconds(self) -> list[float]:
        count, self.marks = self.marks - 1, 0
        self.runs += 1
        return [float(n + self.runs % 3) for n in range(1, count + 1)]


def test_ops_of_a_program_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a device whose graph runs as one: other instructions, the same memory."""
    one = Training()
    for index in range(4):
        one.step(*one.batch(index))
    variant, before, random = one.step.last, one.state(), random_state()
    assert variant is not None
    written = profiles._written(variant)
    kept = [t.clone() for t in written]
    variant.lowered.program.run()
    expected = [t.tolist() for t in written]
    for t, value in zip(written, kept):
        t.copy_(value)
    set_random_state(random)
    seen: list[Any] = []

    class Watch(Ticks):
        def seconds(self) -> list[float]:
            if self.marks > 2:  # a run op by op has just ended
                seen.append([t.tolist() for t in written])
            return super().seconds()

    monkeypatch.setattr(profiles, "_on_host", lambda variant: False)
    found = profile(variant, runs=2, clock=Watch())
    assert len(found.medians) == len(variant.lowered.program)
    assert seen == [expected] * 3
    assert sum(a != b.tolist() for a, b in zip(expected, kept)) >= 8  # weights, moments, gradients
    assert same(one.state(), before)


def test_sums_by_op_phase_and_line() -> None:
    w = vt.ones(3, requires_grad=True)

    @capture
    def step(x: Any) -> Any:
        y = (w * x).exp()
        loss = y.sum()
        loss.backward()
        return loss

    for _ in range(4):
        w.grad = None
        step(vt.ones(3))
    variant = step.variants[0]
    clock = Ticks()
    found = profile(variant, runs=5, clock=clock)
    assert clock.runs == 1 + 2 * 5  # a warm-up, then op by op and as one in turn
    running = [(at, op) for at, op in enumerate(variant.tape.ops) if not op.is_view]
    assert list(zip(found.indices, found.ops)) == running
    count = len(running)
    assert count >= 5 and found.runs == 5
    runs = [[n + run % 3 for n in range(1, count + 1)] for run in (2, 4, 6, 8, 10)]
    assert found.medians == [statistics.median(times) for times in zip(*runs)]
    assert found.replay == statistics.median([1 + run % 3 for run in (3, 5, 7, 9, 11)])
    for rows, key in (
        (found.by_op(), lambda op: op.name),
        (found.by_phase(), lambda op: op.phase),
        (found.by_line(), lambda op: f"{op.source.file}:{op.source.line}"),
    ):
        expected: dict[str, float] = {}
        for op, seconds in zip(found.ops, found.medians):
            expected[key(op)] = expected.get(key(op), 0.0) + seconds
        assert {row.name: row.seconds for row in rows} == expected
        assert [row.seconds for row in rows] == sorted(expected.values(), reverse=True)
        assert sum(row.ops for row in rows) == count
        assert sum(row.share for row in rows) == pytest.approx(1.0)
    text = str(found)
    assert f"({count} ops, medians of 5 runs)" in text and "forward, " in text
    variant.profile = found
    assert f"  {seconds_text(found.replay)} a replay, median of 5; op by op:" in step.report()


def test_times_are_of_the_work() -> None:
    side = 512 if vt.get_default_device().type == "cpu" else 4096
    small, large = vt.ones(8, 8), vt.ones(side, side)

    @capture
    def step() -> Any:
        return (small @ small).sum() + (large @ large).sum()

    for _ in range(3):
        step()
    found = step.profile()
    products = [
        seconds for op, seconds in zip(found.ops, found.medians) if op.name in ("mm", "matmul")
    ]
    assert len(products) == 2 and products[1] > 10 * products[0] > 0
    assert found.by_op()[0].name in ("mm", "matmul") and found.by_op()[0].share > 0.5
    assert 5 <= found.runs <= 101


def test_host_clock_measures_between_marks() -> None:
    clock = HostClock()
    assert clock.seconds() == []
    for _ in range(3):
        clock.mark()
    assert len(clock.seconds()) == 2 and clock.seconds() == []


def test_event_clock_waits_for_the_last_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.waited = False
            self.at = 2.0 ** len(made)
            made.append(self)

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: Event) -> float:
            assert made[-1].waited
            return end.at - self.at

    monkeypatch.setattr(profiles.vt.cuda, "Event", Event)
    clock = EventClock()
    for _ in range(4):
        clock.mark()
    assert clock.seconds() == pytest.approx([0.001, 0.002, 0.004])
    assert [event.waited for event in made] == [False, False, False, True]
    assert clock.seconds() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ns"),
        (1.234e-7, "123 ns"),
        (1e-6, "1 µs"),
        (1.2345e-5, "12.3 µs"),
        (4.5678e-4, "457 µs"),
        (0.0123, "12.3 ms"),
        (2.5, "2.5 s"),
        (1234.5, "1234 s"),
    ],
)
def test_seconds_as_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


# --- the trace


def test_chrome_trace_holds_every_op_in_its_phase(tmp_path: Path) -> None:
    one = Training()
    for index in range(4):
        one.step(*one.batch(index))
    before = one.state()
    path = tmp_path / "trace.json"
    one.step.chrome_trace(path)  # takes a profile of its own
    assert same(one.state(), before)
    variant = one.step.last
    assert variant is not None
    found = variant.profile
    data = json.loads(path.read_text(encoding="utf-8"))
    tracks = {
        event["tid"]: event["args"]["name"]
        for event in data["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert sorted(tracks.values()) == ["backward", "forward", "optimizer"]
    ops = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert [event["args"]["op"] for event in ops] == found.indices
    now = 0.0
    for event, op, seconds in zip(ops, found.ops, found.medians):
        assert event["name"] == op.name and event["args"]["call"] == op.text()
        assert tracks[event["tid"]] == event["cat"] == op.phase
        assert event["args"]["line"] == f"{op.source.file}:{op.source.line} {op.source.function}"
        assert event["ts"] == pytest.approx(now) and event["dur"] == pytest.approx(seconds * 1e6)
        now += event["dur"]
        assert {"pid", "tid"} <= event.keys()
    linear = next(event for event in ops if event["name"] == "linear")
    assert linear["args"]["bytes read"] == 4 * (6 * 4 + 8 * 4 + 8)
    assert linear["args"]["bytes written"] == 4 * 6 * 8
    live = [event["args"]["live bytes"] for event in data["traceEvents"] if event["ph"] == "C"]
    (plan,) = variant.lowered.plans.values()
    assert len(live) == len(ops) and max(live) == plan.lower_bound
