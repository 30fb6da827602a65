"""Logits that are made a part of the rows at a time: which, and how near the results are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions
from vibetensor.graphs.passes import split_head

MADE = "the logits in 4 parts"
LOSS = "_cross_entropy_index_gradient"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass takes the steps of these tests for large ones."""
    monkeypatch.setattr(split_head, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(split_head, "LEAST_PEAK", 1000)
    monkeypatch.setattr(split_head, "LEAST_ROWS", 8)


Loss = Callable[[Any, Any], Any]


def make(loss_of: Loss, *, classes: int = 200, half: bool = False, bias: bool = False) -> Any:
    trunk, head = vt.nn.Linear(16, 24), vt.nn.Linear(24, classes, bias=bias)
    optimizer = vt.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.1)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        with vt.autocast(kind(), dtype=vt.bfloat16, enabled=half):
            loss = loss_of(head(F.relu(trunk(x))), y)
        loss.backward()
        optimizer.step()
        return loss

    step.state = [*trunk.parameters(), *head.parameters()]  # type: ignore[attr-defined]
    return step


def batches(rows: int = 64, classes: int = 200, ignored: int = 0) -> list[tuple]:
    vt.manual_seed(1)
    made = []
    for _ in range(4):
        y = vt.randint(0, classes, (rows,))
        y[:ignored] = -100
        made.append((vt.randn(rows, 16), y))
    return made


@pytest.mark.parametrize("ignored", [0, 3, 40])
@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda x, y: F.cross_entropy(x, y, reduction="sum") / 64,
        lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1) * 3,
    ],
    ids=["mean", "sum", "smoothed"],
)
def test_parts_of_a_loss(loss: Loss, ignored: int) -> None:
    names = captured_names(lambda: make(loss), batches(ignored=ignored), bound=1e-5)
    assert names.count(LOSS) == 4
    assert any(MADE in d for d in decisions())


def test_another_ignored_class() -> None:
    def loss(x: Any, y: Any) -> Any:
        return F.cross_entropy(x, y, ignore_index=7)

    names = captured_names(lambda: make(loss), batches(), bound=1e-5)
    assert names.count(LOSS) == 4


def test_nothing_but_ignored_rows_is_nan() -> None:
    step = captured_names(lambda: make(F.cross_entropy), batches(ignored=0)[:3], bound=1e-5)
    assert step.count(LOSS) == 4
    from vibetensor.graphs import capture

    captured = capture(make(F.cross_entropy))
    for x, y in batches():
        captured(x, y)
    x, y = batches(ignored=64)[0]
    assert captured(x, y).isnan().item()


@pytest.mark.skipif(
    "not vt.cuda.is_available() and vt.get_default_device().type != 'cpu'",
    reason="autocast needs a device of its own",
)
def test_half_precision() -> None:
    names = captured_names(lambda: make(F.cross_entropy, half=True), batches(), bound=2e-2)
    assert names.count(LOSS) == 4


@pytest.mark.parametrize(
    ("loss", "rows", "bias", "why"),
    [
        (F.cross_entropy, 66, False, "do not divide"),
        (F.cross_entropy, 16, False, "too few"),
        (F.cross_entropy, 64, True, "other ops than two products"),
        (lambda x, y: F.cross_entropy(x * 2, y), 64, False, "no linear makes them"),
    ],
    ids=["rows", "few rows", "bias", "scaled"],
)
def test_what_stays(loss: Loss, rows: int, bias: bool, why: str) -> None:
    names = captured_names(lambda: make(loss, bias=bias), batches(rows), bound=1e-5)
    assert names.count(LOSS) == 1
    assert any(why in d for d in decisions()), decisions()


def test_small_steps_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_head, "LEAST_PEAK", 1 << 20)
    assert captured_names(lambda: make(F.cross_entropy), batches()).count(LOSS) == 1


def test_a_head_that_is_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    def tied() -> Any:
        table = vt.nn.Embedding(200, 16)
        optimizer = vt.optim.SGD(table.parameters(), lr=0.1)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(table(x).tanh(), table.weight), y)
            loss.backward()
            optimizer.step()
            return loss

        step.state = list(table.parameters())  # type: ignore[attr-defined]
        return step

    vt.manual_seed(1)
    pairs = [(vt.randint(0, 200, (64,)), vt.randint(0, 200, (64,))) for _ in range(4)]
    assert captured_names(tied, pairs, bound=1e-5).count(LOSS) == 4
