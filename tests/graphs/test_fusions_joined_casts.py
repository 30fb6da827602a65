"""Casts of many tensors in one op. The pass rewrites for CUDA; here it is made to for the CPU."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names
from vibetensor import _C
from vibetensor.graphs.passes import joined_casts


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_casts, "DEVICES", ("cpu", "cuda"))


def _inputs() -> list[tuple]:
    vt.manual_seed(3)
    return [(vt.randn(4, 7),) for _ in range(4)]


def _autocast_model(micro: int = 1) -> Any:
    model = vt.nn.Sequential(*(vt.nn.Linear(7, 7) for _ in range(3)))

    def step(x: Any) -> Any:
        model.zero_grad()
        for i in range(micro):
            with vt.autocast(kind(), dtype=vt.bfloat16):
                loss = model(x * 2 if i else x).float().square().mean()
            loss.backward()
        return loss, [p.grad for p in model.parameters()]

    step.state = [*model.parameters()]
    return step


def test_weights_and_gradients() -> None:
    names = captured_names(_autocast_model, _inputs())
    # Weights and the input; gradients of weights; the loss's two stay alone.
    assert names.count("_convert_all_") == 2
    assert names.count("_to_dtype") == 2


def test_accumulated_gradients_are_read_as_they_are() -> None:
    names = captured_names(lambda: _autocast_model(2), _inputs())
    assert names.count("add_") == 6
    # Of gradients only the first six are converted, by one op; the rest are losses and inputs.
    assert names.count("_convert_all_") + names.count("_to_dtype") <= 8


def test_nothing_is_rewritten_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_casts, "DEVICES", ("cuda",))
    assert "_convert_all_" not in captured_names(_autocast_model, _inputs())


def test_sources_and_results_that_change_keep_their_order() -> None:
    a, b = vt.randn(3, 4), vt.randn(3, 4)

    def make() -> Any:
        a.fill_(1.5)
        b.fill_(2.5)

        def step(x: Any) -> Any:
            first = a.to(vt.bfloat16)
            a.mul_(1.01)
            second = a.to(vt.bfloat16)
            third = b.double()
            third.add_(1)
            fourth = b.half()
            return first, second, third, fourth, x.sum()

        step.state = [a, b]
        return step

    names = captured_names(make, _inputs())
    assert names.count("_convert_all_") == 1  # a's first cast and those of b
    assert names.count("_to_dtype") == 1


def test_convert_all() -> None:
    sources = [vt.randn(s) for s in ((3, 5), (), (0, 2), (1030,))] + [vt.randn(3).double()]
    targets = [vt.empty(t.shape, dtype=vt.bfloat16) for t in sources[:4]]
    targets.append(vt.empty(3, dtype=vt.float16))
    _C._ops._convert_all_(targets, sources)
    for mine, source in zip(targets, sources):
        assert (mine == source.to(mine.dtype)).all()
    with pytest.raises(RuntimeError, match="same length"):
        _C._ops._convert_all_(targets[:1], sources)
