"""Where a replay could silently differ from the function: aliases, held results, gradients that
others hold, what Python changes around the ops. Each gives eager's numbers or is refused."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CaptureError, capture


def same(make: Callable[[], tuple[Callable[..., Any], Callable[[], Any]]], calls: int = 6) -> None:
    """make() -> (function, a look at the state); both are run eagerly and captured."""
    seen = []
    for wrap in (lambda f: f, capture):
        function, look = make()
        step = wrap(function)
        held, states = [], []
        for i in range(calls):
            held.append(step(vt.full((3,), i + 1.0)))
            states.append(np.array(look()))
        # Results are read at the end: they keep their values.
        seen.append(([np.array(h.detach()) for h in held if h is not None], states))
    for mine, other in zip(*seen):
        for x, y in zip(mine, other):
            np.testing.assert_array_equal(x, y)


def nothing() -> float:
    return 0.0


def _in_parts(out: Any, x: Any) -> Any:
    out[:2] = x[1:]
    out[2:] = x[:1] * 2
    return out


FACTORIES: dict[str, Callable[[Any], Any]] = {
    "zeros": lambda x: vt.zeros(3).add_(x),
    "empty": lambda x: vt.empty(3).copy_(x),
    "in parts": lambda x: _in_parts(vt.empty(3), x),
    "through a view": lambda x: vt.empty(3).view(1, 3).copy_(x)[0] * 2,
    "assigned": lambda x: vt.empty_like(x).fill_(2).mul_(x),
    "new": lambda x: x.new_zeros(3).index_add_(0, vt.tensor([0, 1, 2]), x),
    "ones": lambda x: vt.ones(3).mul_(x) + vt.arange(3.0),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_memory_made_inside_is_new_each_time(name: str) -> None:
    same(lambda: (FACTORIES[name], nothing))


def test_random_results_are_new_each_time() -> None:
    def make() -> Any:
        vt.manual_seed(3)
        return (lambda x: vt.rand(3) + 0 * x), nothing

    same(make)
    same(lambda: (vt.manual_seed(3), ((lambda x: vt.empty(3).normal_()), nothing))[1])


def test_arrays_of_results_stay() -> None:
    step = capture(lambda x: x * 2)
    arrays = [step(vt.full((3,), float(i))).numpy() for i in range(6)]
    views = [np.from_dlpack(step(vt.full((3,), float(i)))) for i in range(6)]
    step.reset()
    rubbish = [vt.full((3,), 7.0) for _ in range(50)]
    for i in range(6):
        np.testing.assert_array_equal(arrays[i], np.full(3, 2.0 * i))
        np.testing.assert_array_equal(views[i], np.full(3, 2.0 * i))
    del rubbish


def test_host_data_changed_in_place_is_refused() -> None:
    def step(x: Any) -> Any:
        total = vt.tensor(0.0)
        total += x.sum()
        return total

    with pytest.raises(RuntimeError, match="host data is changed in place"):
        capture(step)(vt.ones(3))


def test_inputs_may_be_results() -> None:
    step = capture(lambda x, y: (y, x, x[:1], x * 2))
    kept = [step(vt.full((3,), float(i)), vt.full((3,), float(-i))) for i in range(5)]
    for i, (y, x, part, double) in enumerate(kept):
        assert (y.tolist(), x.tolist()) == ([-i] * 3, [i] * 3)
        assert (part.tolist(), double.tolist()) == ([i], [2 * i] * 3)
    swap = capture(lambda x, y: (y, x))
    a, b = vt.ones(1), vt.zeros(1)
    for i in range(5):
        a, b = swap(a, b)
        assert (a.item(), b.item()) == ((0, 1) if i % 2 == 0 else (1, 0))


def test_state_that_is_rebound_is_refused() -> None:
    state = {"h": vt.ones(3)}

    def step(x: Any) -> Any:
        state["h"] = state["h"] * 0.5 + x
        return state["h"]

    function = capture(step)
    with pytest.raises(CaptureError, match="leaves new tensors behind"):
        for _ in range(6):
            function(vt.ones(3))


def test_arguments_that_are_one_tensor() -> None:
    def step(x: Any, y: Any) -> Any:
        x.add_(1)
        return x + y

    function = capture(step)
    for _ in range(4):
        x = vt.ones(2)
        assert function(x, x).tolist() == [4, 4]
        assert function(vt.ones(2), vt.ones(2)).tolist() == [3, 3]
    with pytest.raises(CaptureError, match="shares memory"):
        function(x, x[:1].expand(2))
    w = vt.ones(2)

    def changes(x: Any) -> Any:
        w.add_(1)
        return x * 1

    with pytest.raises(CaptureError, match="another way"):
        capture(changes)(w)


def _parameter() -> tuple[Any, Any]:
    p = vt.nn.Parameter(vt.tensor([1.0, 2.0, 3.0]))
    return p, vt.optim.SGD([p], lr=0.1)


def test_an_optimizer_step_alone() -> None:
    def make() -> Any:
        p, optimizer = _parameter()
        step: Any = None

        def outer(x: Any) -> None:
            nonlocal step
            optimizer.zero_grad()
            (p * x).square().sum().backward()
            step = step or outer.wrap(lambda: optimizer.step())  # type: ignore[attr-defined]
            step()

        return outer, (lambda: p.tolist()), p

    seen = []
    for wrap in (lambda f: f, capture):
        outer, look, _ = make()
        outer.wrap = wrap
        values = []
        for i in range(6):
            outer(vt.full((3,), i + 1.0) * 0.1)
            values.append(look())
        seen.append(values)
    assert seen[0] == seen[1]


def test_gradients_that_end_as_none() -> None:
    def run(wrap: Callable[..., Any]) -> list[Any]:
        p, optimizer = _parameter()

        def add(x: Any) -> None:
            (p * x).square().sum().backward()

        def last(x: Any) -> None:
            (p * x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        first, second, values = wrap(add), wrap(last), []
        for i in range(6):
            x = vt.full((3,), 0.1 * (i + 1))
            first(x)
            second(x)
            values.append((p.tolist(), p.grad is None))
        return values

    assert run(lambda f: f) == run(capture)


def test_gradients_of_the_users_own() -> None:
    def run(wrap: Callable[..., Any]) -> list[Any]:
        p, _ = _parameter()
        flat = [vt.zeros(3), vt.zeros(3)]
        step, values = wrap(lambda x: (p * x).sum().backward()), []
        for i in range(8):
            p.grad = flat[i % 2]
            step(vt.full((3,), i + 1.0))
            values.append(([f.tolist() for f in flat], p.grad is flat[i % 2]))
        return values

    assert run(lambda f: f) == run(capture)


def test_a_gradient_used_before_it_is_replaced() -> None:
    def run(wrap: Callable[..., Any]) -> list[Any]:
        p, optimizer = _parameter()

        def step(x: Any) -> None:
            optimizer.step()
            optimizer.zero_grad()
            (p * x).sum().backward()

        function, values = wrap(step), []
        for i in range(6):
            p.grad = vt.full((3,), float(i))
            function(vt.full((3,), i + 1.0))
            values.append((p.tolist(), p.grad.tolist()))
        return values

    assert run(lambda f: f) == run(capture)


def test_parameter_groups_that_change() -> None:
    def run(wrap: Callable[..., Any]) -> list[Any]:
        vt.manual_seed(0)
        m = vt.nn.Linear(3, 2)
        optimizer = vt.optim.AdamW([m.weight], lr=0.1)

        def step(x: Any) -> None:
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()

        function, values = wrap(step), []
        for i in range(10):
            if i == 4:
                optimizer.add_param_group({"params": [m.bias]})
            if i == 7:
                optimizer.state.clear()
            function(vt.full((2, 3), 0.1 * (i + 1)))
            values.append((m.weight.tolist(), m.bias.tolist()))
        return values

    assert run(lambda f: f) == run(capture)


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CosineAnnealingWarmRestarts", "SequentialLR"])
def test_schedules_of_their_own_kind(schedule: str) -> None:
    def run(wrap: Callable[..., Any]) -> list[Any]:
        p = vt.nn.Parameter(vt.ones(3))
        optimizer = vt.optim.SGD([p], lr=0.1, momentum=0.9)
        kinds = vt.optim.lr_scheduler
        if schedule == "OneCycleLR":
            s = kinds.OneCycleLR(optimizer, max_lr=0.2, total_steps=20)
        elif schedule == "SequentialLR":
            parts = [kinds.ConstantLR(optimizer), kinds.ExponentialLR(optimizer, 0.8)]
            s = kinds.SequentialLR(optimizer, parts, milestones=[3])
        else:
            s = kinds.CosineAnnealingWarmRestarts(optimizer, T_0=4)

        def step(x: Any) -> None:
            optimizer.zero_grad()
            (p * x).square().sum().backward()
            optimizer.step()
            s.step()

        function, values = wrap(step), []
        for i in range(10):
            function(vt.full((3,), 0.1 * (i + 1)))
            values.append((p.tolist(), s.last_epoch, optimizer.param_groups[0]["lr"]))
        return values

    assert run(lambda f: f) == run(capture)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "SGD nesterov", "Adam", "AdamW", "foreach=False"])
@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
def test_schedules_that_cycle_the_momentum(schedule: str, kind: str, verify: bool) -> None:
    def run(wrap: Callable[..., Any]) -> tuple[list[Any], Any]:
        vt.manual_seed(0)
        p = vt.nn.Parameter(vt.randn(3))
        if kind.startswith("SGD"):
            nesterov = kind.endswith("nesterov")
            optimizer = vt.optim.SGD([p], lr=0.01, momentum=0.9, nesterov=nesterov)
        else:
            made = vt.optim.AdamW if kind == "AdamW" else vt.optim.Adam
            optimizer = made([p], lr=0.01, foreach=False if kind == "foreach=False" else None)
        kinds = vt.optim.lr_scheduler
        if schedule == "OneCycleLR":
            s = kinds.OneCycleLR(optimizer, max_lr=0.2, total_steps=30)
        else:
            s = kinds.CyclicLR(optimizer, 0.01, 0.1, step_size_up=5)

        def step(x: Any) -> Any:
            optimizer.zero_grad()
            loss = (p * x).square().sum()
            loss.backward()
            vt.nn.utils.clip_grad_norm_([p], 1.0)
            optimizer.step()
            s.step()
            return loss

        function, values = wrap(step), []
        for i in range(12):
            loss = function(vt.full((3,), 0.1 * (i + 1)))
            (group,) = optimizer.param_groups
            values.append((p.tolist(), loss.item(), group.get("momentum"), group.get("betas")))
        return values, function

    eager, _ = run(lambda f: f)
    captured, step = run(lambda f: capture(f, verify=verify, optimize=False))
    assert captured == eager
    if kind != "foreach=False":
        assert [variant.replays for variant in step.variants] == [10]


def test_a_momentum_that_is_set_between_calls() -> None:
    def run(wrap: Callable[..., Any]) -> tuple[list[Any], Any]:
        p = vt.nn.Parameter(vt.ones(3))
        optimizer = vt.optim.SGD([p], lr=0.1, momentum=0.9)

        def step(x: Any, decay: bool = False) -> None:
            optimizer.zero_grad()
            (p * x).square().sum().backward()
            optimizer.step()
            if decay:
                optimizer.param_groups[0]["momentum"] *= 0.9

        function, values = wrap(step), []
        for i in range(16):
            if i == 5:
                optimizer.param_groups[0]["momentum"] = 0.5
            if i == 8:
                optimizer.param_groups[0]["momentum"] = 0.0
            if i == 10:
                optimizer.param_groups[0]["momentum"] = 0.7
            function(vt.full((3,), 0.1 * (i + 1)), i > 12)
            values.append(p.tolist())
        return values, function

    eager, _ = run(lambda f: f)
    captured, step = run(capture)
    assert captured == eager
    assert step.variants[0].replays >= 5  # with both of the first numbers


def test_batch_norm_with_plain_averages() -> None:
    def run(wrap: Callable[..., Any]) -> list[Any]:
        norm = vt.nn.BatchNorm1d(3, momentum=None)
        function, values = wrap(lambda x: norm(x)), []
        for i in range(6):
            vt.manual_seed(i)
            values.append(function(vt.randn(5, 3)).tolist())
        return [*values, norm.running_mean.tolist(), norm.running_var.tolist(),
                norm.num_batches_tracked.item()]  # fmt: skip

    assert run(capture) == run(lambda f: f)


def test_two_steps_of_one_optimizer() -> None:
    def run(wrap: Callable[..., Any], by_hand: bool) -> list[Any]:
        p, optimizer = _parameter()
        s = vt.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def step(x: Any) -> None:
            for _ in range(2):
                optimizer.zero_grad()
                (p * x).sum().backward()
                optimizer.step()
                if by_hand:
                    optimizer.param_groups[0]["lr"] *= 0.5
                else:
                    s.step()

        function, values = wrap(step), []
        for i in range(5):
            function(vt.full((3,), i + 1.0))
            values.append(p.tolist())
        return values

    assert run(lambda f: f, False) == run(capture, False)
    with pytest.raises(RuntimeError, match="cannot set a learning rate"):
        run(capture, True)


def test_modes_changed_inside() -> None:
    def make() -> Any:
        vt.manual_seed(1)
        norm = vt.nn.BatchNorm1d(3)

        def step(x: Any) -> Any:
            out = norm(vt.stack([x, x * 2]))
            norm.eval()
            return out

        return step, (lambda: norm.running_mean.tolist())

    same(make)


def test_modules_and_rates_that_are_replaced() -> None:
    def make() -> Any:
        vt.manual_seed(1)
        model = vt.nn.Sequential(vt.nn.Linear(3, 3), vt.nn.ReLU())
        optimizer = vt.optim.SGD(model.parameters(), lr=vt.tensor(0.1))
        count = [0]

        def step(x: Any) -> Any:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        def look() -> Any:
            count[0] += 1
            if count[0] == 3:
                model[1] = vt.nn.Tanh()
            if count[0] == 5:
                optimizer.param_groups[0]["lr"] = vt.tensor(0.5)
            return model[0].weight.tolist()

        return step, look

    same(make, 8)


def test_weights_given_as_arguments_that_move() -> None:
    w = vt.ones(3, requires_grad=True)
    function = capture(lambda w, x: w * x)
    x = vt.ones(3)
    for _ in range(3):
        assert function(w, x).tolist() == [1, 1, 1]
    w.data = vt.full((3,), 5.0)
    assert function(w, x).tolist() == [5, 5, 5]
    square = vt.nn.Linear(2, 2, bias=False)
    product = capture(lambda x: square(x))
    a = vt.arange(2.0)
    for _ in range(3):
        product(a)
    square.weight.data = square.weight.data.t()
    np.testing.assert_array_equal(product(a).numpy(), square(a).detach().numpy())


def test_objects_as_arguments_are_refused() -> None:
    class Box:
        x = vt.ones(2)

    with pytest.raises(CaptureError, match="compared by identity"):
        capture(lambda b: b.x * 2)(Box())
    model = vt.nn.Linear(2, 2)
    assert capture(lambda m, x: m(x))(model, vt.ones(2)).shape == (2,)


def test_autocast_around_the_calls() -> None:
    def run(wrap: Callable[..., Any]) -> list[Any]:
        vt.manual_seed(2)
        m = vt.nn.Linear(4, 4)
        optimizer = vt.optim.SGD(m.parameters(), lr=0.1)

        def step(x: Any) -> Any:
            optimizer.zero_grad()
            loss = m(x).float().square().sum()
            loss.backward()
            optimizer.step()
            return loss

        function, values = wrap(step), []
        for i in range(6):
            with vt.autocast("cpu", dtype=vt.bfloat16):
                values.append(function(vt.full((4,), 0.1 * (i + 1))).item())
        return values

    assert run(lambda f: f) == run(capture)


def test_a_seed_set_inside_is_refused() -> None:
    def step(x: Any) -> Any:
        vt.manual_seed(0)
        return x + vt.rand(3)

    vt.rand(1)
    with pytest.raises(RuntimeError, match="cannot be repeated"):
        capture(step)(vt.ones(3))


def test_other_threads_are_not_recorded() -> None:
    p, optimizer = _parameter()
    schedule = vt.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    go, done = threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        p.grad = vt.ones_like(p)
        optimizer.step()
        schedule.step()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def step(x: Any) -> Any:
        if not done.is_set():
            go.set()
            done.wait()
        return x * 2

    function = capture(step)
    for _ in range(5):
        function(vt.ones(3))
    thread.join()
    assert schedule.last_epoch == 1


def test_threads_share_one_capture() -> None:
    function = capture(lambda x: (x * 2 + 1).sum())
    wrong: list[Any] = []

    def work(value: float) -> None:
        for _ in range(50):
            got = function(vt.full((1000,), value)).item()
            if got != (value * 2 + 1) * 1000:
                wrong.append((value, got))

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_methods_and_containers() -> None:
    class Trainer:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        @capture
        def step(self, x: Any) -> Any:
            return x * self.scale

    one, two = Trainer(2.0), Trainer(3.0)
    for _ in range(3):
        assert one.step(vt.ones(1)).item() == 2
        assert two.step(vt.ones(1)).item() == 3
    largest = capture(lambda x: x.max(dim=0))
    for i in range(3):
        assert largest(vt.tensor([1.0, 5.0 + i]))[0].item() == 5 + i
    given = defaultdict(list, a=vt.ones(1))
    assert capture(lambda d: d["a"] * 2)(given).item() == 2


@pytest.mark.parametrize("read", [lambda t: np.from_dlpack(t), lambda t: t.__reduce_ex__(4)])
def test_more_host_reads_are_refused(read: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError, match="cannot be captured"):
        capture(lambda x: read(x * 2))(vt.ones(3))


def test_results_that_an_op_leaves_out() -> None:
    """A layer norm without a bias has no gradient for one."""

    def make() -> Any:
        weight = vt.ones(3, requires_grad=True)

        def step(x: Any) -> Any:
            weight.grad = None
            rows = x * vt.arange(6.0).reshape(2, 3)
            vt.nn.functional.layer_norm(rows, (3,), weight, None).pow(2).sum().backward()
            return weight.grad * 1

        return step, nothing

    same(make)


def test_memory_that_is_wrapped_twice() -> None:
    array = np.zeros(8, np.float32)
    whole, part = vt.from_numpy(array), vt.from_numpy(array[2:6])
    others = [vt.from_numpy(array[i : i + 1]) for i in (0, 6)]

    def reads(x: Any) -> Any:
        return whole[2:6] * x + part + others[0]

    def writes(x: Any) -> Any:
        copy = whole.clone()
        others[1].add_(x[:1])
        return copy + 1

    captured = capture(reads)
    for value in (1.0, 2.0, 3.0):  # what nobody changes inside may be shared
        array[:] = value
        got = captured(vt.full((4,), 2.0))
        np.testing.assert_array_equal(got.numpy(), np.full(4, 4 * value, np.float32))
    assert captured.variants[0].replays > 0
    with pytest.raises(CaptureError, match="wrap apart from each other"):
        capture(writes)(vt.ones(4))
    compiled = vt.compile(writes)
    array[:] = 0
    with pytest.warns(UserWarning, match="wrap apart from each other"):
        sums = [compiled(vt.ones(4)).numpy()[6] for _ in range(4)]
    assert (sums, array[6]) == ([1.0, 2.0, 3.0, 4.0], 4.0)
    graph = vt.Graph()
    with pytest.raises(RuntimeError, match="wrap apart from each other"), vt.graph(graph):
        writes(vt.ones(4))
    assert array[6] == 4.0


def test_an_argument_in_memory_that_the_function_changes() -> None:
    array = np.zeros(4, np.float32)
    state = vt.from_numpy(array)

    @capture
    def step(x: Any) -> Any:
        state.add_(1)
        return x * 2

    with pytest.raises(CaptureError, match="wrap apart from each other"):
        step(vt.from_numpy(array))
    assert step(vt.ones(4)).tolist() == [2.0] * 4


def test_empty_views_past_the_end_of_empty_memory() -> None:
    def step(x: Any) -> Any:
        empty = (x[:0].expand(0, 3) * 2).t()
        empty[1].add_(empty[2])
        return empty[1:], empty[2] + 1, vt.zeros(0, 4)[:, 3]

    captured = capture(step)
    shapes = [[tuple(t.shape) for t in captured(vt.ones(3, 1))] for _ in range(4)]
    assert shapes == [[(2, 0), (0,), (0,)]] * 4
    assert captured.variants[0].replays > 0


def test_a_copy_onto_itself_of_elements_that_share_a_place() -> None:
    def step(x: Any) -> Any:
        rows = (x * 2).expand(2, 3)
        return rows.copy_(rows)

    captured = capture(step)
    for i in range(4):
        assert captured(vt.full((3,), float(i))).tolist() == [[2.0 * i] * 3] * 2
    assert captured.variants[0].replays > 0
