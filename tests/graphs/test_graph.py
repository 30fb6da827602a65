"""Graphs in torch's manner: what a block does, replayed; what it leaves alone; what is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from vibetensor import _C
from vibetensor.graphs import Graph, graph, graph_pool_handle
from vibetensor.torch.random import _set_states as set_random_states
from vibetensor.torch.random import _states as random_states


class Training:
    """A model with dropout and running statistics, an optimizer, a schedule."""

    def __init__(self, make: Callable[[Any], Any] | None = None, scaler: bool = False) -> None:
        vt.manual_seed(5)
        self.model = vt.nn.Sequential(
            vt.nn.Linear(6, 8), vt.nn.Dropout(0.2), vt.nn.BatchNorm1d(8), vt.nn.Linear(8, 3)
        )
        self.optimizer = (make or (lambda p: vt.optim.AdamW(p, lr=1e-2)))(self.model.parameters())
        self.schedule = vt.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=8)
        self.scaler = vt.amp.GradScaler(kind(), init_scale=8.0, growth_interval=2, enabled=scaler)

    def step(self, x: Any, y: Any, schedule: bool = True) -> Any:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if schedule:
            self.schedule.step()
        return loss

    def state(self) -> list[Any]:
        tensors = [*self.model.state_dict().values(), *(p.grad for p in self.model.parameters())]
        for state in self.optimizer.state.values():
            tensors += [v for v in state.values() if isinstance(v, vt.Tensor)]
        numbers = [self.schedule.state_dict(), self.optimizer.param_groups[0]["lr"]]
        numbers += [self.scaler.state_dict(), len(self.optimizer.state)]
        values = [None if t is None else t.detach().numpy().tobytes() for t in tensors]
        return [*values, *numbers, random_states()]


def batch(index: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(index)
    x = vt.tensor(rng.standard_normal((5, 6)).astype(np.float32))
    return x, vt.tensor(rng.integers(0, 3, 5))


OPTIMIZERS = {
    "adamw": lambda p: vt.optim.AdamW(p, lr=1e-2),
    "adam plain": lambda p: vt.optim.Adam(p, lr=1e-2, foreach=False, amsgrad=True),
    "adam rate in a tensor": lambda p: vt.optim.Adam(p, lr=vt.tensor(1e-2)),
    "sgd momentum": lambda p: vt.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd plain": lambda p: vt.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=False),
}


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("warmups", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replays_are_eager_steps(name: str, warmups: int, optimize: bool) -> None:
    eager, captured = Training(OPTIMIZERS[name]), Training(OPTIMIZERS[name])
    x, y = batch(0)
    for training in (eager, captured):
        vt.manual_seed(1)
        for i in range(warmups):
            training.step(*batch(50 + i))
    before = random_states()
    g = Graph(optimize=optimize)
    captured.optimizer.zero_grad(set_to_none=True)
    with graph(g):
        loss = captured.step(x, y)
    assert random_states() == before
    losses = []
    for run in range(2):
        set_random_states(before)
        for i in range(6):
            if run == 0:
                losses.append(eager.step(*batch(i)).item())
            else:
                x.copy_(batch(i)[0]), y.copy_(batch(i)[1])
                g.replay()
                assert loss.item() == losses[i], i
        if run == 0:
            expected = eager.state()
    assert captured.state() == expected


def test_torchs_ritual() -> None:
    """The example of torch's documentation: warm-up, one graph for the whole step."""
    vt.manual_seed(0)
    model = vt.nn.Sequential(vt.nn.Linear(4, 5), vt.nn.ReLU(), vt.nn.Linear(5, 2))
    optimizer = vt.optim.SGD(model.parameters(), lr=0.1)
    static_input, static_target = vt.randn(3, 4), vt.randn(3, 2)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(model(static_input), static_target)
        loss.backward()
        optimizer.step()
    g = Graph()
    optimizer.zero_grad(set_to_none=True)
    weights = [p.detach().clone() for p in model.parameters()]
    with vt.graph(g):
        static_loss = F.mse_loss(model(static_input), static_target)
        static_loss.backward()
        optimizer.step()
    assert all((p == w).all() for p, w in zip(model.parameters(), weights))
    losses = []
    for _ in range(20):
        g.replay()
        losses.append(static_loss.item())
    assert losses[-1] < 0.5 * losses[0] and losses[0] == pytest.approx(
        F.mse_loss(_linear(weights, static_input), static_target).item(), abs=1e-6
    )
    assert all(p.grad is not None for p in model.parameters())


def _linear(w: list[Any], x: Any) -> Any:
    return F.linear(F.relu(F.linear(x, w[0], w[1])), w[2], w[3])


