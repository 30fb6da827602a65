"""Copies that go away: pieces made joined, results written in place, sources read where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.graphs.rewritten import check_bits, op_names
from vibetensor.graphs import capture
from vibetensor.graphs.passes import copies, dead_code
from vibetensor.graphs.tape import Tape

F = vt.nn.functional


def _check(function: Callable[..., Any], *tensors: Any) -> Tape:
    """check_bits for the pass copies, and dead code after it."""
    return check_bits(lambda t: dead_code.run(copies.run(t)), function, *tensors, poison=-7)


@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16])
def test_gradients_of_a_split_projection_are_made_joined(dtype: Any) -> None:
    def run(captured: bool) -> list[Any]:
        vt.manual_seed(0)
        w = vt.randn(24, 8, requires_grad=True)

        def step(x: Any) -> Any:
            w.grad = None
            q, k, v = F.linear(x, w).to(dtype).split(8, dim=2)
            q, k, v = (z.view(2, 5, 2, 4).transpose(1, 2) for z in (q, k, v))
            loss = F.scaled_dot_product_attention(q, k, v, is_causal=True).float().square().sum()
            loss.backward()
            return loss

        function = capture(step) if captured else step
        made = [function(vt.randn(2, 5, 8)).detach().numpy().copy() for _ in range(5)]
        if captured:
            tape = function.variants[0].tape
            assert "cat" not in op_names(tape) and "_attention_backward" in op_names(tape)
            assert any("made joined" in d.text for d in tape.decisions)
        return [*made, w.grad.numpy().copy()]

    for mine, other in zip(run(True), run(False)):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16])
def test_gradients_of_slices_of_a_projection_are_made_joined(dtype: Any) -> None:
    """Query, key and value as slices of (B, T, 3, H, D): stacking their gradients and the copy into the
    projection's order both go away."""

    def run(captured: bool) -> list[Any]:
        vt.manual_seed(0)
        w = vt.randn(24, 8, requires_grad=True)

        def step(x: Any) -> Any:
            w.grad = None
            qkv = F.linear(x, w).to(dtype).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            loss = F.scaled_dot_product_attention(*qkv.unbind(0)).float().square().sum()
            loss.backward()
            return loss

        function = capture(step) if captured else step
        made = [function(vt.randn(2, 5, 8)).detach().numpy().copy() for _ in range(5)]
        if captured:
            tape = function.variants[0].tape
            names = op_names(tape)
            assert "cat" not in names and "clone" not in names, names
            (op,) = (op for op in tape.ops if op.name == "_attention_backward")
            assert len({v.buffer for v in op.writes()}) == 1
            assert {v.strides for v in op.writes()} == {(120, 4, 24, 1)}
            assert sorted(v.offset for v in op.writes()) == [0, 8, 16]
        return [*made, w.grad.numpy().copy()]

    for mine, other in zip(run(True), run(False)):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_pieces_of_pointwise_ops(dim: int) -> None:
    x, y = vt.randn(6, 6), vt.randn(6, 6)
    tape = _check(lambda x, y: [vt.cat([x * 2, y.t() + 1, x.exp()], dim)], x, y)
    assert sorted(op_names(tape)) == ["add", "exp", "mul"]
    tape = _check(lambda x, y: [vt.stack([x * 2, y + 1], dim) * 2], x, y)
    assert "cat" not in op_names(tape)


