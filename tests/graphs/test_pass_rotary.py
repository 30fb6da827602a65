"""Rotary embeddings as one op: what is found, what is left alone, and that no bit changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.graphs import capture, record
from vibetensor.graphs.lower import lower
from vibetensor.graphs.passes import rotary
from vibetensor.graphs.pointwise import NAME
from vibetensor.graphs.tape import Tape
from vibetensor.graphs.verify import same_bits

DTYPES = [vt.float32, vt.float64, vt.bfloat16, vt.float16]


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the pass leaves them alone, though it would be right."""
    monkeypatch.setattr(rotary, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(rotary, "ON_THE_CPU", True)


def _values(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> vt.Tensor:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return vt.tensor(values).to(dtype)


def _tables(shape: tuple[int, ...], dtype: Any) -> tuple[vt.Tensor, vt.Tensor]:
    angles = np.random.default_rng(7).uniform(-3, 3, shape).astype(np.float32)
    return vt.tensor(np.cos(angles)).to(dtype), vt.tensor(np.sin(angles)).to(dtype)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x.chunk(2, dim=-1)
    return x * cos + vt.cat([-b, a], dim=-1) * sin


def rotate_other_way_round(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    return sin * vt.cat((-x[..., half:], x[..., :half]), -1) + cos * x


def _count(tape: Tape) -> int:
    return sum(op.name == NAME for op in tape.ops)


def _check_bits(function: Callable[..., Any], *tensors: vt.Tensor, found: int = 1) -> Tape:
    with vt.no_grad():
        recording = record(lambda: function(*tensors))
        expected = [t.clone() for t in recording.result]
        tape = rotary.run(recording.tape)
        assert _count(tape) == found, tape
        adopted = {recording.buffer_of(t): t for t in recording.result}
        for result in recording.result:
            result.zero_()
        lower(tape, recording, adopted).program.run()
        for mine, other in zip(recording.result, expected):
            assert same_bits(mine, other), (mine, other)
    return tape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [rotate, rotate_other_way_round])
@pytest.mark.parametrize(
    ("shape", "table"),
    [
        ((2, 3, 5, 64), (5, 64)),
        ((2, 3, 5, 64), (2, 1, 5, 64)),
        ((2, 3, 5, 64), (1, 1, 1, 64)),
        ((7, 6), (6,)),
        ((7, 6), (7, 6)),
        ((130, 4), (130, 4)),
    ],
)
def test_bits(form: Any, shape: Any, table: Any, dtype: Any) -> None:
    _check_bits(lambda x, c, s: [form(x, c, s)], _values(shape, dtype), *_tables(table, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 24, 10])
def test_heads_of_a_product(size: int, dtype: Any) -> None:
    """As in attention: the input is a view of (batch, time, heads, size), the tables part of longer
    ones."""
    flat = _values((2, 33, 4 * size), dtype)
    cos, sin = _tables((50, size), dtype)

    def function(flat: Any, cos: Any, sin: Any) -> list[Any]:
        x = flat.view(2, 33, 4, size).transpose(1, 2)
        return [rotate(x, cos[:33], sin[:33])]

    _check_bits(function, flat, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: Any) -> None:
    flat = _values((2, 33, 4 * 16), dtype).requires_grad_()
    weight = _values((2, 4, 33, 16), dtype, 1)
    cos, sin = _tables((33, 16), dtype)

    def step() -> Any:
        flat.grad = None
        y = rotate(flat.view(2, 33, 4, 16).transpose(1, 2), cos, sin)
        y.backward(weight)
        return y

    captured = capture(step)
    for _ in range(4):
        y = captured()
    grad = flat.grad.clone()
    tape = captured.variants[0].tape
    assert not any(op.name in ("cat", "neg", "add", "add_") for op in tape.ops), tape
    assert sum(made.by == "rotary" for made in tape.decisions if made.made) == 2
    assert same_bits(step(), y)
    assert same_bits(flat.grad, grad)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, c, s: x * c + vt.cat([x[..., 4:], x[..., :4]], -1) * s,  # nothing is negated
        lambda x, c, s: x * c + vt.cat([-x[..., :4], x[..., 4:]], -1) * s,  # halves in place
        lambda x, c, s: x * c + vt.cat([x[..., 4:], -x[..., :4]], -1) * s,  # the other turn
        lambda x, c, s: x * c - vt.cat([-x[..., 4:], x[..., :4]], -1) * s,
        lambda x, c, s: vt.add(x * c, vt.cat([-x[..., 4:], x[..., :4]], -1) * s, alpha=2),
        lambda x, c, s: x * c + vt.cat([-x[..., 2:], x[..., :2]], -1) * s,  # no halves
        lambda x, c, s: (x + 1) * c + vt.cat([-x[..., 4:], x[..., :4]], -1) * s,
        lambda x, c, s: x * c[:1, :1] + vt.cat([-x[..., 4:], x[..., :4]], -1) * s,
        lambda x, c, s: x * c.float() + vt.cat([-x[..., 4:], x[..., :4]], -1) * s.float(),
    ],
)
def test_near_misses(other: Any) -> None:
    x, (cos, sin) = _values((3, 5, 8), vt.bfloat16), _tables((5, 8), vt.bfloat16)
    _check_bits(lambda x, c, s: [other(x, c, s)], x, cos, sin, found=0)


def test_parts_that_others_read_stay() -> None:
    x, (cos, sin) = _values((5, 8), vt.float32), _tables((5, 8), vt.float32)

    def function(x: Any, cos: Any, sin: Any) -> list[Any]:
        turned = vt.cat([-x[..., 4:], x[..., :4]], -1) * sin
        return [x * cos + turned, turned]

    _check_bits(function, x, cos, sin, found=0)

    def changed(x: Any, cos: Any, sin: Any) -> list[Any]:
        straight = x * cos
        x.add_(0)
        return [straight + vt.cat([-x[..., 4:], x[..., :4]], -1) * sin]

    tape = _check_bits(changed, x, cos, sin, found=0)
    assert any("changes in between" in d.text for d in tape.decisions)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_op_may_write_where_it_reads(interleaved: bool) -> None:
    x, w = _values((6, 8), vt.float32), _values((8, 8), vt.float32, 1)
    cos, sin = _tables((6, 4), vt.float32)

    def step() -> Any:
        return vt.rotary_embedding(x @ w, cos, sin, interleaved) @ w

    with vt.no_grad():
        captured = capture(step)
        for _ in range(3):
            y = captured()
        assert same_bits(y, step())
