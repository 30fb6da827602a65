"""Which capture a call belongs to as more of them come: several models in turn, gradients present and
absent, more shapes than there is room for, and what is kept of those that are gone."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CaptureError, capture
from vibetensor.torch import nn


def _model() -> tuple[Any, Any]:
    model = vt.nn.Linear(3, 2)
    return model, vt.optim.SGD(model.parameters(), lr=0.1)


def _train(model: Any, optimizer: Any, x: Any) -> Any:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def test_models_in_turn_are_captured_once_each() -> None:
    step = capture(_train)
    seen: list[tuple[Any, Any]] = []
    for _ in range(4):  # each brings new leaves
        seen.append(_model())
        for _ in range(4):
            for model, optimizer in seen:
                step(model, optimizer, vt.ones(2, 3))
    # Each with gradients absent at the start is one course; nothing is captured again.
    before = step.variants
    for _ in range(3):
        for model, optimizer in seen:
            step(model, optimizer, vt.ones(2, 3))
    assert step.variants == before and len(before) <= 2 * len(seen)
    assert step._captures == len(before)


def test_models_in_turn_have_eager_numbers() -> None:
    results = []
    for wrap in (lambda f: f, capture):
        vt.manual_seed(0)
        step, models, losses = wrap(_train), [_model() for _ in range(3)], []
        for index in range(12):
            model, optimizer = models[index % 3 if index > 5 else index % 2]
            losses.append(step(model, optimizer, vt.full((2, 3), index + 1.0)).item())
        results.append(losses)
    assert results[0] == results[1]


def test_a_gradient_that_another_step_leaves_is_no_reason() -> None:
    """Of leaves that a capture does not use it does not matter whether they have gradients."""
    (first, a), (second, b) = _model(), _model()
    step = capture(_train)
    for _ in range(3):
        step(first, a, vt.ones(2, 3))
        step(second, b, vt.ones(2, 3))
    count = step._captures
    for index in range(6):
        b.zero_grad()
        if index % 2:
            for p in second.parameters():
                p.grad = vt.zeros_like(p)
        step(first, a, vt.ones(2, 3))
    assert step._captures == count


def test_a_model_that_is_gone_is_not_kept() -> None:
    w = vt.ones(2)
    held: list[Any] = []
    step = capture(lambda x: (held[0](x).sum().backward(), w * 2)[1])
    for _ in range(2):  # the first run of each is never kept
        held[:] = [vt.nn.Linear(2, 2)]
        leaf = weakref.ref(held[0].weight)
        step(vt.ones(1, 2))
        held.clear()
        gc.collect()
        assert leaf() is None
    assert not step.variants


def test_the_one_used_longest_ago_makes_room() -> None:
    step = capture(lambda x: x * 2, max_variants=3)

    def call(size: int, times: int = 10) -> None:
        for _ in range(times):
            assert step(vt.ones(size)).tolist() == [2.0] * size

    for size in (1, 2, 3):
        call(size)
    call(1)
    with pytest.warns(UserWarning, match="used longest ago is dropped .max_variants=3") as caught:
        call(4)
    assert caught[0].filename == __file__
    assert sorted(v.inputs[0].numel() for v in step.variants) == [1, 3, 4]
    call(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        for size in (5, 6, 7, 8, 3, 5):
            call(size)
    assert sorted(v.inputs[0].numel() for v in step.variants) == [3, 5, 8]
    assert step.last is not None and step.last.inputs[0].numel() == 5


def test_captures_that_never_pay_end_in_eager_calls() -> None:
    step = capture(lambda x: x * 2, max_variants=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in range(1, 12):
            assert step(vt.ones(size)).numel() == size
    assert step._captures == 4  # two, and two in the place of those
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and "is dropped" in texts[0] and "run eagerly" in texts[1]
    assert all(w.filename == __file__ for w in caught)
    # What is there replays.
    for variant in step.variants:
        step(vt.ones(variant.inputs[0].numel()))
    assert [v.replays for v in step.variants] == [1, 1]


class Loss:
    """An object to call, with an option."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def __call__(self, x: Any) -> Any:
        return (x * self.weight).sum()


class Slotted:
    """The same without a dictionary."""

    __slots__ = ("weight",)
    __init__, __call__ = Loss.__init__, Loss.__call__


@pytest.mark.parametrize("kind", [Loss, Slotted])
def test_options_of_objects_to_call_belong_to_the_course(kind: Any) -> None:
    step, loss = capture(lambda f, x: f(x)), kind(2.0)
    for weight in (2.0, 3.0, 2.0, -0.0, 3.0):
        loss.weight = weight
        for _ in range(3):
            assert step(loss, vt.ones(2)).item() == 2 * weight
    assert len(step.variants) == 3
    assert step(kind(3.0), vt.ones(2)).item() == 6
    loss.weight = vt.tensor(4.0)
    with pytest.raises(CaptureError, match="compared by identity"):
        step(loss, vt.ones(2))
    loss.weight = [1.0]
    with pytest.raises(CaptureError, match="hashable"):
        step(loss, vt.ones(2))
    loss.weight = loss
    with pytest.raises(CaptureError, match="compared by identity"):
        step(loss, vt.ones(2))


def test_functions_replay_without_a_look_at_them() -> None:
    step = capture(lambda f, x: f(x))
    for function in (nn.functional.relu, nn.ReLU(), vt.exp, lambda x: x + 1):
        for _ in range(4):
            assert step(function, vt.ones(2)).tolist() == function(vt.ones(2)).tolist()
        assert step.last is not None and step.last.replays == 3
    for function in (nn.functional.relu, nn.ReLU()):
        assert step(function, vt.ones(2)).tolist() == [1, 1]
        assert step._replays.last is not None  # the long way forgets it
