"""What Python's objects hold after recordings: dry ones leave nothing behind, and changes that no
replay would repeat are refused."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.graphs.default_device import kind, random_state
from vibetensor.graphs import capture
from vibetensor.graphs.capture import CaptureError
from vibetensor.torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*(compile|runs as it is|captured)")


def same(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def agree(a: Any, b: Any) -> bool:
    """The same; but for a device's passes, which may add a few terms in another order."""
    if kind() == "cpu":
        return same(a, b)
    return a.shape == b.shape and vt.allclose(a, b, rtol=1e-5, atol=1e-6)


class Momentum(vt.optim.Optimizer):
    """An optimizer of the user's own; `counts` in Python if told so."""

    def __init__(self, params: Any, lr: float = 0.1, counts: bool = False) -> None:
        self.counts = counts
        super().__init__(params, {"lr": lr})

    @vt.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"] = vt.zeros_like(p)
                    state["step"] = 0
                state["m"].mul_(0.9).add_(p.grad)
                if self.counts:
                    state["step"] += 1
                    p.sub_(state["m"] * (group["lr"] / state["step"]))
                else:
                    p.sub_(state["m"] * group["lr"])


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = vt.ones(4)

    def forward(self, x: Any) -> Any:
        self.n = self.n * 0.5
        return x * self.n


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", vt.zeros(4))

    def forward(self, x: Any) -> Any:
        self.n = 0.9 * self.n + 0.1 * x.mean(0)
        return x - self.n


