"""The report as text: ops and passes, memory, and why a function was captured again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.graphs import CapturedStep, CaptureError, capture
from vibetensor.graphs.course import first_change
from vibetensor.graphs.record import record
from vibetensor.graphs.tape import Decision

HERE = Path(__file__).name


def line_of(mark: str) -> int:
    """The number of the line of this file that ends with a mark."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(at for at, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))


def again(step: CapturedStep) -> list[list[str]]:
    """Of each capture, the lines of the report that tell why it was made."""
    parts = re.split(r"\n\n(?=capture \d)", step.report())[1:]
    return [
        [line.strip() for line in part.splitlines() if "captured" in line.split(":")[0]]
        for part in parts
    ]


def test_report_of_one_capture() -> None:
    x = vt.ones(64, 64)

    def step(x: Any) -> Any:
        (x * 3).exp()  # nobody reads it
        y = (x @ x) + (x @ x)  # twice
        return y.relu().sum()

    step = capture(step)
    assert step.report().endswith("step: not captured yet")
    for _ in range(3):
        step(x)
    report = step.report()
    first = report.splitlines()[0]
    assert first.endswith("step: 4 ops of 7 recorded, 2 replays")
    assert "  repeated: 7 → 6 ops" in report and "  dead_code: 6 → 4 ops" in report
    assert "  forward: 4 ops: " in report and "1 matmul" in report.replace("1 mm", "1 matmul")
    assert "results: bit for bit" in report
    (plan,) = step.variants[0].lowered.plans.values()
    assert f"arena on cpu: {plan.nbytes:,} bytes, lower bound {plan.lower_bound:,} " in report
    peak = step.tape().ops[plan.peak_op]
    told = (
        f"most is live at op {plan.peak_op} {peak.name} (forward, {peak.source}): 100% from {HERE}:"
    )
    assert f"{told}{line_of('twice')}" in report
    assert f"{plan.peak_op:4} {peak}" in str(step.tape())  # the same number
    assert f"outside it: state {x.nbytes:,} bytes, results and gradients 4" in report
    step.reset()
    with pytest.raises(CaptureError, match="not been captured"):
        step.report_html("/nowhere/at/all.html")


def test_report_without_passes() -> None:
    step = capture(lambda x: x * 2 + x * 2, optimize=False)
    step(vt.ones(3))
    report = step.report()
    assert "3 ops of 3 recorded, 0 replays" in report
    assert "repeated" not in report and "dead_code" not in report


def test_report_of_a_step_without_ops() -> None:
    step = capture(lambda x: None)
    for _ in range(2):
        step(vt.ones(3))
    assert step.report().splitlines()[0].endswith("0 ops of 0 recorded, 1 replay")
    assert str(step.profile()).endswith("by phase:\nby op:\nby line:")


def test_decisions_are_told_by_pass() -> None:
    step = capture(lambda x: (x + 1).exp() * 2)
    step(vt.ones(3))
    tape = step.tape()
    op = tape.ops[1]
    tape.decisions += [
        *[Decision("dead_code", True, "joined two", op)] * 3,
        Decision("dead_code", False, "the bias is read later", tape.ops[0]),
        Decision("other", True, "did more", op),
        *[Decision("repeated", True, f"text {n}", op) for n in range(9)],
    ]
    tape.bound = 0.001
    report = step.report()
    assert f"    3x joined two; first exp (forward, {op.source})" in report
    assert f"    not: the bias is read later; add (forward, {op.source})" in report
    assert "  other:\n    did more; exp" in report
    assert "    text 5;" in report and "text 6" not in report and "    and 3 more" in report
    idle = [line for line in report.splitlines() if "nothing to do" in line]
    assert not any(name in line for line in idle for name in ("dead_code", "repeated", "other"))
    assert "results: within 1.0e-03 of" in report


# --- why it was captured again


def test_other_shapes_are_told_with_the_first_op() -> None:
    weight = vt.ones(4, 3)

    @capture
    def step(x: Any, scale: float) -> Any:
        return (x @ weight) * scale  # product

    for rows in (32, 16):
        for _ in range(2):
            step(vt.ones(rows, 4), 0.5)
    step(vt.ones(16, 4, dtype=vt.float64).float(), 0.25)
    place = f"{HERE}:{line_of('product')}"
    assert step.report().startswith(f"{step._name}: captured 3 times, 2 replays")
    assert again(step) == [
        [],
        [
            "captured again: argument 0 was float32[32, 4], is float32[16, 4]",
            f"recaptured: op 0 mm 32→16, {place} (beside capture 1)",
        ],
        [
            "captured again: argument 1 was 0.5, is 0.25",
            f"recaptured: op 1 mul 0.5→0.25, {place} (beside capture 2)",
        ],
    ]


