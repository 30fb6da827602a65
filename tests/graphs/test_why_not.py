"""What passes nearly did and why not, for those of common subexpressions, dead code and casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import capture, record
from vibetensor.graphs.passes import dead_code, joined_casts, repeated


def decisions(step: Callable[[], Any], module: Any) -> list[tuple[bool, str]]:
    """What the pass decides on a recording of the step, each with whether it was done."""
    return [(d.made, d.text) for d in module.run(record(step).tape).decisions]


def test_repeated() -> None:
    x, state = vt.ones(3), vt.ones(3)

    def step() -> Any:
        total = x.sigmoid() + x.sigmoid()  # once
        changed = x.exp()
        changed.add_(1)
        total = total + changed + x.exp()  # one is changed afterwards
        total = total + x.tanh()
        x.add_(state)
        return total + x.tanh() + vt.nn.functional.dropout(state) * vt.nn.functional.dropout(state)

    found = decisions(step, repeated)
    assert (True, "sigmoid once more on the same values is the first one's result") in found
    stays = "once more on the same tensors stays"
    assert (False, f"exp {stays}: a result is changed afterwards") in found
    assert (False, f"tanh {stays}: what it reads has changed in between") in found
    assert any("it draws random numbers" in text for made, text in found if not made)
    assert not any("add_" in text for _, text in found)


def test_a_result_that_lives_on_is_not_shared() -> None:
    x = vt.ones(3)
    found = decisions(lambda: (x.exp(), x.exp()), repeated)
    assert found == [
        (False, "exp once more on the same tensors stays: a result lives on after the step")
    ]


def test_dead_code() -> None:
    x = vt.ones(3, 4)

    def step() -> Any:
        x.exp()
        return x.max(1)[0] + 1

    found = decisions(step, dead_code)
    assert (True, "exp goes: nobody reads its results") in found
    stays = [text for made, text in found if not made]
    assert len(stays) == 1 and stays[0].endswith("nobody reads 1 of its 2 results, but the others")
    report = capture(lambda: step())
    for _ in range(3):
        report()
    assert "exp goes: nobody reads its results" in report.report()


def test_joined_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_casts, "DEVICES", ("cpu", "cuda"))
    weight = vt.ones(3, 4)
    sums, halves = vt.zeros(3, 4), vt.ones(3, 4).to(vt.bfloat16)
    wide = vt.zeros(3, 4, dtype=vt.float64)

    def step() -> Any:
        wide.add_(halves.float())
        sums.add_(halves.float())
        first = weight.to(vt.bfloat16) * 2
        return first.float().exp()  # of what the other cast leads to

    found = decisions(step, joined_casts)
    assert (True, "_to_dtype + add_ as one op") in found
    assert (False, "_to_dtype before add_ stays: the sum is of another dtype") in found
    alone = "_to_dtype stays by itself: other casts cannot run where it does"
    assert (False, alone) in found
