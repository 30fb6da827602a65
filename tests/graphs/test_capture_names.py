"""Names that a captured function finds outside of itself, bound to something else between calls."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.graphs import capture
from vibetensor.torch import nn

X = vt.ones(2)


class Kind(enum.Enum):
    PLUS = 1
    MINUS = -1


class Base:
    K = 2.0
    __slots__ = ("__dict__", "slot")

    def __init__(self) -> None:
        self.slot = 2.0
        self.j = 2.0
        self.config = types.SimpleNamespace(p=2.0, inner=types.SimpleNamespace(q=2.0))
        self.layer = nn.Linear(2, 2)
        self.layer.options = types.SimpleNamespace(p=2.0)

    @property
    def scale(self) -> float:
        return self.j

    @functools.cached_property
    def kept(self) -> float:
        return 1.0

    @staticmethod
    def doubled(x: Any) -> Any:
        return x * FACTOR

    @classmethod
    def of_class(cls, x: Any) -> Any:
        return x * cls.K

    def helper(self, x: Any) -> Any:
        return x * self.j

    def __call__(self, x: Any) -> Any:
        return x * self.j


class Trainer(Base):
    def helper(self, x: Any) -> Any:
        return super().helper(x)

    def by_helper(self, x: Any) -> Any:
        return self.helper(x) * self.kept

    def by_property(self, x: Any) -> Any:
        return x * self.scale

    def by_class(self, x: Any) -> Any:
        return x * self.K

    def by_class_method(self, x: Any) -> Any:
        return self.of_class(x)

    def by_static(self, x: Any) -> Any:
        return self.doubled(x)

    def by_slot(self, x: Any) -> Any:
        return x * self.slot

    def by_chain(self, x: Any) -> Any:
        return x * self.config.inner.q

    def by_module(self, x: Any) -> Any:
        return x * self.layer.options.p

    def by_lambda(self, x: Any) -> Any:
        return (lambda y: y * self.j)(x)


FACTOR: Any = 2.0


def _set_factor() -> None:
    global FACTOR
    FACTOR = 5.0


def _seen(function: Callable[[Any], Any], change: Callable[[], Any]) -> None:
    """Captured, changed, and captured again; replays come before and after."""
    step = capture(function)
    for _ in range(4):
        before = step(X)
    assert step.last.replays > 0
    change()
    for _ in range(4):
        after = step(X)
    wanted = function(X)
    assert not (before.dtype == wanted.dtype and vt.equal(before, wanted))
    assert after.dtype == wanted.dtype and vt.equal(after, wanted)
    assert len(step.variants) == 2 and step.last.replays > 0


@pytest.mark.parametrize(
    "method,name",
    [
        ("by_helper", "j"), ("by_property", "j"), ("by_class", "K"), ("by_slot", "slot"),
        ("by_lambda", "j"), ("by_chain", "config.inner.q"), ("by_module", "layer.options.p"),
        ("__call__", "j"), ("by_class", "class K"), ("by_class_method", "class K"),
        ("by_helper", "class helper"), ("by_static", "global"),
    ],
)  # fmt: skip
def test_attributes(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    monkeypatch.setitem(globals(), "FACTOR", 2.0)

    def change() -> None:
        if name == "global":
            _set_factor()
        elif name == "class helper":
            monkeypatch.setattr(Trainer, "helper", lambda self, x: x * 7)
        elif name.startswith("class "):
            monkeypatch.setattr(Base, name[6:], 5.0)
        else:
            *path, last = name.split(".")
            setattr(functools.reduce(getattr, path, trainer), last, 5.0)

    _seen(getattr(trainer, method), change)


def test_objects_to_call_and_partials() -> None:
    def scaled(trainer: Any, x: Any) -> Any:
        return x * trainer.j

    trainer = Trainer()
    _seen(trainer, lambda: setattr(trainer, "j", 5.0))
    other = Trainer()
    _seen(functools.partial(scaled, other), lambda: setattr(other, "j", 5.0))


@pytest.mark.parametrize(
    "old,new,use",
    [
        (vt.float64, vt.int32, lambda x: x.to(FACTOR)),
        (Kind.PLUS, Kind.MINUS, lambda x: x * FACTOR.value),
        (np.float32(2), np.float32(3), lambda x: x * float(FACTOR)),
        ((0, 1), (1, 0), lambda x: (x * vt.tensor([1.0, 2.0]))[list(FACTOR)]),
        (vt.ones(2), vt.zeros(2), lambda x: x * FACTOR),
        (lambda x: x, lambda x: x * 3, lambda x: FACTOR(x)),
        (types.SimpleNamespace(a=1.0), types.SimpleNamespace(a=2.0), lambda x: x * FACTOR.a),
        (nn.Identity(), nn.Softmax(0), lambda x: FACTOR(x)),
    ],
    ids=["dtype", "enum", "numpy", "tuple", "tensor", "function", "object", "module"],
)  # fmt: skip
def test_globals_of_every_kind(
    old: Any, new: Any, use: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "FACTOR", old)
    _seen(use, lambda: monkeypatch.setitem(globals(), "FACTOR", new))


def test_defaults() -> None:
    def plain(x: Any, k: float = 2.0) -> Any:
        return x * k

    def named(x: Any, *, k: float = 2.0) -> Any:
        return x * k

    _seen(plain, lambda: setattr(plain, "__defaults__", (5.0,)))
    _seen(named, lambda: named.__kwdefaults__.update(k=5.0))


def test_closures_of_functions_among_the_arguments() -> None:
    k = 2.0

    def scaled(x: Any) -> Any:
        return x * k

    step = capture(lambda function, x: function(x))
    for _ in range(4):
        assert step(scaled, X).tolist() == [2.0, 2.0]
    k = 5.0
    assert step(scaled, X).tolist() == [5.0, 5.0]


def test_an_optimizer_and_a_model_that_are_made_anew() -> None:
    class Loop:
        def __init__(self) -> None:
            self.build()

        def build(self) -> None:
            self.model = nn.Linear(2, 1)
            self.optimizer = vt.optim.SGD(self.model.parameters(), lr=0.1)

        @capture
        def step(self, x: Any) -> Any:
            self.optimizer.zero_grad()
            loss = self.model(x).sum()
            loss.backward()
            self.optimizer.step()
            return loss

    loop = Loop()
    for _ in range(4):
        loop.step(X)
    old = loop.model
    loop.build()
    weights = [old.weight.clone(), loop.model.weight.clone()]
    loop.step(X)
    assert vt.equal(old.weight, weights[0]) and not vt.equal(loop.model.weight, weights[1])
    loop.step(X)
    assert loop.step.last.replays > 0
    assert "the name model is another one" in loop.step.report()


def test_names_that_the_function_sets_are_no_reason() -> None:
    class Loop:
        calls = 0

        def note(self) -> None:
            self.calls += 1

        def step(self, x: Any) -> Any:
            self.note()
            return x * 2

    step = capture(Loop().step)
    for _ in range(6):
        step(X)
    assert len(step.variants) == 1 and step.last.replays == 5


def test_a_closure_that_is_emptied() -> None:
    def make() -> tuple[Any, Any]:
        k = 2.0

        def scaled(x: Any) -> Any:
            return x * k

        def empty() -> None:
            nonlocal k
            del k

        return scaled, empty

    scaled, empty = make()
    step = capture(scaled)
    for _ in range(3):
        step(X)
    empty()
    with pytest.raises(NameError):
        step(X)


def test_compiled_functions_see_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    compiled = vt.compile(trainer.by_helper)
    for _ in range(3):
        assert compiled(X).tolist() == [2.0, 2.0]
    trainer.j = 5.0
    for _ in range(3):
        assert compiled(X).tolist() == [5.0, 5.0]
    assert "runs as it is" not in compiled.report()
