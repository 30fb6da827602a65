"""torch.compile and what functions do besides computing: hooks, counters, containers, errors, scalers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CaptureError, capture

F = vt.nn.functional


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.compile: .* runs as it is")
        yield


def linear(seed: int = 0) -> tuple[Any, Any]:
    vt.manual_seed(seed)
    model = vt.nn.Linear(3, 2)
    return model, vt.optim.SGD(model.parameters(), lr=0.1)


def update(optimizer: Any, loss: Any) -> Any:
    """A step of the optimizer; the loss without history."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def check_same(train: Callable[[Callable[[Any], Any]], Any]) -> None:
    """What a function leaves where it is compiled is what it leaves as it is."""
    found = [train(wrap) for wrap in (lambda f: f, vt.compile)]
    assert found[0] == found[1]


def test_hooks_of_the_compiled_module() -> None:
    model = vt.nn.Linear(2, 2)
    compiled = vt.compile(model)
    calls: list[str] = []
    x = vt.ones(1, 2, requires_grad=True)
    for _ in range(3):
        compiled(x)
    handles = [
        compiled.register_forward_pre_hook(lambda module, args: calls.append("before")),
        compiled.register_forward_hook(lambda module, args, result: result * 100),
        compiled.register_full_backward_hook(lambda module, *gradients: calls.append("backward")),
    ]
    y = compiled(x)
    y.sum().backward()
    assert vt.equal(y, model(x) * 100) and calls == ["before", "backward"]
    assert not model._forward_hooks and not model._hooked
    for handle in handles:
        handle.remove()
    assert vt.equal(compiled(x), model(x)) and len(calls) == 2


@pytest.mark.parametrize("kind", ["zip", "map", "generator"])
def test_a_step_that_returns_what_runs_later_is_done_once(kind: str) -> None:
    def train(wrap: Any) -> Any:
        model, optimizer = linear()

        def step(x: Any) -> Any:
            loss = update(optimizer, model(x).sum())
            made = {"zip": zip(["loss"], [loss]), "map": map(float, [1])}
            return made.get(kind) or (item for item in [loss])

        run = wrap(step)
        for _ in range(3):
            assert len([*run(vt.ones(1, 3))]) == 1
        return model.weight.tolist()

    check_same(train)


def test_containers_that_are_given() -> None:
    def grow(x: Any, cache: dict[str, Any]) -> Any:
        cache["k"] = vt.cat([cache["k"], x]) if "k" in cache else x * 1
        return cache["k"].sum()

    def append(x: Any, kept: list[Any]) -> Any:
        kept.append(x * 2)
        return x + 1

    def pop(x: Any, batch: dict[str, Any]) -> Any:
        return x * batch.pop("scale")

    compiled, cache = vt.compile(grow), {}
    assert [compiled(vt.ones(1), cache).item() for _ in range(4)] == [1, 2, 3, 4]
    assert cache["k"].tolist() == [1, 1, 1, 1]
    kept: list[Any] = []
    compiled = vt.compile(append)
    for _ in range(4):
        compiled(vt.ones(1), kept)
    assert [x.item() for x in kept] == [2, 2, 2, 2]
    compiled, captured = vt.compile(pop), capture(pop)
    for scale in (2.0, 3.0, 3.0, 4.0):
        batch = {"scale": vt.tensor(scale)}
        assert compiled(vt.ones(1), batch).item() == scale and batch == {}
        assert captured(vt.ones(1), {"scale": vt.tensor(scale)}).item() == scale
    for function in (grow, append):
        with pytest.raises(CaptureError, match="puts something into a list or dict"):
            capture(function)(vt.ones(1), {} if function is grow else [])


def test_replaced_containers_are_seen() -> None:
    def replace(x: Any, batch: dict[str, Any]) -> Any:
        batch["inner"] = [batch["inner"][0] * 2]
        return x + batch["inner"][0]

    compiled = vt.compile(replace)
    batch = {"inner": [vt.ones(1)]}
    assert [compiled(vt.zeros(1), batch).item() for _ in range(3)] == [2, 4, 8]


