"""make_graphed_callables: forwards and backwards that replay inside ordinary training."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import random_state, set_random_state
from vibetensor.graphs import CaptureError, Graph, graph, make_graphed_callables


def parts() -> tuple[vt.nn.Module, vt.nn.Module]:
    vt.manual_seed(2)
    first = vt.nn.Sequential(vt.nn.Linear(4, 8), vt.nn.Dropout(0.3), vt.nn.BatchNorm1d(8))
    return first, vt.nn.Sequential(vt.nn.ReLU(), vt.nn.Linear(8, 3))


def batch(index: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(index)
    x = vt.tensor(rng.standard_normal((5, 4)).astype(np.float32))
    return x, vt.tensor(rng.integers(0, 3, 5))


def train(graphed: bool) -> tuple[list[Any], int]:
    first, second = parts()

    def loss_of(logits: Any, y: Any) -> Any:
        return F.cross_entropy(logits, y)

    loss = loss_of
    modules = vt.nn.ModuleList([first, second])
    before = [v.tolist() for v in modules.state_dict().values()] + random_state().tolist()
    if graphed:
        x, y = batch(99)
        h, logits = vt.randn(5, 8, requires_grad=True), vt.randn(5, 3, requires_grad=True)
        set_random_state(_random())
        before = [v.tolist() for v in modules.state_dict().values()] + random_state().tolist()
        first_, second_, loss = make_graphed_callables(
            (first, second, loss_of), ((x,), (h,), (logits, y))
        )
        assert first_ is first and second_ is second
    assert before == [v.tolist() for v in modules.state_dict().values()] + (random_state().tolist())
    optimizer = vt.optim.SGD(modules.parameters(), lr=0.1, momentum=0.9)
    vt.manual_seed(8)
    seen: list[Any] = []
    for i in range(8):
        x, y = batch(i)
        optimizer.zero_grad(set_to_none=True)
        h = first(x)
        if i % 2:
            h = h * 2  # data-dependent work between the graphs
        value = loss(second(h), y)
        value.backward()
        optimizer.step()
        seen.append(value.item())
        if i == 4:
            modules.eval()
            with vt.no_grad():
                seen.append(second(first(batch(50)[0][:3])).tolist())
            modules.train()
    seen += [v.tolist() for v in modules.state_dict().values()]
    return seen, len(seen)


def _random() -> Any:
    vt.manual_seed(77)
    return random_state()


def test_training_is_eager_training() -> None:
    assert train(True) == train(False)


def test_one_function_and_its_arguments() -> None:
    def function(x: Any, pair: dict[str, Any]) -> Any:
        return {"sum": x + pair["a"] * pair["b"], "e": x.exp()}

    x, a, b = (vt.randn(3, requires_grad=r) for r in (True, False, True))
    graphed = make_graphed_callables(function, (x, {"a": a, "b": b}))
    for _ in range(3):
        args = [vt.randn(3, requires_grad=r) for r in (True, False, True)]
        seen = []
        for f in (graphed, function):
            out = f(args[0], {"a": args[1], "b": args[2]})
            (out["sum"] * out["e"]).sum().backward()
            seen.append([out["sum"].tolist(), out["e"].tolist()])
            seen[-1] += [args[i].grad.tolist() for i in (0, 2)]
            args[0].grad = args[2].grad = None
        assert seen[0] == seen[1]
    with pytest.raises(ValueError, match="captured for other arguments"):
        graphed(vt.randn(4, requires_grad=True), {"a": a, "b": b})
    with vt.no_grad():
        assert not graphed(x, {"a": a, "b": b})["sum"].requires_grad


def test_unused_inputs() -> None:
    def function(x: Any, y: Any) -> Any:
        return x * 2

    args = tuple(vt.randn(3, requires_grad=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        make_graphed_callables(function, args)
    graphed = make_graphed_callables(function, args, allow_unused_input=True)
    graphed(*args).sum().backward()
    assert args[0].grad.tolist() == [2, 2, 2] and args[1].grad is None


def test_two_forwards_before_a_backward() -> None:
    model, other = (vt.nn.Linear(4, 2) for _ in range(2))
    other.load_state_dict(model.state_dict())
    make_graphed_callables(model, (vt.randn(5, 4),))
    for net in (model, other):
        sum(net(batch(i)[0]).pow(2).sum() for i in range(3)).backward()
    assert model.weight.grad.tolist() == other.weight.grad.tolist()


def test_weights_that_are_moved_are_captured_again() -> None:
    model = vt.nn.Linear(4, 2)
    plain = copy.deepcopy(model)
    make_graphed_callables(model, (vt.randn(5, 4),))
    x, _ = batch(0)
    for net in (model, plain):
        net.weight.data = net.weight.data * 2
    assert (model(x) == plain(x)).all()
    for net in (model, plain):
        net.weight = vt.nn.Parameter(vt.ones(2, 4))
    assert (model(x) == plain(x)).all()
    model(x).sum().backward()
    assert model.weight.grad is not None
    calls: list[int] = []
    model.register_forward_hook(lambda *args: calls.append(1))
    assert (model(x) == plain(x)).all() and calls == [1]


def test_what_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"item.*cannot be captured"):
        make_graphed_callables(lambda x: x * x.sum().item(), (vt.ones(3),))
    with pytest.raises(CaptureError, match="it changes an argument"):
        make_graphed_callables(lambda x: x.mul_(2) + 1, (vt.ones(3),))
    with pytest.raises(CaptureError, match="capture the whole step"):
        w = vt.ones(3, requires_grad=True)
        make_graphed_callables(lambda x: (x * w).sum().backward(), (vt.ones(3),))
    assert w.grad is None
    with pytest.raises(TypeError, match="must be tensors"):
        make_graphed_callables(lambda x, k: x * k, (vt.ones(3), 2))
    with pytest.raises(ValueError, match="2 callables and 1"):
        make_graphed_callables((vt.exp, vt.exp), ((vt.ones(3),),))
    hooked = vt.nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="must not have hooks"):
        make_graphed_callables(hooked, (vt.ones(2),))
    trained = vt.nn.Linear(2, 2)
    trained.register_buffer("b", vt.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="only parameters may be trainable"):
        make_graphed_callables(trained, (vt.ones(2),))
    with pytest.raises(RuntimeError, match="do not nest"), graph(Graph()):
        make_graphed_callables(vt.exp, (vt.ones(2),))


def test_torchs_name() -> None:
    if vt.cuda.is_available():
        pytest.skip("names what is missing without a device")
    with pytest.raises(RuntimeError, match="CUDA"):
        vt.cuda.make_graphed_callables(vt.exp, (vt.ones(2),))
