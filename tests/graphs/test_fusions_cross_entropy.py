"""Gradients of cross entropy in the place of the logits."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions
from vibetensor.graphs import capture


def _model(
    classes: int = 11,
    *,
    autocast: bool = False,
    scale: float | None = None,
    read: str = "",
    steps: int = 1,
    **options: Any,
) -> Any:
    weight = vt.randn(classes, 8).requires_grad_()

    def step(x: Any, y: Any) -> Any:
        weight.grad = None
        extra = None
        for micro in range(steps):
            with vt.autocast(kind(), dtype=vt.bfloat16, enabled=autocast):
                logits = F.linear(x * (micro + 1), weight)
                if read == "before":
                    extra = logits.argmax(-1)
                loss = F.cross_entropy(logits, y, **options)
            if read == "after":
                extra = logits.argmax(-1)
            total = loss if loss.dim() == 0 else loss.sum()
            if scale is not None:
                total = total * scale
            (total / steps).backward()
        return [loss, weight.grad] + ([extra] if extra is not None else [])

    step.state = [weight]
    return step


def _inputs(rows: int = 6, classes: int = 11) -> list[tuple]:
    vt.manual_seed(3)
    return [(vt.randn(rows, 8), vt.randint(0, classes, (rows,))) for _ in range(4)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"reduction": "sum"},
        {"ignore_index": 3},
        {"scale": 4.0},
        {"steps": 3},
        {"read": "before"},
    ],
    ids=str,
)
def test_in_place(autocast: bool, options: dict) -> None:
    names = captured_names(lambda: _model(autocast=autocast, **options), _inputs())
    assert names.count("_cross_entropy_index_gradient") == options.get("steps", 1)
    assert "_cross_entropy_index" not in names
    assert "_cross_entropy_index_backward" not in names


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_read_after_the_loss_stay(autocast: bool) -> None:
    names = captured_names(lambda: _model(autocast=autocast, read="after"), _inputs())
    assert "_cross_entropy_index_backward" in names
    assert any("argmax" in d or "reads the logits" in d for d in decisions()), decisions()


def test_logits_that_are_returned_stay() -> None:
    def make() -> Any:
        weight = vt.randn(11, 8).requires_grad_()

        def step(x: Any, y: Any) -> Any:
            weight.grad = None
            logits = F.linear(x, weight)
            F.cross_entropy(logits, y).backward()
            return logits, weight.grad

        return step

    names = captured_names(make, _inputs())
    assert "_cross_entropy_index_backward" in names
    assert any("read after the step" in d for d in decisions())


def test_a_gradient_that_depends_on_the_loss_stays() -> None:
    def make() -> Any:
        weight = vt.randn(11, 8).requires_grad_()

        def step(x: Any, y: Any) -> Any:
            weight.grad = None
            loss = F.cross_entropy(F.linear(x, weight), y)
            loss.square().backward()
            return loss, weight.grad

        return step

    names = captured_names(make, _inputs())
    assert "_cross_entropy_index_backward" in names
    assert any("depends on what runs" in d for d in decisions())


def test_memory_falls_by_the_logits() -> None:
    rows, classes = 64, 4099
    inputs = _inputs(rows, classes)
    sizes = []
    for optimize in (False, True):
        vt.manual_seed(0)
        step = capture(_model(classes), optimize=optimize)
        for args in inputs:
            step(*args)
        (plan,) = step.variants[0].lowered.plans.values()
        sizes.append(plan.nbytes)
    assert sizes[0] - sizes[1] >= rows * classes * 4 * 0.95


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("part", ["weight", "gradient"])
def test_logits_that_are_weights_or_the_gradient_too_stay(autocast: bool, part: str) -> None:
    def make() -> Any:
        weight = vt.randn(11, 8).requires_grad_()

        def step(x: Any, y: Any) -> Any:
            weight.grad = None
            with vt.autocast(kind(), dtype=vt.bfloat16, enabled=autocast):
                logits = F.linear(x, weight)
            logits = logits.float()
            classes = logits[0].detach() if part == "weight" else None
            loss = F.cross_entropy(logits, y, weight=classes)
            loss.backward(logits[0, 0].detach() if part == "gradient" else None)
            return loss, weight.grad

        return step

    names = captured_names(make, _inputs())
    assert "_cross_entropy_index_backward" in names
    assert any("its weights or its incoming gradient" in d for d in decisions())
