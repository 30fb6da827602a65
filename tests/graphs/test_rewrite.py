"""New ops for a tape, and who uses its buffers."""

from __future__ import annotations

import pytest

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import record
from vibetensor.graphs.lower import lower
from vibetensor.graphs.rewrite import Uses, make_op, rebound, with_buffers


def test_make_op_runs_in_a_program() -> None:
    x = vt.randn(3, 4)
    recording = record(lambda: (x * 2.0, vt.empty(3, 4)))
    tape = recording.tape
    (mul,) = (op for op in tape.ops if op.name == "mul")
    out = mul.outputs[0]
    made = make_op("sub", (mul.args[0], mul.args[0]), [out], mul, alpha=1)
    assert (made.name, made.phase, made.source) == ("sub", "forward", mul.source)
    assert made.inputs == [mul.args[0], mul.args[0]]
    lowered = lower(tape.replaced([made]), recording, {out.buffer: recording.result[0]})
    recording.result[0].fill_(7.0)
    lowered.program.run()
    assert (recording.result[0] == 0).all()


def test_make_op_checks_what_the_op_makes() -> None:
    x = vt.randn(3, 4)
    tape = record(lambda: x.exp()).tape
    (op,) = tape.ops
    out = op.outputs[0]
    with pytest.raises(ValueError, match="sum"):
        make_op("sum", (op.args[0],), [out], op)
    with pytest.raises(ValueError, match="no tensor here"):
        make_op("add", (op.args[0], 2.0), [out], op)


def test_make_op_draws_no_numbers() -> None:
    x = vt.randn(64)
    recording = record(lambda: vt.nn.functional.dropout(x, 0.5))
    (op,) = (op for op in recording.tape.ops if op.is_random)
    before = vt.get_rng_state()
    made = make_op(op.name, op.args[:3], list(op.writes()), op, random_offset=op.random_offset)
    assert (vt.get_rng_state() == before).all()
    assert made.random_offset == op.random_offset == made.call.random_offset


def test_dry_recording_runs_nothing() -> None:
    weight = vt.randn(4, 4, requires_grad=True)
    kept = weight.detach().clone()
    state = vt.get_rng_state()
    native = _C.graphs.Tape("", True)
    native.start()
    try:
        loss = vt.nn.functional.dropout(weight @ weight, 0.5).sum()
        loss.backward()
        with vt.no_grad():
            weight.sub_(weight.grad)
    finally:
        native.stop()
    assert (weight == kept).all()
    assert (vt.get_rng_state() == state).all()
    names = [call.name for call in native.calls()]
    assert "mm" in "".join(names) and names[-1] == "sub_"


def test_uses() -> None:
    x = vt.randn(8)

    def function() -> vt.Tensor:
        a = x + 1
        b = a * 2
        a.add_(b)
        return a.exp()

    tape = record(function).tape
    a, b = (tape.ops[i].outputs[0].buffer for i in (0, 1))
    uses = Uses(tape)
    assert uses.writes(a) == [0, 2]
    assert uses.reads(a) == [1, 2, 3]
    assert uses.only_reader(a) is None
    assert uses.only_reader(b) == 2
    assert uses.written_between(a, 1, 3) and not uses.written_between(a, 2, 3)


def test_views_and_buffers_of_an_op_are_replaced() -> None:
    x = vt.randn(8)
    tape = record(lambda: vt.cat([x, x + 1])).tape
    add, cat = (op for op in tape.ops if not op.is_view)
    (made,) = add.writes()
    other = tape.new_buffer(32, "cpu")
    moved = with_buffers(cat, {made.buffer: other})
    assert [view.buffer for view in moved.args[0]] == [add.args[0].buffer, other]
    assert moved.inputs == list(moved.args[0]) and moved.outputs == cat.outputs
    assert cat.args[0][1].buffer is made.buffer  # the op itself is as it was
    assert with_buffers(add, {other: made.buffer}) is add
    turned = rebound(add, lambda view: cat.args[0][0] if view is made else view)
    assert turned.outputs == [cat.args[0][0]] and turned.args == add.args


def test_a_number_stays_a_number() -> None:
    x = vt.tensor(1.5)
    (op,) = record(lambda: x * 2.5).tape.ops
    assert [view.number for view in op.args] == [False, True]
    made = make_op("mul", op.args, list(op.writes()), op)  # float32, not float64
    assert made.outputs[0].dtype == vt.float32