def test_gradients_that_the_function_switches_on() -> None:
    model, _ = linear()

    def function(x: Any) -> Any:
        with vt.enable_grad():
            return model(x)

    compiled = vt.compile(function)
    for _ in range(3):
        model.weight.grad = None
        with vt.no_grad():
            y = compiled(vt.ones(1, 3))
        assert y.requires_grad and not compiled.report().startswith("function runs as it is")
        y.sum().backward()
        assert model.weight.grad.tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("where", ["attribute", "list", "dict", "name"])
def test_numbers_that_steps_count(where: str) -> None:
    def train(wrap: Any) -> Any:
        class Trainer:
            def __init__(self) -> None:
                self.n, self.w = 0, vt.zeros(1, requires_grad=True)
                self.optimizer = vt.optim.SGD([self.w], lr=1.0)

            def step(self, x: Any) -> Any:
                return update(self.optimizer, (self.w * x).sum() * min(1.0, self.count() / 8))

            def count(self) -> int:
                nonlocal name
                if where == "attribute":
                    self.n += 1
                    return self.n
                if where == "list":
                    numbers[0] += 1
                    return numbers[0]
                if where == "dict":
                    named["n"] += 1
                    return named["n"]
                name += 1
                return name

        numbers, named, name = [0], {"n": 0}, 0
        trainer = Trainer()
        step = wrap(trainer.step)
        for _ in range(8):
            step(vt.ones(1))
        return trainer.w.item(), trainer.n, numbers, named, name

    check_same(train)


