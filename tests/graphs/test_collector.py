"""Python's collector stays out of what capture does with a tape, and is as before afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import vibetensor.torch as torch
from vibetensor.graphs import capture, collector, passes


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_it_is_as_before_afterwards() -> None:
    with collector.paused():
        assert not gc.isenabled()
        with collector.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), collector.paused():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    with collector.paused():
        pass
    assert not gc.isenabled()


def _step(x: Any) -> Any:
    return (x * 2 + 1).sum()


def test_a_capture_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, collections = [], []

    def run(tape: Any) -> Any:
        seen.append(gc.isenabled())
        before = len(collections)
        made = [[object()] for _ in range(3 * gc.get_threshold()[0])]
        assert len(collections) == before and made
        return tape

    monkeypatch.setattr(passes, "ALL", (SimpleNamespace(__name__="probe", run=run),))
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        step = capture(_step)
        x = torch.randn(3)
        assert [step(x).item() for _ in range(3)] == [_step(x).item()] * 3
    finally:
        gc.callbacks.pop()
    assert seen and not any(seen) and gc.isenabled()


def test_a_pass_that_fails_leaves_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tape: Any) -> Any:
        raise RuntimeError("no pass")

    monkeypatch.setattr(passes, "ALL", (SimpleNamespace(__name__="probe", run=run),))
    step = capture(_step)
    with pytest.raises(RuntimeError, match="no pass"):
        for _ in range(3):
            step(torch.randn(3))
    assert gc.isenabled()
