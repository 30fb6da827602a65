"""Loss scaling inside captures: the device skips what overflows, with eager's bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import Graph, capture, graph

INF, NAN = math.inf, math.nan
LOSSES = {
    "overflows": [1.0, 0.5, INF, 0.25, 1.0, NAN, INF, 2.0, 1.0, -INF, 0.5, 0.5, 0.5],
    "overflow first": [INF, NAN, 1.0, 0.5, INF, 0.25, 1.0, 2.0],
    "none": [1.0, 0.5, 0.25, 1.0, 2.0, 0.5],
}


class Lion(vt.optim.Optimizer):
    """An optimizer that knows nothing of scalers or captures."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.125})

    def step(self, closure: Any = None) -> None:
        with vt.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if "mean" not in state:
                        state["mean"] = vt.zeros_like(p)
                    state["mean"].lerp_(p.grad, 0.3)
                    p.add_(state["mean"].sign(), alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: vt.optim.SGD(p, lr=0.125),
    "sgd momentum": lambda p: vt.optim.SGD(p, lr=0.125, momentum=0.9, dampening=0.25),
    "sgd plain": lambda p: vt.optim.SGD(p, lr=0.125, momentum=0.9, foreach=False),
    "sgd fused": lambda p: vt.optim.SGD(p, lr=0.125, momentum=0.9, fused=True),
    "adam": lambda p: vt.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw plain": lambda p: vt.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw fused": lambda p: vt.optim.AdamW(p, lr=0.1, fused=True),
    "foreign": Lion,
}


class Run:
    def __init__(self, optimizer: str, clip: bool) -> None:
        self.params = [
            vt.nn.Parameter(vt.tensor([1.0, -2.0, 0.5])),
            vt.nn.Parameter(vt.tensor([[0.25]])),
        ]
        self.optimizer = OPTIMIZERS[optimizer](self.params)
        self.scaler = vt.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.clip = clip

    def step(self, factor: Any) -> Any:
        self.optimizer.zero_grad()
        loss = sum((p * p * factor).sum() for p in self.params)
        self.scaler.scale(loss).backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            vt.nn.utils.clip_grad_norm_(self.params, 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def state(self) -> list[Any]:
        tensors: list[Any] = [p.detach() for p in self.params]
        tensors += [p.grad for p in self.params]
        for p in self.params:
            state = self.optimizer.state.get(p, {})
            tensors += [state[key] for key in sorted(state)]
        return [repr(t.tolist()) for t in tensors] + [self.scaler.state_dict()]


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_captured_steps_are_eager_ones(name: str, clip: bool, losses: str) -> None:
    eager, captured = Run(name, clip), Run(name, clip)
    step = capture(captured.step)
    for i, factor in enumerate(LOSSES[losses]):
        x = vt.tensor(factor)
        assert repr(step(x).item()) == repr(eager.step(x).item())
        assert captured.state() == eager.state(), i
    assert captured.state() == eager.state()
    assert sum(v.replays for v in step.variants) >= 2


@pytest.mark.parametrize("losses", ["overflows", "none"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replays_of_a_graph_are_eager_steps(name: str, clip: bool, losses: str) -> None:
    eager, captured = Run(name, clip), Run(name, clip)
    x = vt.tensor(1.0)
    if name in ("foreign", "sgd momentum"):  # make their state in their first step
        for run in (eager, captured):
            run.step(x)
    g = Graph()
    with graph(g):
        loss = captured.step(x)
    for i, factor in enumerate(LOSSES[losses]):
        x.fill_(factor)
        g.replay()
        assert repr(loss.item()) == repr(eager.step(vt.tensor(factor)).item())
        assert captured.state() == eager.state(), i


def test_a_skipped_step_is_not_counted() -> None:
    run = Run("adam", clip=False)
    step = capture(run.step)
    for factor in (1.0, 1.0, 1.0, INF, NAN, 1.0):
        step(vt.tensor(factor))
    assert step.variants[0].replays == 4
    assert run.optimizer.state[run.params[0]]["step"].item() == 4
    assert run.scaler.get_scale() == 4.0


def test_two_optimizers_and_one_scaler() -> None:
    def run(wrap: Any) -> list[Any]:
        a, b = (vt.nn.Parameter(vt.ones(2)) for _ in range(2))
        first, second = vt.optim.SGD([a], lr=0.1), vt.optim.Adam([b], lr=0.1)
        scaler = vt.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

        def step(x: Any, y: Any) -> None:
            for optimizer in (first, second):
                optimizer.zero_grad()
            scaler.scale((a * x).sum() + (b * y).sum()).backward()
            scaler.step(first)
            scaler.step(second)
            scaler.update()

        function = wrap(step)
        for x, y in ((1, 1), (1, 1), (INF, 1), (1, INF), (2, 3), (1, 1), (1, 2), (1, 1)):
            function(vt.tensor(float(x)), vt.tensor(float(y)))
        return [a.tolist(), b.tolist(), scaler.state_dict(), second.state[b]["step"].item()]

    assert run(capture) == run(lambda f: f)


def test_a_checkpoint_between_replays() -> None:
    eager, captured = Run("adam", clip=True), Run("adam", clip=True)
    step = capture(captured.step)
    for i, factor in enumerate(LOSSES["overflows"]):
        if i == 5:
            for run in (eager, captured):
                saved = run.scaler.state_dict()
                saved["scale"] = 2.0
                run.scaler.load_state_dict(saved)
        eager.step(vt.tensor(factor))
        step(vt.tensor(factor))
    assert captured.state() == eager.state()


def test_a_disabled_scaler() -> None:
    run = Run("adam", clip=False)
    run.scaler = vt.amp.GradScaler("cpu", enabled=False)
    step = capture(run.step)
    for _ in range(4):
        step(vt.tensor(1.0))
    assert step.variants[0].replays >= 1
