"""What changes between two calls of a captured step, beside what test_replay.py changes: a capture
gives the numbers, gradients and errors of the plain function."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from vibetensor.graphs import CapturedStep, capture
from vibetensor.torch import nn
from vibetensor.torch.optim import optimizer as optim

CHANGED_AT = 5


class Containers(nn.Module):
    """Its parts are used without being called."""

    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Tanh()})
        self.weights = nn.ParameterList([nn.Parameter(vt.ones(4))])
        self.table = nn.ParameterDict({"w": nn.Parameter(vt.ones(4))})
        self.head = nn.Linear(4, 4)
        self.stack = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        self.register_buffer("offset", vt.zeros(4))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        for name in self.named:
            x = self.named[name](x)
        for weight in self.weights:
            x = x * weight
        x = self.stack(x * self.table["w"])
        return F.linear(x, self.head.weight) * self.factor + self.offset


class Scaled(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 3


class Slotted(nn.Module):
    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.factor = 2.0

    def forward(self, x: Any) -> Any:
        return self.fc(x) * self.factor


def losses(
    make: Callable[[], Any], change: Callable[[Any, Any], None], wrap: Callable[[Any], Any]
) -> tuple[list[Any], Any]:
    vt.manual_seed(0)
    model = make()
    optimizer = vt.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = Containers.forward(model, x) if type(model) is Uncalled else model(x)
        loss = loss.square().sum()
        loss.backward()
        optimizer.step()
        return loss

    found: list[Any] = []
    function = wrap(step)
    for index in range(10):
        if index == CHANGED_AT:
            change(model, optimizer)
        try:
            found.append(function(vt.full((2, 4), 0.1 * index + 0.1)).item())
        except Exception as error:
            found.append((type(error), str(error)))
        found.append([None if p.grad is None else p.grad.tolist() for p in model.parameters()])
    return found, function


class Uncalled(Containers):
    def __call__(self, x: Any) -> Any:
        raise AssertionError("never called")


def reorder(model: Any, optimizer: Any) -> None:
    model.stack._modules["0"] = model.stack._modules.pop("0")


def new_parameter(*shape: int) -> Any:
    return nn.Parameter(vt.full(shape, 0.5))


CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "a layer of a list": lambda m, o: m.layers.__setitem__(1, nn.Linear(4, 4)),
    "a longer list": lambda m, o: m.layers.append(nn.Linear(4, 4)),
    "an entry of a dict": lambda m, o: m.named.update({"b": nn.ReLU()}),
    "a larger dict": lambda m, o: m.named.update({"c": nn.ReLU()}),
    "a parameter of a list": lambda m, o: m.weights.__setitem__(0, new_parameter(4)),
    "a parameter of a dict": lambda m, o: m.table.__setitem__("w", new_parameter(4)),
    "a weight of a module that is not called": lambda m, o: setattr(
        m.head, "weight", new_parameter(4, 4)
    ),
    "no weight": lambda m, o: delattr(m.head, "weight"),
    "a child": lambda m, o: setattr(m, "head", nn.Linear(4, 4)),
    "a buffer": lambda m, o: setattr(m, "offset", vt.ones(4)),
    "an order": reorder,
    "a class": lambda m, o: setattr(m.named["a"], "__class__", Scaled),
    "memory of a gradient": lambda m, o: setattr(m.head.weight.grad, "data", vt.ones(4, 4)),
    "strides of a gradient": lambda m, o: m.head.weight.grad.t_(),
}


@pytest.mark.parametrize("make", [Containers, Uncalled])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_modules(name: str, make: Any) -> None:
    expected, _ = losses(make, CHANGES[name], lambda f: f)
    found, step = losses(make, CHANGES[name], capture)
    assert found == expected
    assert name == "no weight" or sum(v.native.count for v in step.variants) >= 2


def test_a_slot_and_an_attribute_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_slot(model: Any, optimizer: Any) -> None:
        model.factor = 3.0

    def set_class(model: Any, optimizer: Any) -> None:
        monkeypatch.setattr(Containers, "factor", 3.0)

    def patch(model: Any, optimizer: Any) -> None:
        monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: x)

    for make, change in ((Slotted, set_slot), (Containers, set_class), (Containers, patch)):
        expected, _ = losses(make, change, lambda f: f)
        monkeypatch.undo()
        assert losses(make, change, capture)[0] == expected
        monkeypatch.undo()


def test_hooks_of_all_optimizers() -> None:
    handles = []

    def double(optimizer: Any, args: Any, kwargs: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad.mul_(2)

    def change(model: Any, optimizer: Any) -> None:
        handles.append(optim.register_optimizer_step_pre_hook(double))

    try:
        expected, _ = losses(Slotted, change, lambda f: f)
        handles.pop().remove()
        assert losses(Slotted, change, capture)[0] == expected
    finally:
        handles.pop().remove()


def test_rates_may_be_numpy_floats() -> None:
    model = nn.Linear(4, 4)
    optimizer = vt.optim.SGD(model.parameters(), lr=np.float64(0.1))

    @capture
    def step() -> None:
        optimizer.zero_grad()
        model.weight.sum().backward()
        optimizer.step()

    for index in range(12):
        optimizer.param_groups[0]["lr"] = np.float64(index) if index % 2 else float(index)
        before = model.weight.detach().clone()
        step()
        assert vt.equal(model.weight, before - index)
    assert len(step.variants) == 1


def test_recordings_of_other_threads_are_no_hooks() -> None:
    model = nn.Linear(2, 2)
    optimizer = vt.optim.SGD(model.parameters(), lr=0.1)

    def train(x: Any) -> Any:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    step: CapturedStep = capture(train)
    x = vt.ones(1, 2)
    for _ in range(4):
        step(x)
    recording, done = threading.Event(), threading.Event()

    def slow(x: Any) -> Any:
        recording.set()
        assert done.wait(60)
        return x * 2

    thread = threading.Thread(target=capture(slow), args=(vt.ones(1),))
    thread.start()
    assert recording.wait(60)
    try:
        replays = sum(v.replays for v in step.variants)
        for _ in range(4):
            step(x)
    finally:
        done.set()
        thread.join()
    assert len(step.variants) == 1 and step.variants[0].replays == replays + 4
    assert not nn.modules.hooks.any_global


# --- captured methods


class Trainer:
    def __init__(self) -> None:
        self.model = nn.Linear(4, 4)
        self.optimizer = vt.optim.SGD(self.model.parameters(), lr=0.1)

    @capture
    def step(self, x: Any) -> Any:
        self.optimizer.zero_grad()
        loss = self.model(x).sum()
        loss.backward()
        self.optimizer.step()
        return loss


class TrainerModule(Trainer, nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        Trainer.__init__(self)


@dataclasses.dataclass
class Compared:  # equal objects, without a hash
    model: Any

    @capture
    def step(self, x: Any) -> Any:
        return self.model(x)


@pytest.mark.parametrize("make", [Trainer, TrainerModule, lambda: Compared(nn.Linear(4, 4))])
def test_objects_go_with_the_captures_of_their_methods(make: Any) -> None:
    trainer = make()
    for _ in range(4):
        trainer.step(vt.ones(2, 4))
    assert trainer.step.variants and trainer.step is trainer.step
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


def test_copies_of_an_object_have_captures_of_their_own() -> None:
    for make in (Trainer, TrainerModule, lambda: Compared(nn.Linear(4, 4))):
        trainer = make()
        for _ in range(4):
            trainer.step(vt.ones(2, 4))
        for other in (
            copy.copy(trainer),
            copy.deepcopy(trainer),
            pickle.loads(pickle.dumps(trainer)),
        ):
            assert other.step is not trainer.step and not other.step.variants
            other.model = nn.Linear(4, 4, bias=False)
            expected = other.model(vt.ones(2, 4))
            found = other.step(vt.ones(2, 4))
            assert found.tolist() in (expected.tolist(), expected.sum().item())
        type(trainer).step.reset()
        assert not trainer.step.variants


def doubled(x: Any) -> Any:
    return x * 2


def test_captured_functions_may_be_attributes_of_what_is_copied() -> None:
    step = capture(doubled, max_variants=3)
    for _ in range(3):
        step(vt.ones(2))
    for other in (copy.copy(step), copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert (
            not other.variants
            and [other(vt.ones(2)).tolist() for _ in range(4)] == [[2.0, 2.0]] * 4
        )
        assert (other._max_variants, len(other.variants)) == (3, 1)

    class Holder:
        def __init__(self) -> None:
            self.weight = vt.ones(2)
            self.step = capture(self.scaled)

        def scaled(self, x: Any) -> Any:
            return self.weight * x

    holder = Holder()
    copied = copy.deepcopy(holder)
    copied.weight.fill_(3)
    assert holder.step(vt.ones(2)).tolist() == [1.0, 1.0]
    assert copied.step(vt.ones(2)).tolist() == [3.0, 3.0]


def test_a_method_of_an_object_without_a_dict_is_refused() -> None:
    class Small:
        __slots__ = ("__weakref__",)

        @capture
        def step(self, x: Any) -> Any:
            return x

    with pytest.raises(TypeError, match="needs objects with a __dict__"):
        Small().step(vt.ones(1))


# --- gradients, results, modes


def two_heads(wrap: Callable[[Any], Any]) -> list[Any]:
    vt.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)])
    found: list[Any] = []

    def make(head: Any) -> Any:
        optimizer = vt.optim.SGD([*model[0].parameters(), *head.parameters()], lr=0.1)

        def step(x: Any) -> Any:
            model.zero_grad()
            loss = head(model[0](x)).sum()
            loss.backward()
            optimizer.step()
            return loss

        return wrap(step)

    steps = [make(model[1]), make(model[2])]
    for index in range(12):
        found.append(steps[index % 2](vt.full((2, 4), 0.1 * index)).item())
        found.append([None if p.grad is None else p.grad.tolist() for p in model.parameters()])
    return found


def test_gradients_that_the_function_only_drops() -> None:
    assert two_heads(capture) == two_heads(lambda f: f)


def test_gradients_that_the_function_only_reads() -> None:
    model = nn.Linear(4, 1)
    held = []

    def clip(scale: float) -> Any:
        return nn.utils.clip_grad_norm_(model.parameters(), scale)

    def looks(x: Any) -> Any:
        return x * 2 if model.weight.grad is None else x * 3

    step, look = capture(clip), capture(looks)
    for index in range(1, 8):
        model.zero_grad()
        (model(vt.full((2, 4), float(index))).sum() * 5).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        norm = step(1.0)
        expected = vt.stack([g.norm() for g in grads]).norm()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        for p, grad in zip(model.parameters(), grads):
            np.testing.assert_allclose(p.grad.numpy(), grad.numpy() / expected.item(), rtol=1e-5)
        mine = model.weight.grad
        assert look(vt.ones(1)).item() == 3 and model.weight.grad is mine
        held.append((mine, mine.clone()))
        for old, values in held:
            assert vt.equal(old, values)
        if index > 4:
            model.zero_grad()
            assert look(vt.ones(1)).item() == 2 and model.weight.grad is None


def test_a_gradient_that_is_read_and_dropped_keeps_its_values() -> None:
    weight = nn.Parameter(vt.ones(3))

    @capture
    def step(x: Any) -> Any:
        before = weight.grad * 1
        weight.grad = None
        (weight * x).sum().backward()
        return before

    held = []
    for index in range(8):
        weight.grad = vt.full((3,), float(index))
        held.append(weight.grad)
        assert step(vt.full((3,), 9.0)).tolist() == [float(index)] * 3
        assert weight.grad.tolist() == [9.0] * 3
        assert [h[0].item() for h in held] == [float(i) for i in range(index + 1)]


def test_a_result_that_is_state_is_a_new_tensor_each_time() -> None:
    state = vt.zeros(3)

    @capture
    def step(x: Any) -> Any:
        state.add_(x)
        return state, [state]

    for index in range(1, 7):
        first, (second,) = step(vt.ones(3))
        assert first.tolist() == [float(index)] * 3 and not first.requires_grad
        assert first is not second and first.data_ptr() == second.data_ptr() == state.data_ptr()
        first.requires_grad_()
        second.unsqueeze_(0)


def test_anomaly_mode_finds_what_it_looks_for() -> None:
    weight = nn.Parameter(vt.ones(3))

    @capture
    def step(x: Any) -> Any:
        weight.grad = None
        loss = (weight * x).sqrt().sum()
        loss.backward()
        return loss

    for _ in range(5):
        step(vt.ones(3))
    assert step(vt.full((3,), -1.0)).isnan().item()
    with vt.autograd.set_detect_anomaly(True):
        with pytest.raises(RuntimeError, match="returned nan"):
            step(vt.full((3,), -1.0))
        assert step(vt.ones(3)).item() == 3
    assert step(vt.ones(3)).item() == 3 and len(step.variants) <= 2


# --- Python code that runs while a call is matched


def test_captures_may_be_dropped_while_a_call_is_matched() -> None:
    class Array:
        def __init__(self) -> None:
            self.array = np.ones(3)
            self.shape, self.dtype, self.drops = self.array.shape, self.array.dtype, False

        @property
        def __array_interface__(self) -> Any:
            return self.array.__array_interface__

        @property
        def __array_struct__(self) -> Any:
            if self.drops:
                step.reset()
                gc.collect()
            return self.array.__array_struct__

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            step.reset()
            gc.collect()
            return str.__eq__(self, other)

    step = capture(lambda a, k: a * k if not isinstance(a, dict) else a["a"] * k)
    for k in (2.0, 3.0, 2.0):
        for _ in range(4):
            assert step(Array(), k).tolist() == [k] * 3
    dropping = Array()
    dropping.drops = True
    assert step(dropping, 3.0).tolist() == [3.0] * 3
    for _ in range(4):
        step({"a": vt.ones(3)}, 2.0)
    assert step({Key("a"): vt.ones(3)}, 2.0).tolist() == [2.0] * 3


# --- leaves of the step's own


@pytest.mark.parametrize("read", ["penalty", "grad", "dropped"])
def test_leaves_may_be_made_in_the_step(read: str) -> None:
    def run(wrap: Callable[[Any], Any]) -> tuple[list[Any], Any]:
        vt.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        optimizer = vt.optim.Adam(model.parameters(), lr=0.01)

        def step(x: Any) -> Any:
            optimizer.zero_grad()
            x = x.detach().requires_grad_()
            out = model(x).sum()
            if read == "penalty":
                (grad,) = vt.autograd.grad(out, x, create_graph=True)
                (grad.norm(dim=1) - 1).square().mean().backward()
            else:
                out.backward()
                grad = x.grad
                if read == "dropped":
                    x.grad = None
            optimizer.step()
            return grad

        function = wrap(step)
        found = [function(vt.full((2, 4), 0.1 * i + 0.1)).tolist() for i in range(8)]
        return [*found, *(p.tolist() for p in model.parameters())], function

    found, step = run(capture)
    assert found == run(lambda f: f)[0]
    assert len(step.variants) == 1 and step.variants[0].replays == 6


def test_flipped_arrays() -> None:
    step = capture(lambda x: x * 2)
    for index in range(6):
        array = np.arange(6.0).reshape(2, 3) + index
        for given in (array, array[::-1], array[:, ::-1], array.T.copy().T):
            np.testing.assert_array_equal(step(given).numpy(), given * 2)
    assert len(step.variants) == 1


def test_overrides_that_come_and_go() -> None:
    step = capture(lambda x: vt.matmul(x, x))
    x = vt.ones(2, 2)
    for _ in range(2):
        assert [step(x)[0, 0].item() for _ in range(4)] == [2.0] * 4
        with vt.library.override("mm", lambda original, name, args: original() * 2):
            assert [step(x)[0, 0].item() for _ in range(3)] == [4.0] * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_node_that_adds_up_a_gradient(when: str) -> None:
    w = vt.ones(2, requires_grad=True)

    @capture
    def step(x: Any) -> Any:
        w.grad = None
        (w * x).sum().backward()
        return w.grad.clone()

    node = vt.autograd.graph.get_gradient_edge(w).node
    calls = []
    for _ in range(2):
        assert [step(vt.ones(2))[0].item() for _ in range(4)] == [1.0] * 4
        if when == "before":
            handle = node.register_prehook(lambda grads: (grads[0] * 3,))
        else:
            handle = node.register_hook(lambda *_: calls.append(len(calls)))
        found = [step(vt.ones(2))[0].item() for _ in range(3)]
        assert found == [3.0 if when == "before" else 1.0] * 3
        handle.remove()
    assert bool(calls) == (when == "after")
