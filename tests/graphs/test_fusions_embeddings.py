"""Embeddings by positions, and gradients of tables that something else has a gradient for too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions

WIDTH = 12


def _step(rows: int, positions: int, start: int = 0, **settings: Any) -> Any:
    """Words and positions, the table of words also the last layer's weight, as in a language model."""
    words, places = vt.randn(rows, WIDTH), vt.randn(positions, WIDTH)
    state = [words.requires_grad_(), places.requires_grad_()]

    def step(x: Any, y: Any) -> Any:
        for table in state:
            table.grad = None
        at = vt.arange(start, start + x.shape[1])
        h = F.embedding(x, words, **settings) + F.embedding(at, places)
        loss = F.cross_entropy(F.linear(h.tanh(), words).flatten(0, 1), y.flatten())
        loss.backward()
        grads = [table.grad.clone() for table in state]
        with vt.no_grad():
            for table in state:
                table.sub_(table.grad)
        return loss, grads

    step.state = state  # type: ignore[attr-defined]
    return step


def _inputs(rows: int, length: int) -> list[tuple]:
    rng = np.random.default_rng(1)
    draw = lambda: vt.from_numpy(rng.integers(0, rows, (3, length))).to(vt.get_default_device())  # noqa: E731
    return [(draw(), draw()) for _ in range(4)]


def test_rows_in_order_are_read_where_they_are() -> None:
    names = captured_names(lambda: _step(50, 16), _inputs(50, 16), 1e-5)
    assert names.count("embedding") == names.count("embedding_dense_backward") == 1
    assert "_arange_" not in names and "index_add_" not in names
    found = [d for d in decisions() if "in order are copied" in d]
    assert len(found) == 2, decisions()


@pytest.mark.parametrize("positions,start", [(20, 0), (17, 1)])
def test_the_gradient_of_some_positions_is_not_the_whole(positions: int, start: int) -> None:
    names = captured_names(lambda: _step(50, positions, start), _inputs(50, 16), 1e-5)
    assert names.count("embedding_dense_backward") == 2
    assert names.count("embedding") == 1 + (start > 0)


@pytest.mark.parametrize(
    "settings", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str
)
def test_a_large_table_is_added_to_where_its_gradient_is(settings: dict) -> None:
    names = captured_names(lambda: _step(3000, 16, **settings), _inputs(3000, 16), 1e-5)
    joined = kind() != "cpu" and not settings
    assert names.count("index_add_") == joined
    assert names.count("embedding_dense_backward") == 1 - joined
    if kind() != "cpu" and settings:
        assert any("not all rows are sums" in d for d in decisions())


def test_positions_that_change_before_they_are_read_stay() -> None:
    def make() -> Any:
        table = vt.randn(8, WIDTH)

        def step(x: Any) -> Any:
            rows = F.embedding(vt.arange(8), table)
            before = rows * x
            table.mul_(2)
            return before, rows * x

        step.state = [table]  # type: ignore[attr-defined]
        return step

    captured_names(make, [(vt.randn(8, WIDTH),) for _ in range(4)])


def test_indices_that_are_written_again_stay() -> None:
    table = vt.randn(8, WIDTH)

    def step(x: Any) -> Any:
        at = vt.arange(8)
        at.mul_(0)
        return F.embedding(at, table) * x

    captured_names(lambda: step, [(vt.randn(8, WIDTH),) for _ in range(4)])
    assert not any("in order" in d for d in decisions())