def test_forward_and_backward_inside_and_the_step_outside() -> None:
    eager, captured = Training(), Training()
    x, y = batch(0)
    g = Graph()
    captured.optimizer.zero_grad(set_to_none=True)
    with graph(g):
        loss = F.cross_entropy(captured.model(x), y)
        loss.backward()
    grads = [p.grad for p in captured.model.parameters()]
    for i in range(4):
        vt.manual_seed(i)
        eager.optimizer.zero_grad()
        F.cross_entropy(eager.model(batch(i)[0]), batch(i)[1]).backward()
        eager.optimizer.step()
        vt.manual_seed(i)
        x.copy_(batch(i)[0]), y.copy_(batch(i)[1])
        if i == 2:
            captured.optimizer.zero_grad(set_to_none=True)  # a replay sets them again
        g.replay()
        assert all(p.grad is kept for p, kept in zip(captured.model.parameters(), grads))
        captured.optimizer.step()
    assert captured.state() == eager.state()


def test_gradients_that_are_added_to() -> None:
    weight = vt.ones(3, requires_grad=True)
    weight.grad = vt.zeros(3)
    x = vt.ones(3)
    g = Graph()
    with graph(g):
        (weight * x).sum().backward()
    assert weight.grad.tolist() == [0, 0, 0]
    g.replay()
    x.fill_(2)
    g.replay()
    assert weight.grad.tolist() == [3, 3, 3]
    weight.grad.zero_()
    g.replay()
    assert weight.grad.tolist() == [2, 2, 2]
    weight.grad = None
    with pytest.raises(RuntimeError, match=r"adds to the \.grad"):
        g.replay()


def test_a_rate_set_by_hand_and_a_schedule_outside() -> None:
    eager, captured = Training(), Training()
    x, y = batch(0)
    g = Graph()
    with graph(g):
        captured.step(x, y, schedule=False)
    for i in range(6):
        vt.manual_seed(i)
        eager.step(*batch(i), schedule=False)
        vt.manual_seed(i)
        x.copy_(batch(i)[0]), y.copy_(batch(i)[1])
        g.replay()
        for training in (eager, captured):
            if i % 2:
                training.schedule.step()
            else:
                training.optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
    assert captured.state() == eager.state()


def test_results_are_static() -> None:
    x = vt.arange(4.0)
    g = Graph()
    with graph(g):
        double = x * 2
        part = double[1:3]
        total = (double + 1).sum()
    place = double.data_ptr()
    for i in range(3):
        x.fill_(i)
        g.replay()
        assert double.data_ptr() == place
        assert (double.tolist(), part.tolist()) == ([2.0 * i] * 4, [2.0 * i] * 2)
        assert total.item() == 4 * (2 * i + 1)
    del double, part
    x.fill_(5)
    g.replay()
    assert total.item() == 44


def test_a_backward_through_results_that_were_overwritten_is_refused() -> None:
    x, scale = vt.ones(3), vt.ones(3, requires_grad=True)
    p = vt.nn.Parameter(vt.ones(3))
    g = Graph()
    with graph(g):
        p.grad = None
        out = x * 2
        (p * x).sum().backward()
    g.replay()
    for held in (lambda: out, lambda: p.grad):
        loss = (held() * scale).sum()
        version = held()._version
        loss.backward(retain_graph=True)
        g.replay()
        assert held()._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inputs_live_as_long_as_the_graph() -> None:
    def make() -> tuple[Graph, Any]:
        x = vt.full((1000,), 3.0)
        g = Graph()
        with graph(g):
            out = x + 1
        return g, out

    g, out = make()
    rubbish = [vt.full((1000,), 9.0) for _ in range(20)]
    g.replay()
    assert (out == 4).all() and len(rubbish) == 20


# --- failure leaves everything as before

BODY: list[Callable[[dict[str, Any]], None]] = [
    lambda s: s["t"].optimizer.zero_grad(set_to_none=True),
    lambda s: s.update(h=s["t"].model(s["x"])),
    lambda s: s.update(loss=F.cross_entropy(s["h"], s["y"])),
    lambda s: s["t"].scaler.scale(s["loss"]).backward(),
    lambda s: s["t"].scaler.unscale_(s["t"].optimizer),
    lambda s: vt.nn.utils.clip_grad_norm_(s["t"].model.parameters(), 1.0),
    lambda s: s["t"].scaler.step(s["t"].optimizer),
    lambda s: s["t"].scaler.update(),
    lambda s: s["t"].schedule.step(),
    lambda s: s.update(noise=vt.rand(3)),
    lambda s: s["x"].mul_(2),
]


