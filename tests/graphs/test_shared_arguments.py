"""Arguments that share memory: one tensor twice, windows of one buffer, halves of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CaptureError, capture


def _weighted(x: Any, y: Any) -> Any:
    return 2 * x + 3 * y


def _check(function: Any, *arguments: Any) -> None:
    for _ in range(4):
        assert function(*arguments).tolist() == _weighted(*arguments).tolist()


def _disjoint(t: Any) -> tuple[Any, Any]:
    return t[:4], t[4:]


def _overlapping(t: Any) -> tuple[Any, Any]:
    return t[:-1], t[1:]


def _one(t: Any) -> tuple[Any, Any]:
    return t[:4], t[:4]


def _apart(t: Any) -> tuple[Any, Any]:
    return t[:4].clone(), t[4:].clone()


WAYS: list[Callable[[Any], tuple[Any, Any]]] = [_one, _disjoint, _apart, _overlapping]


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", WAYS)
def test_each_way_to_share_memory_has_its_own_numbers(first: Any, second: Any) -> None:
    function = capture(_weighted)
    for way in (first, second, first):
        _check(function, *way(vt.arange(8.0)))
        _check(function, *way(vt.arange(8.0) * vt.arange(8.0)))


def test_windows_of_one_buffer_are_one_capture_wherever_they_lie() -> None:
    function = capture(_weighted)
    tokens = vt.arange(64.0)
    for at in range(0, 40, 5):
        _check(function, tokens[at : at + 8], tokens[at + 1 : at + 9])
        _check(function, tokens[at : at + 8], tokens[at + 9 : at + 17])
    assert len(function.variants) == 1


def test_a_language_model_takes_its_tokens_and_targets_from_one_tensor() -> None:
    def make(wrap: Callable[..., Any]) -> tuple[Any, Any]:
        vt.manual_seed(0)
        model = vt.nn.Sequential(vt.nn.Embedding(11, 6), vt.nn.Linear(6, 11))
        optimizer = vt.optim.AdamW(model.parameters(), lr=1e-2)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = vt.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            return loss

        return wrap(step), model

    eager, captured = make(lambda f: f), make(capture)
    for i in range(6):
        t = vt.randint(0, 11, (2, 9))
        x, y = (t[:, :-1], t[:, 1:]) if i % 3 else (t[:, :-1].clone(), t[:, 1:].clone())
        assert eager[0](x, y).item() == captured[0](x, y).item()
    for p, q in zip(eager[1].parameters(), captured[1].parameters()):
        assert p.tolist() == q.tolist()


def test_several_arguments_of_one_storage() -> None:
    def weighted(a: Any, b: Any, c: Any) -> Any:
        return a + 10 * b + 100 * c

    t = vt.arange(6.0)
    function = capture(weighted)
    for order in ((0, 0, 2), (0, 2, 0), (2, 0, 0), (0, 2, 4), (2, 2, 2), (4, 2, 2)):
        for _ in range(3):
            parts = [t[at : at + 2] for at in order]
            assert function(*parts).tolist() == weighted(*parts).tolist(), order


def test_other_shapes_and_strides_on_one_storage() -> None:
    t = vt.arange(6, dtype=vt.int32)
    function = capture(lambda a, b: a.sum() + b.sum() * 2)
    for _ in range(3):
        assert function(t, t.view(2, 3)).item() == 45
        assert function(t[::2], t[1::2]).item() == 6 + 2 * 9


@pytest.mark.parametrize("first", WAYS)
def test_one_that_is_written_is_refused(first: Any) -> None:
    def changes(x: Any, y: Any) -> Any:
        x.add_(1)
        return x + y[: len(x)]

    function = capture(changes)
    if first in (_one, _apart):  # a capture of what may be there already
        for _ in range(3):
            function(*first(vt.arange(8.0)))
    t = vt.arange(8.0)
    for i in range(3):
        with pytest.raises(CaptureError, match=r"changes an argument of \(4,\).*shares memory"):
            function(t[:4], t[2:6] if i else t[4:])
    assert t.tolist() == vt.arange(8.0).tolist()


def test_one_that_is_written_is_refused_where_calls_run_eagerly() -> None:
    def changes(x: Any, y: Any) -> Any:
        x.add_(1)
        return x + y

    function = capture(changes, max_variants=0)
    t = vt.arange(8.0)
    with pytest.warns(UserWarning, match="max_variants"):
        assert function(t[:4].clone(), t[4:]).tolist() == [5, 7, 9, 11]
    with pytest.raises(CaptureError, match="shares memory"):
        function(t[:4], t[2:6])
    with pytest.warns(UserWarning, match="max_variants"):
        assert capture(_weighted, max_variants=0)(t[:4], t[2:6]).tolist() == [6, 11, 16, 21]
    with vt.autograd.set_detect_anomaly(True), pytest.raises(CaptureError, match="shares memory"):
        capture(changes)(t[:4], t[2:6])


def test_a_trained_tensor_and_a_window_of_it() -> None:
    w = vt.arange(4.0).requires_grad_(True)

    def step(w: Any, x: Any) -> Any:
        return (w.detach()[:2] * x).sum()

    function = capture(step)
    for part in (w.detach()[:2], w.detach()[2:], vt.ones(2)):
        for _ in range(3):
            assert function(w, part).item() == step(w, part).item()
