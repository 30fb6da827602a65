"""Copies and pickles of what is captured, and what cannot be captured at all."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as vt
from tests.graphs.default_device import kind
from vibetensor.graphs import CaptureError, capture, make_graphed_callables
from vibetensor.torch import nn

X = vt.ones(1, 2)


@capture
def doubled(x: Any) -> Any:
    return x * 2


@vt.compile
def tripled(x: Any) -> Any:
    return x * 3


def _plain(x: Any) -> Any:
    return x * 4


class Loop:
    def __init__(self) -> None:
        self.k = 2.0

    @capture
    def step(self, x: Any) -> Any:
        return x * self.k

    @vt.compile
    def compiled(self, x: Any) -> Any:
        return x * self.k


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def test_pickles_of_captured_functions() -> None:
    for function in (doubled, tripled, Loop.step):
        assert _pickled(function) is function
    assert _pickled(capture(_plain))(X).tolist() == [[4.0, 4.0]]
    assert _pickled(vt.compile(_plain))(X).tolist() == [[4.0, 4.0]]


@pytest.mark.parametrize("name", ["step", "compiled"])
def test_pickles_of_captured_methods(name: str) -> None:
    loop = Loop()
    getattr(loop, name)(X)
    bound = _pickled(getattr(loop, name))
    for _ in range(3):
        assert bound(X).tolist() == [[2.0, 2.0]]
    assert type(bound) is type(getattr(loop, name)) and bound is not getattr(loop, name)


@pytest.mark.parametrize("again", [_pickled, copy.deepcopy])
def test_copies_of_a_captured_module(again: Any) -> None:
    layer = nn.Linear(2, 2)
    step = capture(layer)
    other = again(step)
    wanted = layer(X)
    with vt.no_grad():
        layer.weight.zero_()
    assert vt.equal(other(X), wanted) and not vt.equal(step(X), wanted)


@pytest.mark.parametrize("again", [_pickled, copy.deepcopy])
def test_copies_of_graphed_modules_are_their_own(again: Any) -> None:
    layer = make_graphed_callables(nn.Linear(2, 2), (X,))
    other = again(layer)
    with vt.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    result = other(X)
    assert result.tolist() == [[0.0, 0.0]]
    result.sum().backward()
    assert other.weight.grad is not None and layer.weight.grad is None
    assert again(make_graphed_callables(_plain, (X,)))(X).tolist() == [[4.0, 4.0]]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.weight = nn.Parameter(vt.ones(2))

    def forward(self, x: Any) -> Any:
        return x * self.weight * self.scale


class Decorated(Scaled):
    @vt.compile
    def forward(self, x: Any) -> Any:
        return x * self.weight * self.scale


def _compiled() -> Any:
    module = Scaled()
    module.compile()
    return module


@pytest.mark.parametrize("again", [_pickled, copy.deepcopy, copy.copy])
@pytest.mark.parametrize(
    "make", [_compiled, Decorated, lambda: make_graphed_callables(Scaled(), (X,))]
)
def test_copies_run_with_their_own_attributes(make: Any, again: Any) -> None:
    module = make()
    for _ in range(2):
        assert module(X).tolist() == [[2.0, 2.0]]
    other = again(module)
    other.scale = 3.0
    for _ in range(2):
        assert other(X).tolist() == [[3.0, 3.0]] and module(X).tolist() == [[2.0, 2.0]]
    assert (other.weight is module.weight) == (again is copy.copy)
    assert "forward" not in vars(other)  # that of the class again


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy])
def test_copies_keep_the_forward_that_an_object_had(again: Any) -> None:
    module = Scaled()
    module.forward = lambda x: x * module.weight * 5  # type: ignore[method-assign]
    other = again(make_graphed_callables(module, (X,)))
    assert other(X).tolist() == [[5.0, 5.0]]
    assert not hasattr(other.forward, "captured_forward")


def test_captured_methods_need_a_place_for_their_captures() -> None:
    class Slots:
        __slots__ = ()

        @vt.compile
        def method(self, x: Any) -> Any:
            return x

    with pytest.raises(TypeError, match="method needs objects with a __dict__.*Slots has none"):
        Slots().method(X)


def test_graphed_modules_keep_to_their_modes() -> None:
    layer = make_graphed_callables(nn.Linear(2, 2), (X,))
    with vt.autocast(kind(), dtype=vt.bfloat16):
        assert layer(X).dtype == vt.bfloat16
    assert layer(X).dtype == vt.float32


def test_functions_that_run_later_are_refused() -> None:
    def generator(x: Any) -> Iterator[Any]:
        yield x

    async def coroutine(x: Any) -> Any:
        return x

    async def both(x: Any) -> AsyncIterator[Any]:
        yield x

    class Caller:
        def __call__(self, x: Any) -> Iterator[Any]:
            yield x

    for function in (generator, coroutine, both, Caller(), functools.partial(generator)):
        with pytest.raises(TypeError, match="after the call has returned"):
            capture(function)
    with pytest.raises(TypeError, match="takes a function or a module, got int"):
        capture(5)
    step = capture(lambda x: map(abs, [x]))
    with pytest.raises(CaptureError, match="returns a map"):
        step(X)


def test_looking_at_what_was_compiled(tmp_path: Path) -> None:
    model = vt.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(CaptureError, match="not been captured"):
        model._compiled.profile()
    loss = model(X).sum()
    with pytest.raises(RuntimeError, match="after its backward"):
        model._compiled.profile()
    loss.backward()
    model._compiled.chrome_trace(tmp_path / "model.json")
    events = json.loads((tmp_path / "model.json").read_text())["traceEvents"]
    ops = [event for event in events if event["ph"] == "X"]
    assert {op["cat"] for op in ops} == {"forward", "backward"}
    starts = [op["ts"] for op in ops]
    assert starts == sorted(starts)
    rows = {row.name for row in model._compiled.profile().by_phase()}
    assert rows == {"forward", "backward"}
    model._compiled.report_html(tmp_path / "model.html")
    page = (tmp_path / "model.html").read_text()
    assert "linear" in page and "threshold_backward" in page

    optimizer = vt.optim.SGD(model.parameters(), lr=0.1)

    @vt.compile
    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = model._orig_mod(x).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(3):
        step(X)
    assert "optimizer" in {row.name for row in step.profile().by_phase()}
    step.chrome_trace(tmp_path / "step.json")
    step.report_html(tmp_path / "step.html")
    assert "_fused_sgd_" in (tmp_path / "step.json").read_text()
    assert "_fused_sgd_" in (tmp_path / "step.html").read_text()


def test_the_trace_of_a_graph(tmp_path: Path) -> None:
    graph = vt.Graph()
    with vt.graph(graph):
        X * 2
        result = X * 3
    graph.chrome_trace(tmp_path / "graph.json")
    events = json.loads((tmp_path / "graph.json").read_text())["traceEvents"]
    assert "mul" in {event["name"] for event in events if event["ph"] == "X"}
    graph.replay()
    assert result.tolist() == [[3.0, 3.0]]