class Cached(nn.Module):
    """Makes what it needs with its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Any] = {}

    @property
    def n(self) -> Any:
        return self.tables.get(3, vt.zeros(1))

    def forward(self, x: Any) -> Any:
        if len(x) not in self.tables:
            self.tables[len(x)] = vt.arange(4.0) + 1
        return x * self.tables[len(x)]


@functools.lru_cache
def _table(size: int) -> Any:
    return vt.arange(float(size)) + 1


class CachedByFunction(nn.Module):
    @property
    def n(self) -> Any:
        return _table(4)

    def forward(self, x: Any) -> Any:
        return x * _table(4)


class Data(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.Parameter(vt.ones(4))

    def forward(self, x: Any) -> Any:
        self.n.data = self.n.data * 0.5
        return x * self.n


@pytest.mark.parametrize("make", [Halves, Mean, Cached, CachedByFunction, Data])
def test_a_compiled_module_that_keeps_what_it_makes_goes_on_as_eager(make: Any) -> None:
    eager, compiled = make(), make()
    run = vt.compile(compiled)
    for i in range(4):
        _table.cache_clear()
        x = vt.full((3, 4), float(i + 1))
        expected, made = eager(x), run(x)
        assert same(expected.detach(), made.detach())
        assert same(eager.n.detach(), compiled.n.detach())


def trained(wrap: Callable[[Any], Any], make: Callable[[Any], Any], count: int = 6) -> list[Any]:
    vt.manual_seed(0)
    model = nn.Linear(4, 2)
    step = wrap(make(model))
    for i in range(count):
        vt.manual_seed(i)
        step(vt.randn(3, 4))
    return [p.detach().clone() for p in model.parameters()]


def own_optimizer(counts: bool) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        optimizer = Momentum(model.parameters(), counts=counts)

        def step(x: Any) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return step

    return make


class PlainOptimizer:
    """No Optimizer at all."""

    def __init__(self, params: Any) -> None:
        self.params, self.t, self.moments = [*params], 0, []

    def step(self) -> None:
        self.t += 1
        if not self.moments:
            self.moments = [vt.zeros_like(p) for p in self.params]
        with vt.no_grad():
            for p, m in zip(self.params, self.moments):
                m.mul_(0.9).add_(p.grad)
                p.sub_(m * 0.1)


@pytest.mark.parametrize("counts", [False, True])
def test_an_own_optimizer_in_a_compiled_step_makes_its_state_as_in_eager(counts: bool) -> None:
    expected = trained(lambda f: f, own_optimizer(counts))
    assert all(map(agree, expected, trained(vt.compile, own_optimizer(counts))))


def test_a_plain_object_in_a_compiled_step_counts_as_in_eager() -> None:
    made = []

    def make(model: Any) -> Any:
        made.append(PlainOptimizer(model.parameters()))
        optimizer = made[-1]

        def step(x: Any) -> None:
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return step

    expected, found = trained(lambda f: f, make, 1), trained(vt.compile, make, 1)
    assert all(map(agree, expected, found))
    assert made[0].t == made[1].t == 1


def test_a_block_that_fails_leaves_everything_as_before() -> None:
    model, other = nn.Sequential(nn.Linear(4, 2), Halves()), vt.zeros(2)
    model[1].n = vt.ones(2)
    optimizer = Momentum(model.parameters())
    model(vt.ones(3, 4)).sum().backward()
    optimizer.step()
    weight, n = model[0].weight, model[1].n
    before = [weight.detach().clone(), n.clone(), weight.data_ptr()]
    states = [dict(state) for state in optimizer.state.values()]
    place, number = random.getstate(), np.random.get_state()[2]
    with pytest.raises(KeyError), vt.graph(vt.Graph()):
        model(vt.ones(3, 4)).sum().backward()
        optimizer.param_groups[0]["lr"] = 5.0 if optimizer.step() else 4.0
        weight.data = weight.data * 2
        weight.requires_grad_(False)
        other.add_(model[0].bias)
        random.random()
        np.random.rand()
        raise KeyError
    assert weight.data_ptr() == before[2] and same(weight.detach(), before[0])
    assert weight.requires_grad and weight.is_leaf
    assert model[1].n is n and same(n, before[1])
    assert not other.requires_grad and other.grad_fn is None
    assert [dict(state) for state in optimizer.state.values()] == states
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert random.getstate() == place and np.random.get_state()[2] == number


def test_state_that_a_block_may_not_make_is_gone() -> None:
    model = nn.Linear(4, 2)
    optimizer = Momentum(model.parameters())
    with pytest.raises(RuntimeError, match="makes its state"), vt.graph(vt.Graph()):
        model(vt.ones(3, 4)).sum().backward()
        optimizer.step()
    assert not optimizer.state


# --- what no replay would repeat


def by_hand(change: Callable[[Any, int], None], first: bool) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        optimizer = vt.optim.SGD(model.parameters(), lr=0.1)
        calls = [0]

        def step(x: Any) -> None:
            calls[0] += 1
            if first:
                change(optimizer.param_groups[0], calls[0])
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if not first:
                change(optimizer.param_groups[0], calls[0])

        return step

    return make


RATES = {
    "halved": (lambda group, at: group.update(lr=group["lr"] * 0.5), False),
    "set before": (lambda group, at: group.update(lr=0.1 / at), True),
    "decay before": (lambda group, at: group.update(weight_decay=0.1 / at), True),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_set_by_hand_inside_are_refused(name: str) -> None:
    make = by_hand(*RATES[name])
    with pytest.raises(CaptureError, match="by hand"):
        trained(capture, make)
    assert all(map(agree, trained(lambda f: f, make), trained(vt.compile, make)))


def test_an_own_optimizer_that_counts_in_python_is_refused() -> None:
    with pytest.raises(CaptureError, match="'step'"):
        trained(capture, own_optimizer(True))
    expected = trained(lambda f: f, own_optimizer(False))
    assert all(map(agree, expected, trained(capture, own_optimizer(False))))


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_pythons_random_numbers_are_refused(draw: Any) -> None:
    step = capture(lambda x: x * float(draw()))
    with pytest.raises(CaptureError, match="random"):
        for _ in range(3):
            step(vt.ones(2))


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "random": (lambda: random.Random(0), lambda g: g.random()),
    "its method": (lambda: random.Random(0).random, lambda g: g()),
    "numpy": (lambda: np.random.default_rng(0), lambda g: g.random()),
    "numpy's method": (lambda: np.random.default_rng(0).random, lambda g: g()),
    "of another kind": (
        lambda: np.random.Generator(np.random.MT19937(0)),
        lambda g: g.standard_normal(),
    ),
    "numpy's older": (lambda: np.random.RandomState(0), lambda g: g.rand()),
}


def drawing(name: str, trains: bool, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    """A function, or a step, that draws from a generator of its own."""
    make, draw = GENERATORS[name]
    generator, weight = make(), vt.ones(2, requires_grad=True)
    optimizer = vt.optim.SGD([weight], lr=0.1)

    def function(x: Any) -> Any:
        result = weight * x * float(draw(generator))
        if trains:
            optimizer.zero_grad()
            result.sum().backward()
            optimizer.step()
        return result.detach()

    wrapped = wrap(function)
    return lambda: wrapped(vt.ones(2)).tolist()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
def test_a_compiled_function_draws_from_its_own_generator_as_in_eager(
    name: str, trains: bool
) -> None:
    eager, compiled = drawing(name, trains, lambda f: f), drawing(name, trains, vt.compile)
    assert [eager() for _ in range(4)] == [compiled() for _ in range(4)]


@pytest.mark.parametrize("name", GENERATORS)
def test_a_draw_from_an_own_generator_is_refused(name: str) -> None:
    step = drawing(name, True, capture)
    with pytest.raises(CaptureError, match="draws from a [A-Z].* of its own"):
        for _ in range(3):
            step()


def test_generators_and_counters_in_a_namespace_are_put_back() -> None:
    def run(wrap: Callable[[Any], Any]) -> Any:
        held = SimpleNamespace(generator=random.Random(0), calls=0)

        def function(x: Any) -> Any:
            held.calls += 1
            return x * held.generator.random()

        step = wrap(function)
        return [step(vt.ones(2)).tolist() for _ in range(3)], held.calls

    assert run(vt.compile) == run(lambda f: f)


def test_a_generator_of_tensors_goes_on_as_in_eager() -> None:
    def draws(wrap: Callable[[Any], Any]) -> list[Any]:
        generator = vt.Generator(vt.get_default_device()).manual_seed(0)
        function = wrap(lambda x: x * vt.rand(2, generator=generator))
        return [function(vt.ones(2)).tolist() for _ in range(3)]

    assert draws(lambda f: f) == draws(vt.compile)


@pytest.mark.parametrize("workers", [0])
def test_a_batch_taken_inside_is_refused(workers: int) -> None:
    data = vt.utils.data.TensorDataset(vt.arange(8.0))
    batches = iter(vt.utils.data.DataLoader(data, num_workers=workers))
    step = capture(lambda: next(batches)[0] + 0)
    with pytest.raises(RuntimeError, match="inside a captured function"):
        step()
    assert float(next(batches)[0]) == 0.0  # none is lost


SCALERS: dict[str, Callable[[Any], None]] = {
    "interval": lambda s: s.set_growth_interval(1),
    "backoff": lambda s: s.set_backoff_factor(0.25),
    "growth": lambda s: s.set_growth_factor(4.0),
    "loaded": lambda s: s.load_state_dict({**s.state_dict(), "growth_factor": 4.0, "scale": 16.0}),
}


@pytest.mark.parametrize("name", SCALERS)
def test_a_scaler_that_is_set_anew_goes_on_as_in_eager(name: str) -> None:
    def scales(wrap: Callable[[Any], Any]) -> list[float]:
        vt.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = vt.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scaler = vt.amp.GradScaler(kind(), init_scale=8.0, growth_interval=3)

        @wrap
        def step(x: Any) -> None:
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        found = []
        for i in range(10):
            if i == 4:
                SCALERS[name](scaler)
            step(vt.ones(3, 4) * (float("inf") if i == 7 else 1.0))
            found.append(scaler.get_scale())
        return found

    assert scales(capture) == scales(lambda f: f)


def test_hooks_of_saved_tensors_and_modes_see_every_call() -> None:
    weight = vt.ones(4, requires_grad=True)

    @capture
    def step(x: Any) -> Any:
        weight.grad = None
        (weight * x).square().sum().backward()
        return x.tanh()

    x = vt.full((4,), 2.0)
    for _ in range(4):
        plain = step(x)
    replays = step.variants[0].replays
    assert replays > 0
    grad = weight.grad.clone()
    with vt.autograd.graph.saved_tensors_hooks(lambda t: t * 0.5, lambda t: t):
        step(x)
    assert not same(weight.grad, grad)
    with vt.library.Mode(lambda call, name, args: call() * 2 if name == "tanh" else call()):
        assert same(step(x), plain * 2)
    assert step.variants[0].replays == replays
    assert same(step(x), plain) and step.variants[0].replays == replays + 1


def test_stochastic_rounding_draws_the_same_where_a_scaler_skips() -> None:
    def run(wrap: Callable[[Any], Any]) -> list[Any]:
        vt.manual_seed(0)
        model = nn.Linear(4, 2, dtype=vt.bfloat16)
        optimizer = vt.optim.AdamW(model.parameters(), lr=0.01, stochastic_rounding=True)
        scaler = vt.amp.GradScaler(kind(), init_scale=4.0)

        @wrap
        def step(x: Any) -> None:
            optimizer.zero_grad()
            scaler.scale(model(x).float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        found = []
        for i in range(8):
            step(vt.full((3, 4), float("inf") if i == 4 else 0.1 * i, dtype=vt.bfloat16))
            found += [random_state(), model.weight.detach().float(), scaler._scale.clone()]
        return found

    # Elsewhere than on the CPU passes may leave other bits, which rounding may make larger.
    wrap = capture if kind() == "cpu" else functools.partial(capture, optimize=False)
    assert all(map(same, run(lambda f: f), run(wrap)))


def test_a_number_of_a_type_of_its_own_is_another_argument() -> None:
    class Weight(float):
        pass

    step = capture(lambda x, k: x * 2 if type(k) is Weight else x * k)
    for _ in range(3):
        assert float(step(vt.ones(()), 1.0)) == 1.0
        assert float(step(vt.ones(()), Weight(1.0))) == 2.0
