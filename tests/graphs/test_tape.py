"""What a recording shows: ops, phases, lines, roles of buffers; and what passes make of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import capture, passes, record


def test_ops_have_phase_and_line() -> None:
    layer = vt.nn.Linear(3, 2)
    optimizer = vt.optim.SGD(layer.parameters(), lr=0.1)
    x = vt.ones(4, 3)

    def step() -> None:
        loss = layer(x).sum()  # forward
        loss.backward()
        optimizer.step()

    recording = record(step)
    phases = [op.phase for op in recording.tape.ops]
    assert phases == sorted(phases, key=["forward", "backward", "optimizer"].index)
    assert set(phases) == {"forward", "backward", "optimizer"}
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    forward = next(op for op in recording.tape.ops if op.name == "linear")
    assert forward.source is not None and forward.source.file == __file__
    assert lines[forward.source.line - 1].endswith("# forward")
    assert forward.source.function == "step"
    text = str(recording.tape)
    assert "# backward" in text and f"# test_tape.py:{forward.source.line}" in text


def test_roles_of_buffers() -> None:
    x, total = vt.ones(8), vt.zeros(8)

    def step() -> vt.Tensor:
        half = x * 0.5
        total.add_(half)
        return half.exp() + 1

    recording = record(step)
    role = {op.name: op.outputs[0].buffer.role for op in recording.tape.ops if op.outputs[0]}
    assert sorted(role.values()) == ["output", "scratch", "scratch", "state"]
    assert role["add_"] == "state" and role["exp"] == "scratch"
    assert recording.buffer_of(recording.result).role == "output"
    assert recording.buffer_of(x).role == "state"
    assert recording.buffer_of(vt.ones(1)) is None


def test_recording_holds_no_more_than_running() -> None:
    """Intermediates give their bytes back while the recording goes on."""
    x = vt.ones(1 << 20)

    def step() -> vt.Tensor:
        y = x
        for _ in range(50):
            y = y * 1.5
        return y

    _C._cpu_reset_peak_memory()
    before = _C._cpu_memory_stats()["allocated_bytes"]
    recording = record(step)
    peak = _C._cpu_memory_stats()["peak_bytes"] - before
    assert len(recording.tape) == 50
    assert peak <= 3.1 * x.nbytes


def test_json_and_diff() -> None:
    x = vt.ones(4)
    one = record(lambda: (x + 1).exp()).tape
    two = record(lambda: (x + 1).tanh()).tape
    data = json.loads(one.to_json())
    assert [op["name"] for op in data["ops"]] == [op.name for op in one.ops]
    assert data["ops"][-1]["outputs"][0]["sizes"] == [4]
    assert {b["role"] for b in data["buffers"]} == {"state", "scratch", "output"}
    changed = [
        line for line in one.diff(two) if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert len(changed) == 2 and "exp" in changed[0] and "tanh" in changed[1]
    assert one.diff(one) == []


def _names(function: object, *, optimized: bool = True) -> list[str]:
    tape = record(function).tape  # type: ignore[arg-type]
    return [op.name for op in (passes.run(tape) if optimized else tape).ops if not op.is_view]


def test_dead_ops_go() -> None:
    x = vt.ones(4)

    def step() -> vt.Tensor:
        (x * 2).exp()
        return x + 1

    assert len(_names(step, optimized=False)) == 3
    assert len(_names(step)) == 1


def test_repeated_ops_run_once() -> None:
    x = vt.arange(6.0).reshape(2, 3)

    def step() -> vt.Tensor:
        return (x.t() @ x).exp() + (x.t() @ x).exp()

    assert _names(step).count("exp") == 1
    function = capture(step)
    expected = step().numpy()
    for _ in range(3):
        np.testing.assert_array_equal(function().numpy(), expected)


def test_what_changes_in_between_is_computed_again() -> None:
    x = vt.ones(4)

    def step() -> vt.Tensor:
        first = x * 2
        x.add_(1)
        second = x * 2
        return first + second

    assert _names(step) == _names(step, optimized=False)


def test_equal_constants_of_other_types_are_kept_apart() -> None:
    x = vt.zeros(2)
    assert len(_names(lambda: (x * 0.0, x * -0.0))) == 2
    assert len(_names(lambda: (x + 1).exp() * (x + 1.0))) == 4


def test_random_ops_are_never_joined() -> None:
    x = vt.ones(64)
    assert _names(lambda: vt.rand_like(x) + vt.rand_like(x)).count("rand_like") in (0, 2)
    function = capture(lambda: vt.rand(64) - vt.rand(64))
    assert all(function().abs().sum().item() > 0 for _ in range(4))


def test_the_pass_of_the_guide() -> None:
    text = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")
    source = text.split("```python\n", 1)[1].split("```", 1)[0]
    space: dict[str, object] = {}
    exec(source, space)
    x, y = vt.ones(4), vt.ones(4)

    def step() -> None:
        x.copy_(x)
        x.copy_(y)

    tape = record(step).tape
    kept = space["run"](tape)  # type: ignore[operator]
    assert [op.name for op in tape.ops] == ["copy_", "copy_"]
    assert [op.args[1] for op in kept.ops] == [tape.ops[1].args[1]]
