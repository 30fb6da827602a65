"""Casts of casts: which fold into one, and which round on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.graphs.default_device import kind
from vibetensor.graphs import record
from vibetensor.graphs.lower import lower
from vibetensor.graphs.passes import casts, copies, dead_code
from vibetensor.graphs.tape import Tape
from vibetensor.graphs.verify import same_bits

DTYPES = [
    vt.bool, vt.uint8, vt.int8, vt.int16, vt.int32, vt.int64,
    vt.float16, vt.bfloat16, vt.float32, vt.float64,
]  # fmt: skip


def _names(tape: Tape) -> list[str]:
    return [op.name for op in tape.ops if not op.is_view]


def _check(function: Callable[[Any], Any], x: Any) -> Tape:
    """The pass's tape, after its result has been found equal bit for bit."""
    with vt.no_grad():
        before = x.clone()
        recording = record(lambda: function(x))
        expected = recording.result.clone()
        x.copy_(before)
        tape = dead_code.run(copies.run(casts.run(recording.tape)))
        recording.result.zero_()
        lowered = lower(tape, recording, {recording.buffer_of(recording.result): recording.result})
        lowered.program.run()
        assert same_bits(recording.result, expected)
    return tape


@pytest.mark.parametrize("last", DTYPES)
@pytest.mark.parametrize("middle", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_every_pair_keeps_its_bits(first: Any, middle: Any, last: Any) -> None:
    values = [0.0, 1.0, -1.0, 0.3, 127.0, 128.0, -129.0, 255.0, 2049.0, 65519.0, 1e30, 2**31 + 1.0]
    if not all(dtype.is_floating_point for dtype in (first, middle, last)):
        values = [0.0, 1.0, 2.0, 100.0, 127.0]  # what every dtype holds
        if all(
            dtype in (vt.int32, vt.int64, vt.float32, vt.float64) for dtype in (first, middle, last)
        ):
            values += [-5.0, 2.0**24 + 1, 2.0**30 + 3]
    x = vt.tensor(values, dtype=vt.float64).to(first)
    _check(lambda x: x.to(middle).to(last) * 1, x)


def test_what_folds() -> None:
    x = vt.randn(50).to(vt.bfloat16)
    assert _names(_check(lambda x: x.float().to(vt.bfloat16) * 2, x)) == ["mul"]
    assert _names(_check(lambda x: x.float().double() * 2, x)) == ["_to_dtype", "mul"]
    tape = _check(lambda x: x.float().to(vt.float16) * 2, x)
    assert _names(tape) == ["_to_dtype", "mul"]
    assert any(d.made and "bfloat16 to float32 to float16" in d.text for d in tape.decisions)
    # Three in a row, and a first one that others read.
    assert _names(_check(lambda x: x.float().double().to(vt.bfloat16) * 2, x)) == ["mul"]
    wide = _check(lambda x: (lambda a: a.to(vt.bfloat16) * a)(x.float()), x)
    assert _names(wide) == ["_to_dtype", "mul"]


def test_what_stays() -> None:
    x = vt.randn(50)
    tape = _check(lambda x: x.to(vt.bfloat16).float() * 2, x)
    assert _names(tape).count("_to_dtype") == 2
    assert any(not d.made and "rounds" in d.text for d in tape.decisions)
    half = x.to(vt.bfloat16)

    def changed(h: Any) -> Any:
        wide = h.float()
        h.add_(1)
        return wide.to(vt.bfloat16) * 2

    assert _names(_check(changed, half)).count("_to_dtype") == 2
    assert (
        _names(_check(lambda h: h.float()[::2].to(vt.bfloat16) * 2, half)).count("_to_dtype") == 2
    )


def test_pieces_that_are_widened_as_they_are_joined() -> None:
    half, wide = vt.randn(3, 6, 5).to(vt.bfloat16), vt.randn(3, 1, 6)
    joined = "cat" if kind() != "cpu" else "_to_dtype"

    def step(h: Any) -> Any:
        return vt.cat([wide, h.transpose(1, 2).float()], 1)

    tape = _check(step, half)
    assert _names(tape)[0] == joined
    assert any("as they are joined" in d.text for d in tape.decisions) == (kind() != "cpu")
    # All pieces are narrow; others read the wide one; it changes before it is joined.
    assert "_to_dtype" in _names(_check(lambda h: vt.cat([h.float(), h.float() * 1], 1), half))
    assert "_to_dtype" in _names(
        _check(
            lambda h: (lambda a: vt.cat([wide, a], 1) * a.sum())(h.transpose(1, 2).float()), half
        )
    )

    def changed(h: Any) -> Any:
        a = h.transpose(1, 2).float()
        h.mul_(2)
        return vt.cat([wide, a], 1)

    assert "_to_dtype" in _names(_check(changed, half))


def test_holds_is_what_numpy_knows() -> None:
    names = {dtype: str(dtype).rsplit(".", 1)[-1] for dtype in DTYPES if dtype != vt.bfloat16}
    for narrow, a in names.items():
        for wide, b in names.items():
            # numpy is careful with int64 in float64 and not: it calls that safe.
            safe = np.can_cast(a, b, "safe") and not (a == "int64" and b == "float64")
            assert casts._holds(wide, narrow) == safe, (a, b)