def test_many_at_once_and_one_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites that have nothing to do with one another share a scan; what joins a joined tensor waits
    for the next. Those that stay tell why once."""
    scans = []
    scan = copies._place_pieces
    monkeypatch.setattr(copies, "_place_pieces", lambda tape: scans.append(0) or scan(tape))

    def step(x: Any, y: Any) -> list[Any]:
        apart = [vt.cat([x * k, y + k]) for k in range(2, 7)]
        nested = vt.cat([vt.cat([x.exp(), y.exp()]), vt.cat([x.sin(), y.sin()])], 1)
        return [*apart, nested, vt.cat([x, y + 1])]

    tape = _check(step, vt.randn(3, 4), vt.randn(3, 4))
    assert op_names(tape).count("cat") == 2
    stays = [d for d in tape.decisions if not d.made and d.text.startswith("cat stays")]
    assert len(stays) == 2 and all("no result of one op" in d.text for d in stays)
    assert sum("made joined" in d.text for d in tape.decisions) == 7
    assert len(scans) <= 4  # not one for each


def test_pieces_that_stay() -> None:
    x, y = vt.randn(6, 6), vt.randn(6, 6)

    def read_elsewhere(x: Any, y: Any) -> list[Any]:
        a = x * 2
        return [vt.cat([a, y + 1]), a.sum()]

    cases: list[tuple[Callable[..., Any], str]] = [
        (read_elsewhere, "no result of one op"),
        (lambda x, y: [vt.cat([x, y + 1])], "no result of one op"),
        (lambda x, y: [vt.cat([(x * 2)[:, :3], y[:, :3] + 1])], "another layout"),
        (lambda x, y: [vt.cat([(x[0] * 2).expand(3, 6), y + 1])], "another layout"),
        (lambda x, y: [vt.cat([x @ y, y + 1], 1)], "does not write with strides"),
        (lambda x, y: [vt.cat([x.double() * 2, y + 1])], "another layout"),
        (lambda x, y: [(lambda a: vt.cat([a, a]))(x * 2)], "no result of one op"),
        (lambda x, y: [vt.cat([(lambda a: a[1:])(x * 2), y + 1])], "another layout"),
    ]
    for function, why in cases:
        tape = _check(function, x, y)
        assert "cat" in op_names(tape)
        assert any(not d.made and why in d.text for d in tape.decisions), (why, tape.decisions)
    # Products next to each other in memory need no strides.
    assert "cat" not in op_names(_check(lambda x, y: [vt.cat([x @ y, y + 1])], x, y))


def test_results_are_written_where_they_are_copied() -> None:
    x, w, total = vt.randn(6, 4), vt.randn(4, 5), vt.zeros(8, 5)

    def product(x: Any, w: Any, total: Any) -> list[Any]:
        total[1:7].copy_(x @ w)
        return [(x.sum(0) * 2).clone()]

    tape = _check(product, x, w, total)
    assert op_names(tape) == ["mm", "sum.dim", "mul"]

    def target_is_read(x: Any, w: Any, total: Any) -> list[Any]:
        made = x @ w
        before = total.sum()
        total[1:7].copy_(made)
        return [before]

    assert "copy_" in op_names(_check(target_is_read, x, w, total))

    def maker_reads_target(x: Any, w: Any, total: Any) -> list[Any]:
        total[:6].copy_(total[1:7] * 2)
        return [total * 1]

    assert "copy_" in op_names(_check(maker_reads_target, x, w, total))


def test_readers_of_a_copy_read_the_source() -> None:
    x, y = vt.randn(6, 6), vt.randn(6, 6)
    assert op_names(_check(lambda x, y: [x.clone() @ y], x, y)) == ["mm"]

    def source_changes(x: Any, y: Any) -> list[Any]:
        old = x.clone()
        x.add_(1)
        return [old @ y]

    assert "clone" in op_names(_check(source_changes, x, y))

    def copy_changes(x: Any, y: Any) -> list[Any]:
        new = x.clone()
        new.add_(1)
        return [new @ y, x * 1]

    assert "clone" in op_names(_check(copy_changes, x, y))

    def source_is_done(x: Any, y: Any) -> list[Any]:
        a = x @ y
        total = a.sum()
        b = a.clone()
        b.add_(1)
        return [b @ y + total]

    assert "clone" not in op_names(_check(source_is_done, x, y))
    assert "clone" in op_names(_check(lambda x, y: [x.t().contiguous() @ y], x, y))


def test_filled_and_overwritten() -> None:
    x = vt.randn(6, 6)

    def whole(x: Any) -> list[Any]:
        made = vt.zeros(6, 6)
        made.copy_(x.t())
        return [made @ x]

    assert "fill_" not in op_names(_check(whole, x))

    def part(x: Any) -> list[Any]:
        made = vt.zeros(6, 6)
        made[1:].copy_(x[1:])
        return [made @ x]

    assert "fill_" in op_names(_check(part, x))

    def read_between(x: Any) -> list[Any]:
        made = vt.ones(6, 6)
        total = x @ made
        made.copy_(x.t())
        return [made @ x + total]

    assert "fill_" in op_names(_check(read_between, x))