class Failure(Exception):
    pass


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("at", range(len(BODY) + 1))
def test_failure_after_every_line(at: int, warm: bool) -> None:
    training = Training(lambda p: vt.optim.SGD(p, lr=1e-2, momentum=0.9), scaler=True)
    x, y = batch(0)
    if warm:
        training.step(x, y)
    grads = [p.grad for p in training.model.parameters()]
    before = [training.state(), x.tolist(), training.scaler._scale is None]
    g = Graph()
    state = {"t": training, "x": x, "y": y}
    with pytest.raises(Failure), graph(g):
        for line in BODY[:at]:
            line(state)
        raise Failure
    assert [training.state(), x.tolist(), training.scaler._scale is None] == before
    assert all(p.grad is kept for p, kept in zip(training.model.parameters(), grads))
    assert _C.graphs.recording() is None
    # The graph and the process go on.
    state.clear()
    with graph(g):
        loss = training.step(x, y)
    now = training.state()
    assert [now[-3], now[-1], x.tolist()] == [before[0][-3], before[0][-1], before[1]]
    g.replay()
    assert math.isfinite(loss.item())


def fail_at(op: int) -> Any:
    """Raises in place of one op; backward's and the optimizer's are counted too."""
    left = op

    def call(original: Callable[[], Any], name: str, args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Failure
        return original()

    return vt.library.Mode(call)


@pytest.mark.parametrize("name", ["adam plain", "sgd momentum"])
def test_failure_at_every_op(name: str) -> None:
    training = Training(OPTIMIZERS[name], scaler=True)
    x, y = batch(0)
    before = [training.state(), x.tolist()]
    g = Graph()
    for at in range(1000):
        grads = [p.grad for p in training.model.parameters()]
        try:
            with graph(g), fail_at(at):
                training.step(x, y)
        except Failure:
            assert [training.state(), x.tolist()] == before, at
            assert all(p.grad is kept for p, kept in zip(training.model.parameters(), grads))
        else:
            break
    assert 50 < at < 1000
    eager = Training(OPTIMIZERS[name], scaler=True)
    random = random_states()
    g.replay()
    set_random_states(random)
    eager.step(x, y)
    assert training.state() == eager.state()


def test_a_host_read_at_every_layer() -> None:
    """In forward and in backward: refused there, and nothing has changed."""
    training = Training()
    x, y = batch(0)
    training.step(x, y)
    refused = 0
    probe = vt.zeros(())
    count, stop = 0, -1

    class Observer(vt.nn.Module):
        def forward(self, value: Any) -> Any:
            nonlocal count
            count += 1
            if count == stop:
                probe.item()
            return value

    parts: list[vt.nn.Module] = []
    for layer in training.model:
        parts += [Observer(), layer]
    model = vt.nn.Sequential(*parts, Observer())
    for p in model.parameters():
        p.register_hook(lambda grad: model[0](grad))
    training.model = model
    before = training.state()
    for stop in range(1, 100):
        count = 0
        g = Graph()
        try:
            with graph(g):
                training.step(x, y)
        except RuntimeError as error:
            assert "cannot be captured" in str(error)
            refused += 1
            assert training.state() == before, stop
        else:
            break
    assert refused >= 8


# --- what is refused


def test_misuse_is_named() -> None:
    g = Graph()
    for call in (g.replay, g.pool, g.tape, g.report):
        with pytest.raises(RuntimeError, match="without a preceding successful capture"):
            call()
    with pytest.raises(RuntimeError, match="without a capture_begin"):
        g.capture_end()
    x = vt.ones(2)
    with graph(g):
        x * 2
    with pytest.raises(RuntimeError, match="already owns a captured graph"), graph(g):
        pass
    other = Graph()
    with pytest.raises(RuntimeError, match="do not nest"), graph(other), graph(Graph()):
        pass
    with pytest.raises(RuntimeError, match="do not nest"), graph(other):
        g.replay()
    loose = graph(other, capture_error_mode="loose")
    with pytest.raises(RuntimeError, match="Unknown capture error mode"), loose:
        pass
    with pytest.raises(RuntimeError, match="during the capture"), graph(other):
        other.reset()
    with pytest.raises(TypeError, match="takes a Graph"):
        graph(3)  # pyright: ignore
    with pytest.raises(TypeError, match="pool is a handle"), graph(other, pool="a"):
        pass
    with graph(other, pool=graph_pool_handle()):
        out = x * 3
    other.replay()
    assert out.tolist() == [3, 3]
    third = Graph()
    with graph(third, pool=other.pool()):
        x * 2
    assert third.pool() == other.pool()
    other.reset()
    with pytest.raises(RuntimeError, match="without a preceding"):
        other.replay()
    with graph(other):
        out = x * 4
    other.replay()
    assert out.tolist() == [4, 4]


def test_host_reads_are_refused_by_line() -> None:
    x = vt.ones(2)
    line = r"item.*cannot be captured.*test_graph\.py"
    with pytest.raises(RuntimeError, match=line), graph(Graph()):
        (x * 2).sum().item()
    with pytest.raises(RuntimeError, match="cannot be captured"), graph(Graph()):
        vt.nonzero(x)


def moved_data(x: Any, w: Any) -> None:
    w.data = vt.full((3,), 7.0)


def moved_set(x: Any, w: Any) -> None:
    x.set_(vt.full((3,), 7.0))


def moved_resize(x: Any, w: Any) -> None:
    x.resize_(4000)


def moved_frozen(x: Any, w: Any) -> None:
    w.requires_grad_(False)


@pytest.mark.parametrize("move", [moved_data, moved_set, moved_resize, moved_frozen])
def test_static_tensors_must_stay(move: Callable[[Any, Any], None]) -> None:
    x, w = vt.ones(3), vt.ones(3, requires_grad=True)
    g = Graph()
    with graph(g):
        out = (x * w).sum()
        out.backward()
    g.replay()
    assert out.item() == 3
    if move is moved_set and not hasattr(x, "set_"):
        pytest.skip("tensors have no set_")
    move(x, w)
    with pytest.raises(RuntimeError, match=r"a tensor of \(3,\) .* changed its"):
        g.replay()


def test_optimizer_state_that_was_loaded() -> None:
    training = Training()
    x, y = batch(0)
    training.step(x, y)
    g = Graph()
    with graph(g):
        training.step(x, y)
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    with pytest.raises(RuntimeError, match="state dict loaded"):
        g.replay()


def test_state_made_inside_is_refused() -> None:
    class Averaged(vt.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            with vt.no_grad():
                for p in self.param_groups[0]["params"]:
                    if "mean" not in self.state[p]:
                        self.state[p]["mean"] = vt.zeros_like(p)
                    self.state[p]["mean"].lerp_(p.grad, 0.5)
                    p.sub_(self.state[p]["mean"])

    p = vt.nn.Parameter(vt.ones(2))
    optimizer = Averaged([p], {})

    def step() -> None:
        optimizer.zero_grad()
        (p * p).sum().backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match="warm-up"), graph(Graph()):
        step()
    optimizer.state.clear()
    step()
    g = Graph()
    with graph(g):
        step()
    q = vt.nn.Parameter(vt.ones(2))
    other = Averaged([q], {})
    for i in range(3):
        other.zero_grad()
        (q * q).sum().backward()
        other.step()
        if i:
            g.replay()
    assert p.tolist() == q.tolist()
    with pytest.raises(RuntimeError, match="dampening"), graph(Graph()):
        (p * p).sum().backward()
        vt.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.1).step()