def test_the_likest_capture_is_compared() -> None:
    step = capture(lambda x, y: x.sum() + y.sum())
    for n, m in ((2, 2), (3, 3), (2, 5)):
        step(vt.ones(n), vt.ones(m))
    assert again(step)[2][0] == "captured again: argument 1 was float32[2], is float32[5]"
    assert again(step)[2][-1].endswith("(beside capture 1)")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (vt.ones(2), vt.ones(2, dtype=vt.float64), "argument 0 was float32[2], is float64[2]"),
        (vt.ones(2), np.ones(2, np.float32), "argument 0 was float32[2], is array float32[2]"),
        (
            vt.ones(2, 3),
            vt.ones(3, 2).t(),
            "argument 0 was float32[2, 3], is float32[2, 3] of strides [1, 2]",
        ),
        ([vt.ones(2)], [vt.ones(4)], "argument 0[0] was float32[2], is float32[4]"),
        ({"a": vt.ones(2)}, {"b": vt.ones(2)}, "argument 0['a'] was float32[2], and is not there"),
        (
            vt.ones(2),
            vt.ones(2, requires_grad=True),
            "argument 0 was float32[2], is float32[2], requires grad",
        ),
        (None, 0.5, "argument 0 was None, is 0.5"),
    ],
    ids=["dtype", "array", "strides", "list", "dict", "requires grad", "constant"],
)
def test_what_differs_in_an_argument(first: Any, second: Any, says: str) -> None:
    def total(value: Any) -> Any:
        if isinstance(value, dict | list):
            return total(next(iter(value.values() if isinstance(value, dict) else value)))
        if isinstance(value, np.ndarray):
            value = vt.from_numpy(value)
        return vt.ones(2) if value is None else vt.ones(1, dtype=vt.float64) + value

    step = capture(lambda value: total(value).sum())
    for value in (first, second):
        for _ in range(3):
            step(value)
    assert f"captured again: {says}" in [line for part in again(step) for line in part]


def test_another_tensor_that_is_used_as_it_is() -> None:
    step = capture(lambda w: (w * 2).sum())
    one, two = (vt.ones(3, requires_grad=True) for _ in range(2))
    for w in (one, one, two, two):
        step(w)
    assert again(step)[1][0] == "captured again: argument 0 is another one"
    assert again(step)[1][1].startswith("recaptured: the same ops")


def test_one_tensor_given_twice() -> None:
    step = capture(lambda a, b: a + b)
    x, y = vt.ones(3), vt.ones(3)
    step(x, y)
    step(x, x)
    assert again(step)[1][0] == (
        "captured again: argument 1 was float32[3], is float32[3], the memory of argument 0"
    )


def test_modes_and_options_that_changed() -> None:
    layer = vt.nn.Sequential(vt.nn.Linear(3, 3), vt.nn.Dropout(0.5))
    optimizer = vt.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    @capture
    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = layer(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    x = vt.ones(2, 3)
    for _ in range(4):
        step(x)
    layer[1].eval()
    for _ in range(2):
        step(x)
    optimizer.param_groups[0]["momentum"] = 0.5  # which replays read
    step(x)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    for _ in range(2):
        step(x)
    with vt.autocast("cpu", dtype=vt.bfloat16):
        for _ in range(2):
            step(x)
    told = again(step)
    assert told[1][0] == (
        "captured again: training was on in all 3 modules, is off in Dropout 2 of 3 modules"
    )
    assert "op" in told[1][1] and "has become" in told[1][1]
    assert told[2][0] == "captured again: weight_decay of SGD 0, group 0, was 0, is 0.5"
    assert told[3][0] == "captured again: autocast on cpu was off, is to bfloat16"


def test_gradients_that_were_there() -> None:
    w = vt.ones(3, requires_grad=True)

    @capture
    def step(x: Any) -> None:
        (w * x).sum().backward()

    for _ in range(3):
        w.grad = None
        step(vt.ones(3))
    step(vt.ones(3))
    (_, told) = again(step)
    assert told[0] == "captured again: gradients at the start was 0 of 1, is 1 of 1"
    assert "add_" in told[1]


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (lambda x: x.exp(), lambda x: x.tanh(), "op 0 exp has become tanh"),
        (lambda x: x.exp(), lambda x: x.exp().tanh(), "op 1 tanh has come"),
        (lambda x: x.exp().tanh(), lambda x: x.exp(), "op 1 tanh has gone"),
        (lambda x: x.exp(), lambda x: x.double().exp(), "has become"),
        (lambda x: x[:2].exp(), lambda x: x[:3].exp(), "2→3"),
        (lambda x: x.sum(0), lambda x: x.sum(-1), "argument 1 [0]→[-1]"),
        (lambda x: x * 2, lambda x: x * 3, "op 0 mul 2→3"),
        (lambda x: x.exp(), lambda x: x.exp(), None),
    ],
)
def test_first_change_of_two_tapes(before: Any, after: Any, says: str | None) -> None:
    x = vt.ones(4)
    change = first_change(record(lambda: before(x)), record(lambda: after(x)))
    if says is None:
        assert change is None
    else:
        assert change is not None and says in change and HERE in change
