"""torch.compile: eager's bits whether a call is replayed or not, and which calls are."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from vibetensor.graphs import CaptureError
from vibetensor.graphs.compile import OptimizedModule


class Net(vt.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = vt.nn.Linear(6, 12)
        self.norm = vt.nn.BatchNorm1d(12)
        self.drop = vt.nn.Dropout(0.25)
        self.outer = vt.nn.Linear(12, 3)
        self.scale = 1.0

    def forward(self, x: Any) -> Any:
        return self.outer(self.drop(F.gelu(self.norm(self.inner(x))))) * self.scale


def batch(index: int, rows: int = 5) -> tuple[Any, Any]:
    rng = np.random.default_rng(index)
    x = vt.tensor(rng.standard_normal((rows, 6)).astype(np.float32))
    return x, vt.tensor(rng.integers(0, 3, rows))


class Training:
    def __init__(self, wrap: Callable[[Any], Any] | None = None) -> None:
        vt.manual_seed(3)
        self.model = Net()
        self.call = wrap(self.model) if wrap else self.model
        self.optimizer = vt.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, index: int, rows: int = 5) -> list[Any]:
        x, y = batch(index, rows)
        x.requires_grad_()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.call(x), y)
        loss.backward()
        self.optimizer.step()
        return [loss.item(), x.grad.tolist()]

    def state(self) -> list[Any]:
        return [v.tolist() for v in self.model.state_dict().values()]


def replays(compiled: Any) -> int:
    function = compiled._compiled if isinstance(compiled, OptimizedModule) else compiled
    return sum(j._forward.replays for joints in function._known.values() for j in joints)


def pair() -> tuple[Training, Training]:
    return Training(), Training(vt.compile)


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_training_is_eager_training() -> None:
    eager, compiled = pair()
    runs = []
    for training in (eager, compiled):
        vt.manual_seed(9)
        seen = [training.step(i, rows=5 if i % 3 else 4) for i in range(12)]
        training.call.eval()
        with vt.no_grad():
            seen.append(training.call(batch(50)[0]).tolist())
        seen.append(training.call(batch(51)[0]).tolist())
        training.call.train()
        seen += [training.step(i) for i in range(3)]
        runs.append((seen, training.state(), vt.rand(2).tolist()))
    assert runs[0] == runs[1]
    assert replays(compiled.call) == 17
    report = compiled.call._compiled.report()
    assert report.count("Net, forward:") == 4 and report.count("Net, backward:") == 2


def test_accumulation_clipping_and_a_frozen_layer() -> None:
    runs = []
    for training in pair():
        vt.manual_seed(1)
        for i in range(6):
            if i == 3:
                training.model.inner.requires_grad_(False)
            training.optimizer.zero_grad()
            for k in range(3):
                x, y = batch(10 * i + k)
                (F.cross_entropy(training.call(x), y) / 3).backward()
            vt.nn.utils.clip_grad_norm_(training.model.parameters(), 0.1)
            training.optimizer.step()
        runs.append(training.state())
    assert runs[0] == runs[1]
    assert replays(training.call) >= 9


def test_two_forwards_before_a_backward() -> None:
    runs = []
    for training in pair():
        vt.manual_seed(1)
        for i in range(4):
            training.optimizer.zero_grad()
            loss = sum(F.cross_entropy(training.call(x), y) for x, y in map(batch, (i, i + 1)))
            loss.backward()
            training.optimizer.step()
        runs.append((training.state(), loss.item()))
    assert runs[0] == runs[1]
    assert replays(training.call) == 4


def test_a_loss_that_is_held_and_gone_back_through_twice() -> None:
    runs = []
    for training in pair():
        vt.manual_seed(2)
        held, grads = [], []
        for i in range(4):
            x, y = batch(i)
            held.append(training.call(x))
            loss = F.cross_entropy(held[-1], y)
            for _ in range(2):
                loss.backward(retain_graph=True)
            grads.append([p.grad.tolist() for p in training.model.parameters()])
        runs.append((grads, [h.tolist() for h in held]))
    assert runs[0] == runs[1]


def test_double_backward() -> None:
    runs = []
    for training in pair():
        vt.manual_seed(2)
        grads = []
        for i in range(3):
            x, _ = batch(i)
            x.requires_grad_()
            training.optimizer.zero_grad()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                (g,) = vt.autograd.grad(training.call(x).pow(2).sum(), x, create_graph=True)
            assert (len(caught) == 1) == (training.call is not training.model and i == 1)
            g.pow(2).sum().backward()
            weights = [p for p in training.model.parameters() if p.grad is not None]
            grads.append([x.grad.tolist(), *(p.grad.tolist() for p in weights)])
        runs.append((grads, training.state(), vt.rand(2).tolist()))
    # The first time the sums are in another order; from then on calls run as they are.
    for mine, other in zip(runs[0][0][0], runs[1][0][0], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    assert runs[0][0][1:] == runs[1][0][1:] and runs[0][1:] == runs[1][1:]


def test_hooks_run_each_time() -> None:
    warnings.simplefilter("ignore")
    runs = []
    for training in pair():
        vt.manual_seed(1)
        calls: list[str] = []

        def forward_hook(*args: Any, calls: list[str] = calls) -> None:
            calls.append("forward")

        def double(grad: Any, calls: list[str] = calls) -> Any:
            calls.append("grad")
            return grad * 2

        training.step(0)
        weight = training.model.outer.weight
        handles = [
            training.model.outer.register_forward_hook(forward_hook),
            weight.register_hook(double),
        ]
        for i in range(3):
            training.step(i)
        handles[0].remove()
        for i in range(3):
            training.step(i)
        handles[1].remove()
        training.step(4)
        runs.append((list(calls), training.state()))
    assert runs[0] == runs[1]
    assert runs[0][0].count("forward") == 3 and runs[0][0].count("grad") == 6
    assert replays(training.call) == 1  # captured anew once the hooks were gone


def test_other_layouts_of_gradients_and_late_hooks() -> None:
    runs = []
    for training in pair():
        weight = training.model.outer.weight
        grads = []
        for i in range(8):
            vt.manual_seed(i)
            training.optimizer.zero_grad()
            out = training.call(batch(i)[0])
            if i == 5:  # between forward and backward
                handle = weight.register_hook(lambda grad: grad * 3)
            # An expanded gradient, one in columns, one in rows.
            (
                out.sum()
                if i % 3 == 0
                else out.t().pow(2).sum()
                if i % 3 == 1
                else out.pow(2).sum()
            ).backward()
            training.optimizer.step()
            grads.append([p.grad.tolist() for p in training.model.parameters()])
        handle.remove()
        runs.append((grads, training.state()))
    assert runs[0] == runs[1]
    joints = [j for known in training.call._compiled._known.values() for j in known]
    assert max(len(joint._backwards) for joint in joints) >= 2


def test_modes_are_respected() -> None:
    model = Net()
    compiled = vt.compile(model)
    x, _ = batch(0)
    compiled.eval()
    assert model.training is False and compiled.training is False
    with vt.inference_mode():
        out = compiled(x)
        assert out.is_inference()
        assert (out == model(x)).all()
    with vt.no_grad():
        assert not compiled(x).requires_grad
        assert (compiled(x) == model(x)).all()
    with vt.autocast(kind(), dtype=vt.bfloat16):
        a, b = compiled(x), model(x)
    assert a.dtype == b.dtype == vt.bfloat16 and (a == b).all()
    assert compiled(x).requires_grad and (compiled(x) == model(x)).all()
    model.scale = 3.0
    assert (compiled(x) == model(x)).all()
    model.drop.p = 0.0
    model.train()
    vt.manual_seed(0)
    expected = copy.deepcopy(model)(x)
    assert (compiled(x) == expected).all()
    model.inner = vt.nn.Linear(6, 12)
    model.eval()
    assert (compiled(x) == model(x)).all()


def test_autocast_in_training() -> None:
    runs = []
    for training in pair():
        vt.manual_seed(1)
        for i in range(4):
            training.optimizer.zero_grad()
            x, y = batch(i)
            with vt.autocast(kind(), dtype=vt.bfloat16):
                loss = F.cross_entropy(training.call(x).float(), y)
                if i == 3:
                    loss.backward()
            if i != 3:
                loss.backward()
            training.optimizer.step()
        runs.append(training.state())
    assert runs[0] == runs[1]


def test_a_compiled_module_is_the_module() -> None:
    model = Net()
    compiled = vt.compile(model)
    assert isinstance(compiled, vt.nn.Module)
    assert list(compiled.state_dict()) == ["_orig_mod." + key for key in model.state_dict()]
    assert [n for n, _ in compiled.named_parameters()][0] == "_orig_mod.inner.weight"
    assert all(a is b for a, b in zip(compiled.parameters(), model.parameters(), strict=True))
    assert compiled._orig_mod is model and compiled.inner is model.inner
    compiled.scale = 2.0
    assert model.scale == 2.0 and compiled.scale == 2.0
    compiled.load_state_dict(compiled.state_dict())
    assert "OptimizedModule" in repr(compiled)
    with pytest.raises(AttributeError):
        compiled.nothing  # noqa: B018
    again = pickle.loads(pickle.dumps(vt.compile(vt.nn.Linear(2, 2))))
    assert isinstance(again, OptimizedModule)
    assert isinstance(copy.deepcopy(compiled), OptimizedModule)
    x, _ = batch(0)
    model.eval()
    assert (compiled(x) == model(x)).all()
    assert compiled
    sequence = vt.compile(vt.nn.Sequential(vt.nn.Linear(2, 2), vt.nn.ReLU()))
    assert len(sequence) == 2 and isinstance(sequence[1], vt.nn.ReLU)


def test_modules_compiled_in_place() -> None:
    class Decorated(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = vt.nn.Linear(6, 3)
            self.scale = 2.0

        @vt.compile
        def forward(self, x: Any) -> Any:
            return self.inner(x) * self.scale if self.training else self.inner(x)

    plain = Net()
    plain.compile()
    x, y = batch(0)
    for model, calls in ((plain, plain.forward), (decorated := Decorated(), None)):
        other = copy.deepcopy(model)
        if calls is None:
            plain_forward = type(other).forward._function  # pyright: ignore
            object.__setattr__(other, "forward", plain_forward.__get__(other))
        else:
            assert not hasattr(other.forward, "_known")
        pickle.loads(pickle.dumps(plain))
        keys = list(model.state_dict())
        assert keys == list(other.state_dict()) and not keys[0].startswith("_orig_mod")
        for i in range(4):
            for net in (model, other):
                vt.manual_seed(i)
                net.train(i != 2)
                net.scale = 3.0 if i > 2 else 1.0
                net.zero_grad()
                F.cross_entropy(net(x), y).backward()
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                assert a.grad.tolist() == b.grad.tolist()
    assert replays(plain.forward) == 4 and replays(decorated.forward) == 4
    hooks: list[int] = []
    handle = plain.register_forward_hook(lambda *args: hooks.append(1))
    plain(x), plain(x)
    handle.remove()
    assert hooks == [1, 1]


def test_a_function_that_trains_is_one_step() -> None:
    runs = []
    for wrap in (lambda f: f, vt.compile):
        training = Training()

        @wrap
        def step(x: Any, y: Any, training: Training = training) -> Any:
            training.optimizer.zero_grad()
            loss = F.cross_entropy(training.model(x), y)
            loss.backward()
            training.optimizer.step()
            return loss

        vt.manual_seed(4)
        losses = [step(*batch(i)).item() for i in range(8)]
        runs.append((losses, training.state(), vt.rand(2).tolist()))
    assert runs[0] == runs[1]
    assert step._step.variants[0].replays >= 4  # pyright: ignore


def test_a_backward_left_to_others() -> None:
    warnings.simplefilter("ignore")
    runs = []
    for wrap in (lambda f: f, vt.compile):
        training = Training()
        other = vt.nn.Parameter(vt.ones(3))

        @wrap
        def clears(x: Any, y: Any, training: Training = training) -> Any:
            training.optimizer.zero_grad()
            return F.cross_entropy(training.model(x), y)

        @wrap
        def trains(x: Any, y: Any, training: Training = training, other: Any = other) -> Any:
            training.optimizer.zero_grad()
            loss = F.cross_entropy(training.model(x), y)
            loss.backward()
            training.optimizer.step()
            return loss.detach(), (other * other).sum()

        vt.manual_seed(4)
        for i in range(4):
            clears(*batch(i)).backward()
            training.optimizer.step()
            trains(*batch(i))[1].backward()
        runs.append((training.state(), other.grad.tolist()))
    assert runs[0] == runs[1]


def test_a_function_with_structure() -> None:
    weight = vt.randn(3, 3, requires_grad=True)

    @vt.compile
    def function(batch: dict[str, Any], k: int, *, bias: Any = None) -> Any:
        y = batch["x"] @ weight * k
        return {"y": y if bias is None else y + bias, "top": y.argmax(1), "n": k}, [y.exp()]

    for i in range(5):
        x = vt.randn(4, 3)
        out, (e,) = function({"x": x}, 2, bias=x if i % 2 else None)
        y = x @ weight * 2
        assert (out["y"] == (y + x if i % 2 else y)).all() and out["n"] == 2
        assert (out["top"] == y.argmax(1)).all() and not out["top"].requires_grad
        weight.grad = None
        # One output is not used: its gradient does not come.
        out["y"].sum().backward() if i < 3 else (out["y"].sum() + e.sum()).backward()
        mine, weight.grad = weight.grad, None
        y = x @ weight * 2
        (y.sum() if i < 3 else y.sum() + y.exp().sum()).backward()
        assert mine.tolist() == weight.grad.tolist()


def test_results_keep_their_values() -> None:
    function = vt.compile(lambda x: (x * 2, x + 1))
    kept = [function(vt.full((3,), float(i))) for i in range(5)]
    assert [a.tolist()[0] for a, _ in kept] == [0, 2, 4, 6, 8]
    assert [b.tolist()[0] for _, b in kept] == [1, 2, 3, 4, 5]
    kept[0][0].add_(100)
    assert function(vt.zeros(3))[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("first", [0, 2])
def test_weights_changed_between_forward_and_backward(first: int) -> None:
    for training in pair():
        for i in range(first + 1):
            loss = F.cross_entropy(training.call(batch(i)[0]), batch(i)[1])
            if i == first:
                with vt.no_grad():
                    training.model.outer.weight.add_(1)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
            else:
                loss.backward()


UNSEEN: dict[str, Callable[..., Any]] = {
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: x + 1 if x.sum() > 0 else x - 1,
    "shape of values": lambda x: x[x > 0],
    "numpy": lambda x: vt.from_numpy(np.array(x.numpy() * 2)),
    "changes an argument": lambda x: x.mul_(2) + 1,
    "gives an argument back": lambda x: x,
    "gives a view back": lambda x: (x * 2, x[:1]),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_captured_runs(name: str) -> None:
    function = UNSEEN[name]
    compiled = vt.compile(function)
    with pytest.warns(UserWarning, match=r"torch\.compile: .* runs as it is: ") as caught:
        compiled(vt.ones(3))
    if name in ("item", "branch", "shape of values"):
        assert "cannot be captured" in str(caught[0].message)
        assert "test_compile.py" in str(caught[0].message)
    for i in range(4):
        x = vt.full((3,), i - 1.5)
        y = x.clone()
        a, b = compiled(x), function(y)
        for p, q in zip(*([a, b] if isinstance(a, tuple) else [[a], [b]])):
            assert p.tolist() == q.tolist()
        assert x.tolist() == y.tolist()
    assert "runs as it is" in compiled.report()
    with pytest.raises(CaptureError, match="fullgraph=True"):
        vt.compile(function, fullgraph=True)(vt.ones(3))


def test_state_in_python_runs_each_time() -> None:
    seen: list[Any] = []

    class Counting(vt.nn.Module):
        calls = 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return x * self.calls

    counting = vt.compile(Counting())
    with pytest.warns(UserWarning, match="runs as it is"):
        counting(vt.ones(1))
    first = counting.calls
    assert [counting(vt.ones(1)).item() for _ in range(3)] == [first + 1, first + 2, first + 3]

    def keeps(x: Any) -> Any:
        seen.append(x * 2)
        return x + 1

    kept = vt.compile(keeps)
    with pytest.warns(UserWarning, match="keeps tensors"):
        kept(vt.ones(1))
    seen.clear()
    for i in range(3):
        kept(vt.full((1,), float(i)))
    assert [s.item() for s in seen] == [0, 2, 4]


FACTOR: Any = 2.0


def test_names_outside_are_watched() -> None:
    global FACTOR
    shift = 1.0

    def scaled(x: Any) -> Any:
        return x * FACTOR

    def function(x: Any) -> Any:
        return scaled(x) + shift

    compiled = vt.compile(function)
    one = vt.ones(1)
    assert [compiled(one).item(), compiled(one).item()] == [3, 3]
    shift = 2.0
    assert [compiled(one).item(), compiled(one).item()] == [4, 4]
    FACTOR = 3.0
    try:
        assert compiled(one).item() == 5
    finally:
        FACTOR = 2.0
    assert compiled(one).item() == 4 and replays(compiled) == 6

    count = 0

    @vt.compile
    def counts(x: Any) -> Any:
        nonlocal count
        count += 1
        return x + 1

    with pytest.warns(UserWarning, match="changes the variable .count. around it"):
        counts(one)
    before = count
    counts(one), counts(one)
    assert count == before + 2

    class Holder:
        k = 1.0

        def __init__(self) -> None:
            self.k = 2.0

        def forward(self, x: Any) -> Any:
            return x * self.k

    holder = Holder()
    method = vt.compile(holder.forward)
    assert method(one).item() == 2
    holder.k = 5.0
    assert method(one).item() == 5


def test_an_error_is_the_functions() -> None:
    compiled = vt.compile(lambda x: x @ vt.ones(7, 7))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shape|size"):
            compiled(vt.ones(2, 3))


def test_a_function_that_never_can_is_left_alone() -> None:
    ran = 0

    @vt.compile(recompile_limit=3)
    def function(x: Any) -> Any:
        nonlocal ran
        ran += 1
        return x * x.sum().item()

    with pytest.warns(UserWarning, match="cannot be captured"):
        for n in range(1, 5):
            function(vt.ones(n))
    ran = 0
    for n in range(5, 9):
        assert function(vt.ones(n)).tolist() == [n] * n
    assert ran == 4
    with pytest.raises(CaptureError, match="fullgraph"):
        step = vt.compile(keeps_state, fullgraph=True)
        for _ in range(9):
            step(vt.ones(2))
    with pytest.raises(CaptureError, match="fullgraph"):
        for _ in range(9):
            step(vt.ones(2))


WEIGHT = vt.ones(2, requires_grad=True)
KEPT: list[Any] = []


def keeps_state(x: Any) -> Any:
    (WEIGHT * x).sum().backward()
    KEPT.append(x * 2)


def test_many_shapes() -> None:
    compiled = vt.compile(lambda x: x * 2 + 1, recompile_limit=3)
    with pytest.warns(UserWarning, match="3 times"):
        for n in range(1, 8):
            assert compiled(vt.ones(n)).tolist() == [3.0] * n
    assert replays(compiled) == 3


def test_as_a_method_and_a_decorator() -> None:
    class Scaled:
        def __init__(self, k: float) -> None:
            self.k = vt.tensor(k)

        @vt.compile
        def forward(self, x: Any) -> Any:
            return x * self.k

        @vt.compile(mode="reduce-overhead")
        def other(self, x: Any) -> Any:
            return x + self.k

    a, b = Scaled(2.0), Scaled(3.0)
    for _ in range(3):
        assert (a.forward(vt.ones(1)).item(), b.forward(vt.ones(1)).item()) == (2, 3)
        assert (a.other(vt.ones(1)).item(), b.other(vt.ones(1)).item()) == (3, 4)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    assert vt.compile(model, disable=True) is model
    assert vt.compile(model, backend="eager") is model
    monkeypatch.setenv("VT_COMPILE", "0")
    assert vt.compile(model) is model
    monkeypatch.delenv("VT_COMPILE")
    with pytest.raises(RuntimeError, match="Unrecognized mode"):
        vt.compile(model, mode="fast")
    with pytest.raises(RuntimeError, match="mode or options"):
        vt.compile(model, mode="default", options={"optimize": False})
    with pytest.raises(TypeError, match="unexpected keyword"):
        vt.compile(model, speed=2)  # pyright: ignore
    with pytest.raises(TypeError, match="module or a function"):
        vt.compile(3)  # pyright: ignore
    plain = vt.compile(
        lambda x: x * 2, options={"optimize": False}, dynamic=True, backend="inductor"
    )
    assert plain(vt.ones(2)).tolist() == [2, 2]


def test_inside_other_captures_and_checkpoints() -> None:
    from vibetensor.graphs import Graph, graph
    from vibetensor.torch.utils.checkpoint import checkpoint

    weight = vt.randn(3, 3, requires_grad=True)
    compiled = vt.compile(lambda x: F.relu(x @ weight))
    x = vt.randn(2, 3)
    g = Graph()
    with graph(g):
        out = compiled(x)
    g.replay()
    assert (out == F.relu(x @ weight)).all()
    for reentrant in (False, True):
        grads = []
        for function in (compiled, lambda x: F.relu(x @ weight)):
            weight.grad = None
            x = vt.ones(2, 3, requires_grad=True)
            checkpoint(function, x, use_reentrant=reentrant).sum().backward()
            grads.append((weight.grad.tolist(), x.grad.tolist()))
        assert grads[0] == grads[1]


def test_hooks_of_all_modules_that_are_gone() -> None:
    """They are called where modules run, so nothing is captured as long as there are some."""
    from vibetensor.torch.nn.modules.module import register_module_forward_hook

    names = []
    function = vt.compile(vt.nn.Linear(2, 2))
    handle = register_module_forward_hook(lambda module, args, out: names.append(type(module)))
    for _ in range(4):
        function(vt.ones(1, 2))
    assert names.count(vt.nn.Linear) == 4 and replays(function) == 0
    handle.remove()
    names.clear()
    for _ in range(4):
        function(vt.ones(1, 2))
    assert not names and replays(function) > 0