def test_threads_do_not_disturb_a_capture() -> None:
    x = vt.ones(100)
    g = Graph()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            (vt.ones(10) * 2).sum().item()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with graph(g):
            out = x
            for _ in range(200):
                out = out + 1
    finally:
        stop.set()
        thread.join()
    assert len([op for op in g.tape().ops if not op.is_view]) == 200
    g.replay()
    assert (out == 201).all()


# --- names and looks


def test_torchs_names() -> None:
    assert vt.Graph is Graph and vt.graph is graph
    assert issubclass(vt.cuda.CUDAGraph, Graph) and issubclass(vt.cuda.graph, graph)
    assert vt.cuda.is_current_stream_capturing() is False
    with graph(Graph()):
        assert vt.cuda.is_current_stream_capturing() is True
    if not vt.cuda.is_available():
        for make in (vt.cuda.CUDAGraph, lambda: vt.cuda.graph(Graph())):
            with pytest.raises(RuntimeError, match="CUDA"):
                make()


def test_debug_dump(tmp_path: Path) -> None:
    x = vt.ones(2)
    g = Graph()
    g.enable_debug_mode()
    with graph(g):
        out = (x * 2).exp()
    g.debug_dump(tmp_path / "graph.txt")
    text = (tmp_path / "graph.txt").read_text()
    assert text.startswith("digraph") and "mul" in text and "exp" in text
    assert "test_graph.py" in str(g.tape())
    assert "2 ops of 2" in g.report()
    g.replay()
    assert len(g.profile().ops) == 2
    g.report_html(tmp_path / "graph.html")
    assert "<html" in (tmp_path / "graph.html").read_text()
    assert "1 replay" in g.report() and out.tolist() == pytest.approx([math.e**2] * 2)


def test_autocast_inside() -> None:
    model = vt.nn.Linear(4, 4)
    x = vt.randn(2, 4)
    with vt.autocast(kind(), dtype=vt.bfloat16):
        expected = model(x)
    g = Graph()
    with graph(g), vt.autocast(kind(), dtype=vt.bfloat16):
        out = model(x)
    g.replay()
    assert out.dtype == vt.bfloat16 and (out == expected).all()
