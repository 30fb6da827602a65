"""The replay without Python code: it is taken when nothing is out of the ordinary, leaves the rest
to the long way, and looks only at what changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from vibetensor import _C
from vibetensor.graphs import CapturedStep, capture


def short(step: CapturedStep) -> int:
    """Replays without Python code, of all variants."""
    return sum(variant.native.count for variant in step.variants)


def long(step: CapturedStep) -> int:
    return sum(variant.slow_replays for variant in step.variants)


class Net(vt.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = vt.nn.Linear(4, 4)
        self.drop = vt.nn.Dropout(0.5)
        self.scale = 2.0
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.drop(self.fc(x)) * self.scale


def training(make: Callable[[Any], Any] = lambda p: vt.optim.AdamW(p, lr=1e-2)) -> Any:
    """(model, optimizer, step)"""
    vt.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    return model, optimizer, step


def both(change: Callable[[Any, Any, int], Any], calls: int = 10) -> CapturedStep:
    """Runs eagerly and captured; `change(model, optimizer, index)` comes before each call."""
    losses: list[list[float]] = []
    for wrap in (lambda f: f, capture):
        model, optimizer, step = training()
        function = wrap(step)
        losses.append([])
        for index in range(calls):
            change(model, optimizer, index)
            vt.manual_seed(index)
            losses[-1].append(function(vt.full((2, 4), 0.1 * index + 0.1)).item())
    assert losses[0] == losses[1]
    return function  # type: ignore[return-value]


# --- which way is taken


def test_a_step_of_a_hundred_calls_takes_the_short_way() -> None:
    step = both(lambda *_: None, 100)
    assert (short(step), long(step)) == (97, 1)
    assert step.last is step.variants[0]


def test_rates_reach_the_short_way() -> None:
    def change(model: Any, optimizer: Any, index: int) -> None:
        optimizer.param_groups[0]["lr"] = [0.1, 1, 0.01][index % 3]

    step = both(change)
    assert (short(step), long(step)) == (7, 1)


def test_schedules_are_called() -> None:
    seen = []
    for wrap in (lambda f: f, capture):
        model, optimizer, inner = training()
        model.eval()
        schedule = vt.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)

        def step(x: Any, inner: Any = inner, schedule: Any = schedule) -> Any:
            loss = inner(x)
            schedule.step()
            return loss

        function = wrap(step)
        losses = [function(vt.ones(2, 4)).item() for _ in range(12)]
        seen.append((losses, schedule.last_epoch, optimizer.param_groups[0]["lr"]))
    assert seen[0] == seen[1]
    assert short(function) == 9


def test_several_shapes_each_take_the_short_way() -> None:
    step = capture(lambda x, y=1.0: x * y)
    for i in range(12):
        x = vt.ones(i % 3 + 1)
        assert step(x).tolist() == [1.0] * (i % 3 + 1)
        assert step(x, y=2.0).tolist() == [2.0] * (i % 3 + 1)
    assert (len(step.variants), long(step), short(step)) == (6, 6, 12)


Pair = namedtuple("Pair", ["a", "b"])


def test_structures_of_arguments_and_results() -> None:
    @capture
    def step(pair: Any, *, table: dict[str, Any], mode: str, flag: bool) -> Any:
        total = pair.a + table["x"] * (2 if flag else 3)
        return {"sum": total, "list": [total * 2, (total * 3, mode, None)]}, []

    for i in range(5):
        pair = Pair(vt.full((2,), float(i)), None)
        out, empty = step(pair, table={"x": np.full(2, 1.0, np.float32)}, mode="m", flag=True)
        assert type(out) is dict and type(out["list"][1]) is tuple and empty == []
        assert out["sum"].tolist() == [i + 2.0] * 2
        assert out["list"][0].tolist() == [2 * (i + 2.0)] * 2
        assert out["list"][1][0].tolist() == [3 * (i + 2.0)] * 2 and out["list"][1][1:] == (
            "m",
            None,
        )
    assert short(step) == 3
    maximum = capture(lambda x: Pair(*x.max(dim=0)))
    for i in range(4):
        found = maximum(vt.tensor([float(i), 1.5]))
        assert type(found) is Pair and found.a.item() == max(i, 1.5)
    assert short(maximum) == 2


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ("a", "b"),
        (None, 0),
        (vt.float32, vt.float64),
        ((1, 2), [1, 2]),
        ((1, 2), (1, 2, 3)),
        ({"a": 1}, {"b": 1}),
        (vt.ones(2), vt.ones(2, dtype=vt.float64)),
        (vt.ones(2, 3), vt.ones(3, 2).t()),
        (vt.ones(2), vt.ones(2, requires_grad=True)),
        (vt.ones(2), np.ones(2, np.float32)),
        (np.ones(2), np.ones(2, ">f8")),
        (np.ones(2), np.ones(2, np.int64)),
    ],
)
def test_calls_that_are_told_apart(first: Any, other: Any) -> None:
    step = capture(lambda x, y: x * 1)
    for _ in range(3):
        step(vt.ones(1), first)
    count = short(step)
    assert count == 1
    try:
        step(vt.ones(1), other)
    except TypeError:
        assert isinstance(other, np.ndarray)  # of foreign byte order
    assert short(step) == count
    step(vt.ones(1), first)
    assert short(step) == count + 1


def test_modes_and_aliases_are_told_apart() -> None:
    step = capture(lambda x, y: x.add_(1) + y)
    x = vt.ones(2)
    for _ in range(3):
        assert step(vt.ones(2), vt.ones(2)).tolist() == [3, 3]
    assert step(x, x).tolist() == [4, 4]
    with vt.no_grad():
        assert step(vt.ones(2), vt.ones(2)).tolist() == [3, 3]
    with vt.autocast("cpu"):
        assert step(vt.ones(2), vt.ones(2)).tolist() == [3, 3]
    assert (short(step), len(step.variants)) == (1, 4)


@pytest.mark.parametrize("size", [8, 100_000])
def test_arrays_and_tensors_are_staged(size: int) -> None:
    step = capture(lambda x: x + 1)
    data = np.arange(2 * size, dtype=np.float32)
    for i in range(4):
        for x in (data[:size] + i, vt.from_numpy(data[:size] + i)):
            np.testing.assert_array_equal(step(x).numpy(), data[:size] + i + 1)
    assert short(step) == 4
    # An array that does not lie in one piece goes the long way; so does one that is read-only not.
    np.testing.assert_array_equal(step(data[::2]).numpy(), data[::2] + 1)
    assert short(step) == 4
    fixed = data[:size].copy()
    fixed.flags.writeable = False
    np.testing.assert_array_equal(step(fixed).numpy(), fixed + 1)
    assert short(step) == 5
    # Strided tensors have a variant of their own, and keep their strides.
    for _ in range(4):
        strided = vt.from_numpy(data)[::2]
        np.testing.assert_array_equal(step(strided).numpy(), data[::2] + 1)
    assert short(step) == 7


def test_numpy_scalars_are_arrays() -> None:
    step = capture(lambda x, s: x * s)
    for i in range(4):
        assert step(vt.ones(2), np.float32(i)).tolist() == [i, i]
    assert short(step) == 2


def test_gradients_of_the_users_own_take_the_long_way() -> None:
    p = vt.nn.Parameter(vt.ones(2))
    step = capture(lambda x: (p * x).sum().backward())
    p.grad = vt.zeros(2)
    for _ in range(4):
        step(vt.ones(2))
    count = short(step)
    assert count > 0
    p.grad = vt.zeros(2)
    step(vt.ones(2))
    assert p.grad.tolist() == [1, 1] and short(step) == count


def test_errors_of_kernels_keep_their_class() -> None:
    step = capture(lambda x, i: x[i])
    for _ in range(3):
        assert step(vt.ones(3), vt.tensor([1])).item() == 1
    with pytest.raises(IndexError):
        step(vt.ones(3), vt.tensor([7]))
    assert step(vt.ones(3), vt.tensor([2])).item() == 1
    assert short(step) == 2


def test_a_step_reset_while_it_replays() -> None:
    model, optimizer, inner = training()
    calls: list[int] = []

    def look(epoch: int) -> float:
        calls.append(epoch)
        if epoch == 5:
            step.reset()
        return 1.0

    schedule = vt.optim.lr_scheduler.LambdaLR(optimizer, look)

    @capture
    def step(x: Any) -> Any:
        loss = inner(x)
        schedule.step()
        return loss

    for _ in range(8):
        assert step(vt.ones(2, 4)).item() > 0
    assert calls[-1] == schedule.last_epoch == 8


# --- what is noticed


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "number": lambda m, o: setattr(m.drop, "p", 0.0),
    "own number": lambda m, o: setattr(m, "scale", 3.0),
    "forward": lambda m, o: setattr(m.drop, "forward", lambda x: x * 5),
    "module": lambda m, o: setattr(m, "drop", vt.nn.Dropout(0.1)),
    "module in the table": lambda m, o: m._modules.update(drop=vt.nn.Dropout(0.1)),
    "parameter in the table": lambda m, o: m.fc._parameters.__setitem__(
        "bias", vt.nn.Parameter(vt.ones(4))
    ),
    "no bias": lambda m, o: setattr(m.fc, "bias", None),
    "forward hook": lambda m, o: m.fc.register_forward_hook(lambda m, a, out: out * 2),
    "pre-hook": lambda m, o: m.fc.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "backward hook": lambda m, o: m.fc.register_full_backward_pre_hook(lambda m, g: (g[0] * 2,)),
    "hook of a weight": lambda m, o: m.fc.weight.register_hook(lambda g: g * 2),
    "hook of the optimizer": lambda m, o: o.register_step_pre_hook(
        lambda o, a, k: setattr(m.fc.bias, "grad", m.fc.bias.grad * 0)
    ),
    "mode": lambda m, o: m.eval(),
    "option": lambda m, o: o.param_groups[0].update(weight_decay=0.5),
    "state": lambda m, o: o.state[m.fc.weight].update(exp_avg=vt.ones(4, 4)),
    "state cleared": lambda m, o: o.state.clear(),
    "mode written past the module": lambda m, o: vars(m.drop).update(training=False),
    "other list of parameters": lambda m, o: o.param_groups[0].update(params=[m.fc.weight]),
    "other groups": lambda m, o: setattr(
        o, "param_groups", [{**o.param_groups[0], "params": [m.fc.bias]}]
    ),
    "fewer parameters": lambda m, o: o.param_groups[0]["params"].pop(),
    "frozen": lambda m, o: m.fc.bias.requires_grad_(False),
    "moved": lambda m, o: setattr(m.fc.bias, "data", vt.ones(4)),
    "other memory": lambda m, o: m._apply(lambda t: t * 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name: str) -> None:
    def change(model: Any, optimizer: Any, index: int) -> None:
        if index == 5:
            CHANGES[name](model, optimizer)

    step = both(change, 12)
    # Noticed, recorded again, and then replayed the short way.
    assert short(step) >= 3


def test_hooks_that_are_removed_are_noticed() -> None:
    handles: list[Any] = []

    def change(model: Any, optimizer: Any, index: int) -> None:
        if index == 3:
            handles.append(model.fc.register_forward_hook(lambda m, a, out: out * 2))
        if index == 6:
            handles.pop().remove()
        if index == 9:
            handles.append(
                vt.nn.modules.module.register_module_forward_hook(lambda m, a, out: out + 1)
            )
        if index == 12:
            handles.pop().remove()

    both(change, 16)


def test_what_the_function_does_not_read_may_change() -> None:
    def change(model: Any, optimizer: Any, index: int) -> None:
        model.epoch = index  # read nowhere
        model.fc.note = object()
        vt.nn.Linear(2, 2)  # counts a change, of nothing that matters here

    step = both(change)
    assert len(step.variants) == 1 and short(step) == 7


def test_what_the_function_sets_itself_is_no_reason_to_record() -> None:
    """`calls` is read and set by forward: an eager call in between changes it too."""

    def change(model: Any, optimizer: Any, index: int) -> None:
        with vt.no_grad():
            model(vt.ones(1, 4))

    step = both(change)
    assert len(step.variants) == 1 and short(step) == 7


def test_modules_that_only_were_looked_at_are_watched() -> None:
    one, two = vt.nn.Identity(), vt.nn.Identity()
    step = capture(
        lambda x: x * (2 if one.training else 3) + (two.bonus if hasattr(two, "bonus") else 0)
    )
    for _ in range(3):
        assert step(vt.ones(1)).item() == 2
    one.eval()
    for _ in range(3):
        assert step(vt.ones(1)).item() == 3
    two.bonus = 10
    for _ in range(3):
        assert step(vt.ones(1)).item() == 13
    del two.bonus
    one.train()
    assert step(vt.ones(1)).item() == 2
    assert len(step.variants) == 3


def test_a_property_for_training_is_asked() -> None:
    class Odd(vt.nn.Module):
        on = True

        @property
        def training(self) -> bool:  # type: ignore[override]
            return Odd.on

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        def forward(self, x: Any) -> Any:
            return x * (self.factor if self.training else 3)

    odd = Odd()
    odd.factor = 2
    step = capture(lambda x: odd(x))
    for _ in range(3):
        assert step(vt.ones(1)).item() == 2
    odd.factor = 5  # by a __setattr__ that counts nothing
    for _ in range(3):
        assert step(vt.ones(1)).item() == 5
    Odd.on = False
    assert step(vt.ones(1)).item() == 3


# --- what it costs


def test_unchanged_things_are_not_looked_at() -> None:
    """148 parameters: what each replay looks at is the lists of the optimizer, and little else."""
    model = vt.nn.Sequential(*[vt.nn.Linear(2, 2) for _ in range(74)])
    optimizer = vt.optim.AdamW(model.parameters(), lr=1e-3)

    @capture
    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(4):
        step(vt.ones(1, 2))
    session = step.variants[0].session
    assert session.tensors.always <= 148 + 4
    assert session.course.always <= 40
    assert session.tensors.counted >= 148 * 4  # parameters and their state
    assert session.course.counted >= 74 * 3


def test_a_watch_looks_only_after_a_change() -> None:
    class Counting(dict):
        pass

    held, watch = {"a": 1.5, "b": None}, _C.graphs.Watch()
    watch.add_dict(held, dict(held), frozenset(), True)
    assert watch.holds()
    held["a"] = 2.5  # not told
    assert watch.holds()
    _C._note_change()
    assert not watch.holds() and not watch.holds()
    held["a"] = 1.5
    assert watch.holds()
    del held["b"]
    _C._note_change()
    assert not watch.holds()
    held.update(b=None, c=1)
    assert not watch.holds()
    del held["c"], held["a"]
    held["a"] = 1.5  # in another order
    assert not watch.holds()
    held["b"] = held.pop("b")
    assert watch.holds()


def test_values_are_compared_by_type_and_bits() -> None:
    nan = float("nan")
    for value, other, same in [
        (1, 1.0, False),
        (0.0, -0.0, False),
        (nan, float("nan"), True),
        ((1, "a", (0.5,)), (1, "a", (0.5,)), True),
        ((1, 2), (1, 2, 3), False),
        ([1], [1], False),
        ("ab", "".join(["a", "b"]), True),
        (10**30, 10**30 + 0, True),
        (np.float64(0.5), np.float64(0.5), True),
    ]:
        watch = _C.graphs.Watch()
        watch.add_items({"x": other}, {"x": value}, frozenset(), False)
        assert watch.holds() is same, (value, other)
    rate = _C.graphs.Watch()
    group: dict[str, Any] = {"lr": 1}
    rate.add_dict(group, {"lr": _C.graphs.RATE}, frozenset(), False)
    assert rate.holds()
    group["lr"] = 0.5
    assert rate.holds()
    group["lr"] = np.float64(0.5)
    assert rate.holds()
    group["lr"] = vt.tensor(0.5)
    assert not rate.holds()


# --- the dictionaries that count


def test_modules_and_optimizers_copy_and_pickle() -> None:
    model, optimizer, step = training()
    handle = model.fc.register_forward_hook(lambda m, a, out: None)
    handle.remove()
    step(vt.ones(2, 4))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        for mine, theirs in zip(model.modules(), other.modules()):
            assert type(theirs._parameters) is type(mine._parameters)
            assert type(theirs._forward_hooks) is type(mine._forward_hooks)
        for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters()):
            np.testing.assert_array_equal(p.detach().numpy(), q.detach().numpy(), name)
    both_of_them = copy.deepcopy((model, optimizer))
    weight = both_of_them[0].fc.weight
    assert weight is not model.fc.weight
    state = both_of_them[1].state[weight]
    np.testing.assert_array_equal(
        state["exp_avg"].numpy(), optimizer.state[model.fc.weight]["exp_avg"].numpy()
    )
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert {type(value) for value in saved["state"].values()} == {dict}
    again = vt.optim.AdamW(model.parameters(), lr=1.0)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 1e-2
    assert again.state[model.fc.weight].keys() == optimizer.state[model.fc.weight].keys()


def test_cycles_through_a_capture_are_collected() -> None:
    class Trainer(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = vt.nn.Linear(2, 2)
            self.step = capture(lambda x: self(x).sum())

        def forward(self, x: Any) -> Any:
            return self.fc(x)

    trainer = Trainer()
    for _ in range(4):
        trainer.step(vt.ones(1, 2))
    assert short(trainer.step) == 2
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
