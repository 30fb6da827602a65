"""Every optimizer, with every option and in every form, inside a capture: eager's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.graphs.default_device import kind
from vibetensor.graphs import Graph, capture, graph

ADAM: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.05},
    "betas": {"betas": (0.5, 0.8), "eps": 1e-3},
    "tensor betas": {"betas": (0.5, 0.8), "tensor_betas": True},
    "tensor rate": {"tensor_rate": vt.float32, "weight_decay": 0.1},
    "wide tensor rate": {"tensor_rate": vt.float64, "amsgrad": True},
    "capturable": {"capturable": True, "weight_decay": 0.1},
    "capturable tensor rate": {"capturable": True, "tensor_rate": vt.float32},
}
SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "tensor rate": {"tensor_rate": vt.float32, "momentum": 0.9},
    "tensor decay": {"tensor_decay": 0.1, "momentum": 0.9},
    "one": {"lr": 1.0, "no_schedule": True},
}
MUON: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum alone": {"nesterov": False, "weight_decay": 0.0},
    "rms": {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    "tensor rate": {"tensor_rate": vt.float32},
    "wide tensor rate": {"tensor_rate": vt.float64, "momentum": 0.5},
}
FORMS: dict[str, dict[str, Any]] = {
    "foreach off": {"foreach": False},
    "fused off": {"fused": False},
    "default": {},
    "fused": {"fused": True},
}
CASES = [("Adam", name) for name in ADAM] + [("AdamW", name) for name in ADAM]
CASES += [("SGD", name) for name in SGD]


class Run:
    """Parameters of one dtype, their optimizer with a schedule, and a step."""

    def __init__(self, name: str, options: dict[str, Any], form: str, dtype: Any) -> None:
        matrices = name == "Muon"
        options = {"lr": 0.03, **options, **({} if matrices else FORMS[form])}
        rng = np.random.default_rng(2)
        shapes = ((5, 3), (5, 3), (2, 4)) if matrices else ((5, 3), (7,), ())
        self.params = [
            vt.nn.Parameter(vt.tensor(rng.standard_normal(shape)).to(dtype)) for shape in shapes
        ]
        rate = options.pop("tensor_rate", None)
        if rate is not None:
            options["lr"] = vt.tensor(options["lr"], dtype=rate)
        if options.pop("tensor_betas", False):
            options["betas"] = tuple(vt.tensor(b) for b in options["betas"])
        if (decay := options.pop("tensor_decay", None)) is not None:
            options["weight_decay"] = vt.tensor(decay, dtype=dtype)
        frozen = options.pop("no_schedule", False)
        self.optimizer = getattr(vt.optim, name)(self.params, **options)
        rates = vt.optim.lr_scheduler.ExponentialLR(self.optimizer, 1.0 if frozen else 0.8)
        self.schedule = rates

    def step(self, x: Any) -> None:
        self.optimizer.zero_grad()
        sum((p * p * p * x).sum() for p in self.params).backward()
        self.optimizer.step()
        self.schedule.step()

    def state(self) -> list[Any]:
        """Types and values of all that a step changes."""
        tensors: list[Any] = [p.detach() for p in self.params]
        for p in self.params:
            tensors += self.optimizer.state.get(p, {}).values()
        rate = self.optimizer.param_groups[0]["lr"]
        return [(t.dtype, t.double().tolist()) for t in tensors] + [float(rate)]


def make(name: str, option: str, form: str, dtype: Any = vt.float32) -> Run:
    options = {"SGD": SGD, "Muon": MUON}.get(name, ADAM)[option]
    return Run(name, options, form, dtype)


def inputs(dtype: Any) -> list[Any]:
    return [vt.tensor(0.3 * i - 0.7).to(dtype) for i in range(6)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name,option", CASES)
def test_six_captured_steps(name: str, option: str, form: str) -> None:
    eager, captured = make(name, option, form), make(name, option, form)
    step = capture(captured.step)
    for x in inputs(vt.float32):
        eager.step(x)
        step(x)
        assert captured.state() == eager.state()
    assert len(step.variants) == 1 and step.variants[0].replays >= 2


@pytest.mark.parametrize("dtype", [vt.float64, vt.bfloat16, vt.float16], ids=str)
@pytest.mark.parametrize("name,option", CASES)
def test_dtypes_of_the_plain_form(name: str, option: str, dtype: Any) -> None:
    eager, captured = (make(name, option, "foreach off", dtype) for _ in range(2))
    step = capture(captured.step)
    for x in inputs(dtype):
        eager.step(x)
        step(x)
    if kind() == "cpu" or dtype != vt.float64:
        assert captured.state() == eager.state()
        return
    # Powers of betas, which Python computes eagerly, are the device's in a replay.
    for mine, other in zip(captured.state(), eager.state()):
        mine, other = (v if isinstance(v, tuple) else (float, v) for v in (mine, other))
        assert mine[0] == other[0]
        np.testing.assert_allclose(mine[1], other[1], rtol=1e-14)


@pytest.mark.parametrize("form", ["foreach off", "default"])
@pytest.mark.parametrize("name,option", CASES)
def test_six_replays_of_a_graph(name: str, option: str, form: str) -> None:
    eager, captured = make(name, option, form), make(name, option, form)
    xs = inputs(vt.float32)
    static = xs[0].clone()
    if option == "dampening":  # another first step than later ones
        for run in (eager, captured):
            run.step(static)
    g = Graph()
    with graph(g):
        captured.step(static)
    for x in xs:
        eager.step(x)
        static.copy_(x)
        g.replay()
        assert captured.state() == eager.state()


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64, vt.bfloat16], ids=str)
@pytest.mark.parametrize("option", MUON)
def test_muon(option: str, dtype: Any) -> None:
    test_six_replays_of_a_graph("Muon", option, "default")
    eager, captured = (make("Muon", option, "default", dtype) for _ in range(2))
    step = capture(captured.step)
    for x in inputs(dtype):
        eager.step(x)
        step(x)
        assert captured.state() == eager.state()
    assert len(step.variants) == 1 and step.variants[0].replays >= 2


def test_a_plain_rate_set_by_hand_reaches_replays() -> None:
    eager, captured = make("Adam", "plain", "foreach off"), make("Adam", "plain", "foreach off")
    step = capture(captured.step)
    for i, x in enumerate(inputs(vt.float32)):
        for run, function in ((eager, eager.step), (captured, step)):
            run.optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            function(x)
    assert captured.state() == eager.state()
    assert len(step.variants) == 1


def test_optimizers_that_read_a_number_get_one() -> None:
    """A step written by hand sees its rate as Python's; another rate is another capture."""

    class Signs(vt.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad.sign(), alpha=-group["lr"])

    def run(wrap: Any) -> list[float]:
        p = vt.nn.Parameter(vt.ones(3))
        optimizer = Signs([p], {"lr": 0.25})

        def step() -> None:
            optimizer.zero_grad()
            (p * p).sum().backward()
            optimizer.step()

        function = wrap(step)
        for i in range(6):
            optimizer.param_groups[0]["lr"] = 0.25 if i < 3 else 0.125
            function()
        return p.tolist()

    assert run(capture) == run(lambda f: f)


def test_numbers_stay_weak_beside_tensors_without_dimensions() -> None:
    """A Python number beside a 0-d float32 tensor is a float32 in replays as in eager."""

    def function(x: Any) -> Any:
        return 0.9**x, x * 0.1, x / 3.0, 1 - x

    step = capture(function)
    for value in (1.7, 2.3, -0.4):
        x = vt.tensor(value)
        assert [y.item() for y in step(x)] == pytest.approx(
            [y.item() for y in function(x)], rel=0, abs=0, nan_ok=True
        )
