"""Functions from outside as ops of a captured step: declared reads and writes, on the CPU at each replay, on a
device once as the step is lowered."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.device import DEVICE
from vibetensor.graphs import CaptureMismatch, Graph, capture, foreign, foreign_op, graph

ON_CPU = DEVICE == "cpu"
on_the_cpu = pytest.mark.skipif(not ON_CPU, reason="host functions run on tensors of the CPU")
on_a_device = pytest.mark.skipif(ON_CPU, reason="needs --device: a GPU or simulated")


class Scale:
    """out = x * factor, by ops that no recording sees."""

    def __init__(self) -> None:
        self.calls = 0
        self.strides: list[Any] = []

    def __call__(self, x: Any, out: Any, factor: float = 2.0) -> str:
        self.calls += 1
        self.strides.append((x.stride(), out.stride()))
        out.copy_(x * factor)
        return "not returned"


def draw(*shape: int, seed: int = 0) -> Any:
    return vt.tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def test_eagerly_it_just_calls() -> None:
    x, out, scale = draw(3, 4), vt.zeros(3, 4), Scale()
    version, given = out._version, x._version
    assert foreign(scale, x, out, 3.0, writes=[out]) is None
    np.testing.assert_array_equal(out.numpy(), x.numpy() * np.float32(3))
    assert out._version > version and x._version == given and scale.calls == 1
    foreign(lambda d, *, y: d["x"].add_(y[0]), {"x": out}, y=[x], writes=out, reads=x)
    np.testing.assert_array_equal(out.numpy(), x.numpy() * np.float32(3) + x.numpy())


def test_declarations_that_do_not_fit_are_refused() -> None:
    x, out, other = draw(2), vt.zeros(2), vt.zeros(2)
    scale = Scale()
    with pytest.raises(
        ValueError, match=r"foreign\(Scale\): a tensor of \(2,\) .* in writes is no arg"
    ):
        foreign(scale, x, out, writes=[other])
    with pytest.raises(ValueError, match="neither in reads nor in writes"):
        foreign(scale, x, out, writes=[out], reads=[])
    with pytest.raises(ValueError, match="writes is empty"):
        foreign(scale, x, out, writes=[])
    with pytest.raises(TypeError, match="writes has tensors, not int"):
        foreign(scale, x, out, writes=[1])
    with pytest.raises(TypeError, match="is not callable"):
        foreign(1, x, out, writes=[out])  # type: ignore[arg-type]
    wide = out[:1].expand(4)
    with pytest.raises(ValueError, match=r"expanded tensor of \(4,\)"):
        foreign(scale, x, wide, writes=[wide])
    with pytest.raises(ValueError, match="refers to a tensor"):
        foreign(lambda out: out.copy_(other), out, writes=[out])
    with pytest.raises(ValueError, match="has no parameter 'result'"):
        foreign_op(writes="result")(scale)
    assert scale.calls == 0


def test_gradients_need_a_function() -> None:
    x, out = draw(2).requires_grad_(), vt.zeros(2)
    with pytest.raises(
        RuntimeError, match=r"foreign\(Scale\): .* requires grad.*autograd\.Function"
    ):
        foreign(Scale(), x, out, writes=[out])
    with vt.no_grad():
        foreign(Scale(), x, out, writes=[out])
        foreign(lambda x, out: out.numpy(), x, out, writes=[out])  # gets tensors without history
    saved = out * 1
    y = (saved * draw(2, seed=1).requires_grad_()).sum()
    foreign(Scale(), x.detach(), saved, writes=[saved])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("optimize", [False, True])
def test_a_captured_step_has_the_numbers_of_eager(optimize: bool) -> None:
    scale = Scale()

    def step(x: Any, state: Any) -> Any:
        hidden = (x * 0.5 + 1).tanh()
        columns = hidden.t()  # not contiguous
        out = vt.empty_like(columns)
        foreign(scale, columns, out, 1.5, writes=[out])
        part = out[1:]
        foreign(scale, out[:-1].clone(), part, 0.25, writes=[part])  # a part of a buffer
        foreign(lambda t, s: t.add_(s.sum()), out, hidden, writes=[out])  # in place
        state.mul_(0.5).add_(out.mean())
        return out * 2, out.sum()

    states = [vt.ones(4), vt.ones(4)]
    inputs = [draw(5, 4, seed=seed) for seed in range(6)]
    expected = [[t.numpy().copy() for t in step(x, states[0])] for x in inputs]
    eager_strides, eager_calls = scale.strides[:2], scale.calls
    scale.calls, scale.strides = 0, []
    captured = capture(lambda x: step(x, states[1]), optimize=optimize)
    kept = [captured(x) for x in inputs]
    for mine, other in zip(kept, expected):
        for a, b in zip(mine, other):
            np.testing.assert_array_equal(a.numpy(), b)
    np.testing.assert_array_equal(states[1].numpy(), states[0].numpy())
    (variant,) = captured.variants
    assert sum(op.name == "_foreign" for op in variant.tape) == 3
    assert scale.calls == (eager_calls if ON_CPU else 2)
    assert set(scale.strides) == set(eager_strides)


class Doubled(vt.autograd.Function):
    """x * 2 and its derivative, both from outside."""

    scale = Scale()

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        out = vt.empty_like(x)
        foreign(Doubled.scale, x, out, writes=[out])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        out = vt.empty_like(grad)
        foreign(Doubled.scale, grad, out, writes=[out])
        return out


def _trained(wrap: Any, **options: Any) -> tuple[list[float], Any]:
    vt.manual_seed(3)
    model = vt.nn.Sequential(vt.nn.Linear(4, 8), vt.nn.Tanh(), vt.nn.Linear(8, 1))
    optimizer = vt.optim.AdamW(model.parameters(), lr=1e-2)

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = (Doubled.apply(model(x)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    step = wrap(step, **options) if wrap else step
    return [step(draw(6, 4, seed=seed)).item() for seed in range(8)], step


@pytest.mark.parametrize("verify", [False, True])
def test_training_through_a_function(verify: bool) -> None:
    expected, _ = _trained(None)
    found, step = _trained(capture, verify=verify)
    assert found == expected
    phases = [op.phase for op in step.tape() if op.name == "_foreign"]
    assert phases == ["forward", "backward"]
    assert step.variants[0].replays >= 5


def test_compiled_models_have_them() -> None:
    weights = [draw(3, 3).requires_grad_() for _ in range(2)]

    def loss_of(x: Any, w: Any) -> Any:
        return Doubled.apply(x @ w).tanh().sum()

    compiled = vt.compile(loss_of)
    for seed in range(4):
        x = draw(2, 3, seed=seed)
        for function, w in zip((loss_of, compiled), weights):
            w.grad = None
            function(x, w).backward()
        np.testing.assert_array_equal(weights[0].grad.numpy(), weights[1].grad.numpy())


def test_graphs_in_torch_s_manner_do_not_call_before_a_replay() -> None:
    x, out, scale = draw(3), vt.zeros(3), Scale()
    g = Graph()
    with graph(g):
        y = x + 1
        foreign(scale, y, out, writes=[out])
    assert scale.calls == (0 if ON_CPU else 1)
    for seed in range(3):
        x.copy_(draw(3, seed=seed))
        g.replay()
        np.testing.assert_array_equal(out.numpy(), (x.numpy() + np.float32(1)) * np.float32(2))
    assert scale.calls == (3 if ON_CPU else 1)


def test_a_region_of_autocast_is_none_of_the_function_s() -> None:
    device = vt.ones(1).device.type
    if device != "cpu":
        pytest.skip("autocast of the CPU")
    dtypes: list[Any] = []

    def product(x: Any, out: Any) -> None:
        found = x @ x
        dtypes.append(found.dtype)
        out.copy_(found)

    @capture
    def step(x: Any) -> Any:
        out = vt.empty(2, 2)
        with vt.autocast("cpu"):
            foreign(product, x, out, writes=[out])
        return out

    x = draw(2, 2)
    results = [step(x).tolist() for _ in range(3)]
    assert set(dtypes) == {vt.float32} and results[0] == results[1] == results[2]


def test_tensors_bound_to_the_function_are_refused() -> None:
    out = vt.empty(2)
    with pytest.raises(ValueError, match="refers to a tensor"):
        foreign(partial(Scale(), vt.ones(2)), out, writes=[out])


def test_unread_writes_are_left_out_and_orders_are_kept() -> None:
    unread, first, second = Scale(), Scale(), Scale()

    def step(x: Any) -> Any:
        out = vt.empty_like(x)
        waste = vt.empty_like(x)
        foreign(unread, x, waste, writes=[waste])
        foreign(first, x, out, 2.0, writes=[out])
        before = out + 0  # reads between two writes
        foreign(second, x, out, 3.0, writes=[out])
        return before - out

    captured = capture(step)
    for seed in range(4):
        x = draw(4, seed=seed)
        np.testing.assert_array_equal(captured(x).numpy(), step(x).numpy())
    names = [str(op) for op in captured.tape() if op.name == "_foreign"]
    assert len(names) == 2 and unread.calls == 4 + (1 if ON_CPU else 0)
    assert "_foreign goes: nobody reads its results" in captured.report()


def test_a_failure_while_recording_leaves_nothing_behind() -> None:
    fails = True

    def kernel(x: Any, out: Any) -> None:
        if fails:
            raise KeyError("no such kernel")
        out.copy_(x)

    state = vt.zeros(2)

    def step(x: Any) -> Any:
        out = vt.empty_like(x)
        state.add_(1)
        foreign(kernel, x, out, writes=[out])
        return out + state

    captured = capture(step)
    with pytest.raises((KeyError, RuntimeError), match="no such kernel"):
        captured(draw(2))
    assert not captured.variants
    assert vt.zeros(1).add_(1).item() == 1
    fails = False
    state.zero_()
    for count in range(1, 5):
        np.testing.assert_array_equal(
            captured(draw(2)).numpy(), draw(2).numpy() + np.float32(count)
        )
    assert captured.variants[0].replays >= 2


def test_a_function_that_catches_the_failure_is_refused() -> None:
    def broken(out: Any) -> None:
        raise KeyError("broken")

    @capture
    def step(x: Any) -> Any:
        out = vt.zeros(2)
        with contextlib.suppress(KeyError):
            foreign(broken, out, writes=[out])
        return out + x

    with pytest.raises((RuntimeError, KeyError), match="broken"):
        step(vt.ones(2))


@on_the_cpu
def test_a_failure_in_a_replay_is_the_function_s_own() -> None:
    fails = False

    def kernel(x: Any, out: Any) -> None:
        if fails:
            raise KeyError("in the replay")
        out.numpy()[...] = x.numpy() * 2  # any means of the host

    def step(x: Any) -> Any:
        out = vt.empty_like(x)
        foreign(kernel, x + 1, out, writes=[out])
        return out

    captured = capture(step)
    for _ in range(3):
        captured(draw(2))
    fails = True
    with pytest.raises(KeyError, match="in the replay"):
        captured(draw(2))
    fails = False
    np.testing.assert_array_equal(captured(draw(2)).numpy(), (draw(2).numpy() + np.float32(1)) * 2)


@on_a_device
def test_waiting_for_the_device_is_refused_by_name() -> None:
    waits = True

    def kernel(x: Any, out: Any) -> None:
        out.copy_(x)
        if waits:
            x.sum().item()

    def step(x: Any) -> Any:
        out = vt.empty_like(x)
        foreign(kernel, x * 1.5, out, writes=[out])
        return out

    captured = capture(step)
    with pytest.raises(
        RuntimeError, match=r"(?s)_foreign, cannot be part of a.*recorded as: .*kernel"
    ):
        captured(draw(2))
    assert not captured.variants
    waits = False
    for _ in range(3):
        np.testing.assert_array_equal(captured(draw(2)).numpy(), draw(2).numpy() * np.float32(1.5))


@on_a_device
def test_allocations_of_the_function_live_with_the_step() -> None:
    kept = []

    def kernel(x: Any, out: Any) -> None:
        workspace = x * 2
        kept.append(workspace + 1)
        out.copy_(kept[-1] + workspace)

    def step(x: Any) -> Any:
        out = vt.empty_like(x)
        foreign(kernel, x + 0, out, writes=[out])
        return out

    captured = capture(step)
    for seed in range(4):
        x = draw(3, seed=seed)
        np.testing.assert_allclose(captured(x).numpy(), x.numpy() * 4 + 1, rtol=1e-6)
    assert len(kept) == 1


def test_random_numbers_of_the_default_generator_are_refused() -> None:
    def kernel(out: Any) -> None:
        vt.rand(1, device="cpu")

    def step(x: Any) -> Any:
        out = vt.empty_like(x)
        foreign(kernel, out, writes=[out])
        return out + x

    with pytest.raises(RuntimeError, match=r"foreign\(.*kernel\) draws from a default generator"):
        capture(step)(draw(2))


@foreign_op(writes="out")
def scaled(x: Any, out: Any, factor: float = 2.0) -> None:
    """Doc."""
    out.copy_(x * factor)


@foreign_op(writes=("outs",), reads=("x",))
def split(x: Any, outs: list[Any], writes: int = 1) -> None:
    for index, out in enumerate(outs):
        out.copy_(x[index] * writes)


def test_decorated_functions() -> None:
    assert scaled.__doc__ == "Doc."

    def step(x: Any) -> Any:
        out, rows = vt.empty_like(x), [vt.empty(3), vt.empty(3)]
        scaled(x, factor=3.0, out=out)
        split(out, rows, writes=2)
        return rows[0] - rows[1]

    captured = capture(step)
    for seed in range(4):
        x = draw(2, 3, seed=seed)
        np.testing.assert_array_equal(captured(x).numpy(), step(x).numpy())
    with pytest.raises(TypeError, match="missing a required argument"):
        scaled(draw(2))


def test_it_is_shown_by_name() -> None:
    def step(x: Any) -> Any:
        out = vt.empty_like(x)
        foreign(Scale(), x, out, 0.5, writes=[out])
        return out

    captured = capture(step)
    captured(draw(2))
    captured(draw(2))
    assert "<Scale, 0.5>" in str(captured.tape())
    (found,) = (
        op for op in json.loads(captured.tape().to_json())["ops"] if op["name"] == "_foreign"
    )
    assert found["args"][2] == "<Scale, 0.5>" and found["class"] == "opaque"
    assert "_foreign" in captured.report() or "_foreign" in str(captured.profile())
    assert "_foreign" in captured.to_dot()


def test_constants_that_change_are_named_by_verify() -> None:
    count = [0]

    def step(x: Any) -> Any:
        count[0] += 1
        out = vt.empty_like(x)
        foreign(lambda x, out, n: out.copy_(x * n), x, out, count[0], writes=[out])
        return out

    captured = capture(step, verify=True)
    captured(draw(2))
    with pytest.raises(CaptureMismatch, match=r"argument 2 of _foreign was <.*1> and is <.*2>"):
        captured(draw(2))


def test_functions_made_anew_are_the_same() -> None:
    def step(x: Any) -> Any:
        out = vt.empty_like(x)
        foreign(lambda x, out: out.copy_(x), x, out, writes=[out])
        return out

    captured = capture(step, verify=True)
    for _ in range(3):
        captured(draw(2))
    assert captured.variants[0].verified


def test_captures_with_functions_that_refer_back_are_collected() -> None:
    class Owner:
        def kernel(self, x: Any, out: Any) -> None:
            out.copy_(x)

        @capture
        def step(self, x: Any) -> Any:
            out = vt.empty_like(x)
            foreign(self.kernel, x + 1, out, writes=[out])
            return out

    owner = Owner()
    for _ in range(3):
        owner.step(draw(2))
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


@on_the_cpu
def test_the_guide_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs" / "capture.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    space: dict[str, Any] = {}
    exec(next(block for block in blocks if "foreign_op" in block), space)
    x, out = draw(8), vt.empty(8)
    np.testing.assert_array_equal(space["step"](x).numpy(), x.numpy() * np.float32(0.5) + 1)
    assert space["step"].variants[0].replays >= 3
    space["shift"](x, out)
    np.testing.assert_array_equal(out.numpy(), x.numpy() + np.float32(1))