def test_numbers_that_functions_and_modules_count() -> None:
    n = {"i": 0}

    def function(x: Any) -> Any:
        n["i"] += 1
        return x * 2 if n["i"] > 4 else x * 1

    compiled = vt.compile(function)
    assert [compiled(vt.ones(1)).item() for _ in range(7)] == [1, 1, 1, 1, 2, 2, 2]
    assert n == {"i": 7}

    class Counting(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[int] = []

        def forward(self, x: Any) -> Any:
            self.calls.append(1)
            return x * len(self.calls)

    module = Counting()
    compiled = vt.compile(module)
    assert [compiled(vt.ones(1)).item() for _ in range(5)] == [1, 2, 3, 4, 5]


def test_caches_that_a_first_call_fills() -> None:
    cache: dict[int, Any] = {}
    model, optimizer = linear()

    def step(x: Any) -> Any:
        scale = cache.setdefault(len(x), 1.0 / len(x))
        return update(optimizer, model(x).sum() * scale)

    compiled = vt.compile(step)
    for _ in range(5):
        for rows in (1, 2):
            compiled(vt.ones(rows, 3))
    assert cache == {1: 1.0, 2: 0.5}
    assert "runs as it is" not in compiled.report() and compiled.report().count("replays") >= 2


def test_equal_attributes_that_are_set_anew_are_no_change() -> None:
    class Notes(vt.nn.Module):
        def forward(self, x: Any) -> Any:
            self.where, self.kind, self.size = x.device, x.dtype, x.shape
            self.sides, self.named, self.scale = (
                [len(x), 2.5],
                {"rows": (len(x), "n")},
                len(x) * 0.5,
            )
            return x * self.scale

    module = Notes()
    compiled = vt.compile(module, fullgraph=True)
    x = vt.ones(2, 3)
    assert [compiled(x).sum().item() for _ in range(3)] == [6, 6, 6]
    assert module.sides == [2, 2.5] and module.named == {"rows": (2, "n")}


def test_arguments_whose_gradients_are_switched_on() -> None:
    model = vt.nn.Sequential(vt.nn.Linear(3, 1), vt.nn.Tanh())

    def function(x: Any) -> Any:
        x.requires_grad_(True)
        return model(x)

    compiled = vt.compile(function)
    for _ in range(3):
        x = vt.ones(1, 3)
        compiled(x).sum().backward()
        assert x.requires_grad and x.grad.shape == (1, 3)


def test_an_argument_that_is_also_changed_by_another_way() -> None:
    buffer = vt.zeros(3)

    def function(x: Any) -> Any:
        buffer.add_(1)
        return buffer * x

    compiled = vt.compile(function)
    for _ in range(3):
        buffer.zero_()
        assert compiled(vt.ones(3)).tolist() == [1, 1, 1]
        assert compiled(buffer).tolist() == [4, 4, 4]
        assert compiled(buffer[1:2]).tolist() == [9, 9, 9]


def test_a_second_backward_is_refused() -> None:
    compiled = vt.compile(vt.nn.Sequential(vt.nn.Linear(3, 1), vt.nn.Tanh()))
    for _ in range(3):
        loss = compiled(vt.ones(1, 3)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_scalers_in_compiled_steps(name: str, unscale: bool) -> None:
    def train(wrap: Any) -> Any:
        model, _ = linear()
        optimizer = getattr(vt.optim, name)(model.parameters(), lr=0.1)
        scaler = vt.amp.GradScaler(vt.get_default_device().type, growth_interval=2)

        def step(x: Any) -> Any:
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            return loss.detach()

        run = wrap(step)
        for factor in (1.0, 2.0, float("inf"), 1.0, 0.5, 1.0):
            run(vt.full((4, 3), factor))
        if wrap is vt.compile:
            assert "runs as it is" not in run.report()
        return model.weight.tolist(), scaler.get_scale()

    check_same(train)


def test_leaves_that_a_compiled_step_makes() -> None:
    def train(wrap: Any) -> Any:
        model, optimizer = linear()

        def step(x: Any, y: Any) -> Any:
            changed = x.clone().requires_grad_(True)
            F.cross_entropy(model(changed), y).backward()
            changed = (x + 0.1 * changed.grad.sign()).detach()
            return update(optimizer, F.cross_entropy(model(changed), y))

        run = wrap(step)
        for seed in range(5):
            vt.manual_seed(seed)
            run(vt.randn(2, 3), vt.tensor([0, 1]))
        if wrap is vt.compile:
            assert "runs as it is" not in run.report()
        return model.weight.tolist()

    check_same(train)


def test_a_course_that_cannot_be_captured_runs_as_it_is(capsys: Any) -> None:
    model, optimizer = linear()
    log = False

    def step(x: Any) -> Any:
        loss = update(optimizer, model(x).pow(2).mean())
        if log:
            print("loss", round(loss.item(), 3))
        return loss

    compiled = vt.compile(step)
    for i in range(12):
        log = i % 5 == 4
        compiled(vt.ones(4, 3))
    assert capsys.readouterr().out.count("loss") == 2
    assert "0 replays" not in compiled.report()


def test_what_fails_again_and_again_is_not_tried_for_ever() -> None:
    model, optimizer = linear()
    log = False

    def step(x: Any) -> Any:
        loss = update(optimizer, model(x).pow(2).mean())
        if log:
            looked_at(loss)
        return loss

    def looked_at(loss: Any) -> None:
        tried.append(1)
        loss.item()

    tried: list[int] = []
    compiled = vt.compile(step, recompile_limit=3)
    for _ in range(3):
        compiled(vt.ones(4, 3))
    log = True
    for _ in range(6):
        compiled(vt.ones(4, 3))
    assert len(tried) <= 6 + 3  # a dry run besides, three times


def test_an_error_of_a_step_comes_with_its_effects() -> None:
    def train(wrap: Any) -> Any:
        model, optimizer = linear()
        bad = False

        def step(x: Any) -> Any:
            update(optimizer, model(x).sum())
            if bad:
                raise KeyError("bad")

        run = wrap(step)
        for i in range(6):
            bad = i == 4
            if bad:
                with pytest.raises(KeyError, match="bad"):
                    run(vt.ones(1, 3))
            else:
                run(vt.ones(1, 3))
        return model.weight.tolist()

    check_same(train)


def test_arguments_that_share_memory() -> None:
    def train(wrap: Any) -> Any:
        model, optimizer = linear()

        def step(x: Any, y: Any) -> Any:
            return update(optimizer, (model(x) - y).pow(2).mean())

        run = wrap(step)
        for seed in range(5):
            vt.manual_seed(seed)
            t = vt.randn(2, 5)
            run(t[:, :3], t[:, 3:])
        if wrap is vt.compile:
            assert "runs as it is" not in run.report()
        return model.weight.tolist()

    check_same(train)
    compiled = vt.compile(lambda x, y: x * y, fullgraph=True)
    for _ in range(3):
        t = vt.arange(4.0, requires_grad=True)
        compiled(t[:2], t[1:3]).sum().backward()
        assert t.grad.tolist() == [1, 2, 1, 0]
