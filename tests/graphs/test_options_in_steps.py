"""Options of optimizers that change while a captured step runs: by schedules before the update, by
hooks of the step, in lists. Replays follow them or are refused; none goes on with old numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CaptureError, capture

optim = vt.optim
schedules = vt.optim.lr_scheduler
STEPS = 12
Make = Callable[[Any], Any]


class Decay(schedules.LRScheduler):
    """Another weight decay every `every` steps."""

    every = 1

    def get_lr(self) -> list[Any]:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.01 * (self.last_epoch // self.every)
        return [group["lr"] for group in self.optimizer.param_groups]


class RareDecay(Decay):
    every = 7


def one_cycle(optimizer: Any) -> Any:
    return schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)


def through_zero(optimizer: Any) -> Any:
    return schedules.CyclicLR(
        optimizer, 0.1, 0.1, step_size_up=2, base_momentum=0.0, max_momentum=0.9
    )


def trained(
    wrap: Callable[[Any], Any], make: Make, schedule: Make | None = None, after: bool = False
) -> list[float]:
    """The weights after some steps of a model whose schedule steps before the optimizer does."""
    vt.manual_seed(0)
    model = vt.nn.Linear(3, 2, bias=False)
    optimizer = make(model.parameters())
    scheduler = None if schedule is None else schedule(optimizer)

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if scheduler is not None and not after:
            scheduler.step()
        optimizer.step()
        if scheduler is not None and after:
            scheduler.step()
        return loss

    run = wrap(step)
    x = vt.randn(4, 3)
    for i in range(STEPS):
        run(x * (i + 1) / STEPS)
    return model.weight.detach().flatten().tolist()


def eagerly(f: Any) -> Any:
    return f


FUSED: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=0.1),
}
PLAIN: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "Adam": lambda p: optim.Adam(p, lr=0.1, foreach=False),
    "Muon": lambda p: optim.Muon(p, lr=0.1),
}
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")


@pytest.mark.parametrize("name", FUSED)
def test_replays_read_momenta_that_a_schedule_has_changed_before(name: str) -> None:
    expected = trained(eagerly, FUSED[name], one_cycle)
    assert trained(capture, FUSED[name], one_cycle) == expected


@pytest.mark.parametrize("name", PLAIN)
def test_momenta_that_are_part_of_the_program_must_not_change_before_it(name: str) -> None:
    with pytest.raises(CaptureError, match="a schedule changes (momentum|betas) of .* before"):
        trained(capture, PLAIN[name], one_cycle)
    expected = trained(eagerly, PLAIN[name], one_cycle, after=True)
    assert trained(capture, PLAIN[name], one_cycle, after=True) == expected


@pytest.mark.parametrize("schedule", [through_zero, Decay], ids=lambda s: s.__name__)
def test_options_that_no_replay_reads(schedule: Make) -> None:
    make = FUSED["SGD"]
    with pytest.raises(CaptureError, match="step the schedule after the optimizer"):
        trained(capture, make, schedule)
    expected = trained(eagerly, make, schedule, after=True)
    assert trained(capture, make, schedule, after=True) == expected


def test_an_option_that_changes_long_after_the_capture_stops_that_replay() -> None:
    with pytest.raises(RuntimeError, match="a schedule changes weight_decay of SGD.*0.01"):
        trained(capture, FUSED["SGD"], RareDecay)
    expected = trained(eagerly, FUSED["SGD"], RareDecay, after=True)
    assert trained(capture, FUSED["SGD"], RareDecay, after=True) == expected


@pytest.mark.parametrize("name", PLAIN)
def test_a_graph_in_the_manner_of_torch_does_not_go_on_either(name: str) -> None:
    def as_graph(step: Any) -> Any:
        x, runs = vt.zeros(4, 3), 0
        graph = vt.Graph()

        def run(given: Any) -> None:
            nonlocal runs
            x.copy_(given)
            runs += 1
            if runs <= 3:
                step(x)
                return
            if runs == 4:
                with vt.graph(graph):
                    step(x)
            graph.replay()

        return run

    with pytest.raises(RuntimeError, match="a schedule changes (momentum|betas) of"):
        trained(as_graph, PLAIN[name], one_cycle)


@pytest.mark.parametrize("where", ["pre", "post"])
@pytest.mark.parametrize("how", ["in place", "anew"])
def test_rates_that_hooks_of_the_step_set_are_refused(where: str, how: str) -> None:
    def make(parameters: Any) -> Any:
        optimizer = optim.SGD(parameters, lr=0.1)

        def halve(o: Any, args: Any, kwargs: Any) -> None:
            if how == "in place":
                o.param_groups[0]["lr"] *= 0.5
            else:
                o.param_groups[0]["lr"] = o.param_groups[0]["lr"] * 0.5

        getattr(optimizer, f"register_step_{where}_hook")(halve)
        return optimizer

    with pytest.raises(CaptureError, match="by hand"):
        trained(capture, make)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_rate_in_a_tensor_that_the_function_changes_first(kind: str) -> None:
    weight = vt.nn.Parameter(vt.ones(2))
    optimizer = getattr(optim, kind)([weight], lr=vt.tensor(0.1))

    @capture
    def step() -> Any:
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        optimizer.param_groups[0]["lr"].mul_(0.5)
        optimizer.step()
        return loss

    with pytest.raises(CaptureError, match="by hand"):
        for _ in range(3):
            step()


def test_betas_in_a_list_are_watched() -> None:
    def run(wrap: Callable[[Any], Any]) -> list[float]:
        weight = vt.nn.Parameter(vt.ones(2))
        optimizer = optim.Adam([weight], lr=0.1, betas=[0.9, 0.99])

        def step(x: Any) -> Any:
            optimizer.zero_grad()
            loss = (weight * x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        call = wrap(step)
        for i in range(8):
            if i >= 4:
                optimizer.param_groups[0]["betas"][i % 2] = 0.3 + i / 20
            call(vt.ones(2))
        return weight.tolist()

    assert run(capture) == run(eagerly)


@pytest.mark.parametrize("overflows", [1, 3, 6])
@pytest.mark.parametrize("name", [*PLAIN, "AdamW"])
def test_first_steps_that_a_scaler_skips(name: str, overflows: int) -> None:
    """State that a skipped step made is gone again; that is no reason to give up."""
    make = PLAIN.get(name, lambda p: optim.AdamW(p, lr=0.1))

    def run(wrap: Callable[[Any], Any]) -> list[float]:
        vt.manual_seed(0)
        model = vt.nn.Linear(3, 2, bias=False)
        optimizer = make(model.parameters())
        scaler = vt.amp.GradScaler("cpu", init_scale=8.0)

        def step(x: Any) -> Any:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        call = wrap(step)
        for i in range(STEPS):
            call(vt.ones(4, 3) * (float("inf") if i < overflows else 1.0))
        return model.weight.detach().flatten().tolist()

    assert run(capture) == run(eagerly)
