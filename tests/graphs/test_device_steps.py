"""Captured steps on a device, where the host's numbers and memory are apart: what must reach each
replay, what must not, and what is refused. Runs with `--device`: a GPU, or the simulated device
(test_simulated_device.py)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.device import DEVICE
from vibetensor import _C
from vibetensor.graphs import capture, make_graphed_callables

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs --device: a GPU or simulated")


def host(*args: Any, **options: Any) -> Any:
    return vt.tensor(*args, device="cpu", **options)


def equal(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a.detach().cpu().numpy(), np.asarray(b))


def test_steps_become_one_graph() -> None:
    x = vt.ones(4)
    step = capture(lambda: (x * 2 + 1).exp())
    for _ in range(3):
        equal(step(), np.exp(np.full(4, 3, np.float32)))
    lowered = step.variants[0].lowered
    assert lowered.device == str(x.device) and lowered.program.on_device
    assert len(lowered.program.nodes()) == len(lowered.program) and min(lowered.program.nodes()) > 0


def test_numbers_of_the_host_are_read_at_each_replay() -> None:
    x, factor = vt.ones(4), host(2.0)
    step = capture(lambda: x * factor + 3)
    for value in (2.0, 2.0, -1.0, 0.5):
        factor.fill_(value)
        equal(step(), np.full(4, value + 3, np.float32))


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64, vt.float16, vt.bfloat16, vt.int64])
def test_numbers_of_the_host_count_as_in_eager(dtype: Any) -> None:
    """Promotion and rounding are those of a number in host memory."""
    values = [vt.tensor([0.1, -2.5, 3.0]), vt.tensor([1, 2, 3]), vt.tensor([0.3], dtype=vt.float16)]
    number = host(0.3).to(dtype)
    function = lambda: [v * number for v in values] + [v - number for v in values]  # noqa: E731
    step = capture(function)
    for value in (0.3, 0.3, 1.7, -5.0):
        number.fill_(value)
        for got, expected in zip(step(), function()):
            assert got.dtype == expected.dtype
            equal(got.double(), expected.double().cpu().numpy())


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64, vt.bfloat16, vt.int64, vt.bool])
def test_conditions_of_the_host_choose(dtype: Any) -> None:
    """As torch's `where` does: an element in host memory may stand for a tensor, the condition too."""
    x, y = (vt.tensor(v).to(dtype) for v in ([1, 0, 3], [[0, 1, -2], [5, 0, 0]]))
    threshold = host(1.0)
    function = lambda: (vt.where(threshold > 0, x, y), vt.where(threshold > 0, x, 1))  # noqa: E731
    step = capture(function)
    for value in (1.0, 1.0, -1.0, 2.0):
        threshold.fill_(value)
        chosen = x.expand(2, 3) if value > 0 else y
        for got, number in (step(), function()):
            assert got.dtype == dtype and got.device == x.device
            equal(got.double(), chosen.double().cpu().numpy())
            equal(number.double(), (x if value > 0 else vt.ones_like(x)).double().cpu().numpy())


def test_gradients_of_powers_whose_exponents_are_of_the_host() -> None:
    base = vt.tensor([2.0, 3.0], requires_grad=True)
    for exponent in (0.0, 1.0, 3.0):
        (gradient,) = vt.autograd.grad((base ** host(exponent)).sum(), base)
        equal(gradient, exponent * np.array([2.0, 3.0], np.float32) ** (exponent - 1))


def test_numbers_that_the_step_counts_on_the_host() -> None:
    """An op of the host between two of the device: each reads the count as it is there."""
    x, count = vt.ones(3), host(0.0)

    @capture
    def step() -> Any:
        count.add_(1)
        first = x * count
        count.add_(10)
        return first, x * count

    for i in range(6):
        first, second = step()
        equal(first, np.full(3, 11 * i + 1, np.float32))
        equal(second, np.full(3, 11 * i + 11, np.float32))
    assert count.item() == 66


def test_scratch_of_the_host() -> None:
    x, rate = vt.ones(3), host(0.5)
    step = capture(lambda: (x * (rate * 2 + 1), x + rate * rate))
    for value in (0.5, 0.5, 2.0):
        rate.fill_(value)
        product, total = step()
        equal(product, np.full(3, value * 2 + 1, np.float32))
        equal(total, np.full(3, 1 + value * value, np.float32))


@pytest.mark.parametrize("rows", [0, 1, 5, 3000, 30000])
def test_inputs_of_the_host_are_uploaded(rows: int) -> None:
    """Small ones and large ones, dense or not, and what the function does to its copy."""
    weight = vt.arange(4.0)

    @capture
    def step(x: Any, index: Any) -> Any:
        y = x.to(weight.device)
        y.mul_(2)
        return (y * weight).sum(1), weight[index.to(weight.device)]

    for i in range(6):
        x = np.arange(rows * 4, dtype=np.float64).reshape(4, rows).T + i
        index = np.array([3, i % 4])
        out, picked = step(vt.from_numpy(x), vt.from_numpy(index))
        equal(out, (x * 2 * np.arange(4.0)).sum(1))
        equal(picked, np.arange(4.0, dtype=np.float32)[index])
    assert len(step.variants) == 1 and step.variants[0].replays >= 4


def test_arrays_arrive_on_the_default_device() -> None:
    weight = vt.arange(3.0)
    step = capture(lambda x: x * weight)
    for i in range(4):
        equal(step(np.full(3, i, np.float32)), np.arange(3) * np.float32(i))


def test_host_data_made_inside_is_constant() -> None:
    x = vt.ones(3)

    @capture
    def step() -> Any:
        offsets = vt.tensor([1.0, 2.0, 3.0])
        offsets += 1
        return x * host([2.0, 4.0, 8.0]).to(x.device) + offsets + vt.tensor(0.5)

    for _ in range(5):
        equal(step(), np.array([4.5, 7.5, 12.5], np.float32))


def test_random_numbers_are_eager_ones() -> None:
    def function() -> Any:
        noise = vt.rand(7) + vt.randn(5)[0]
        return noise, vt.nn.functional.dropout(vt.ones(64), 0.5), vt.randint(0, 100, (9,))

    results = []
    for run in (function, capture(function)):
        vt.manual_seed(5)
        results.append([[t.double().cpu().numpy() for t in run()] for _ in range(6)])
    for mine, other in zip(*results):
        for a, b in zip(mine, other):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(results[1][4][1], results[1][5][1])


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}])
def test_two_steps_of_an_optimizer_in_one(options: dict[str, Any]) -> None:
    def train(wrap: Any) -> tuple[Any, Any]:
        vt.manual_seed(1)
        layer = vt.nn.Linear(3, 2)
        optimizer = vt.optim.AdamW(layer.parameters(), lr=0.1, **options)
        schedule = vt.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

        def function(x: Any) -> Any:
            for _ in range(2):
                optimizer.zero_grad()
                layer(x).square().mean().backward()
                optimizer.step()
                schedule.step()

        step = wrap(function)
        for i in range(8):
            step(vt.full((2, 3), float(i)))
        return layer, optimizer

    (a, first), (b, second) = train(lambda f: f), train(capture)
    for p, q in zip(a.parameters(), b.parameters()):
        equal(p, q.detach().cpu().numpy())
    states = zip(first.state.values(), second.state.values())
    assert all(int(s["step"]) == int(t["step"]) == 16 for s, t in states)


def test_results_are_memory_of_their_own() -> None:
    step = capture(lambda x: (x + 1, x[:2] * 2))
    kept = [step(vt.full((4,), float(i))) for i in range(8)]
    places = {t.data_ptr() for pair in kept for t in pair}
    assert len(places) == 16
    for i, (one, two) in enumerate(kept):
        equal(one, np.full(4, i + 1, np.float32))
        equal(two, np.full(2, 2 * i, np.float32))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: vt.zeros(3, device="cpu").copy_(x),
    ],
)
def test_copies_to_the_host_are_refused(read: Any) -> None:
    x = vt.ones(3)

    @capture
    def step() -> Any:
        y = x + 1
        return read(y)

    with pytest.raises(RuntimeError, match=r"to the CPU cannot be captured.*test_device_steps"):
        step()
    equal(x + 1, np.full(3, 2.0))
    again = capture(lambda: x + 1)
    for _ in range(3):
        equal(again(), np.full(3, 2.0))


def test_memory_that_moves_is_noticed() -> None:
    weight = vt.nn.Parameter(vt.ones(3))
    step = capture(lambda: weight * 2)
    for _ in range(3):
        step()
    weight.data = vt.full((3,), 5.0)
    for _ in range(3):
        equal(step(), np.full(3, 10.0))


def test_steps_of_one_pool_share_an_arena() -> None:
    device = str(vt.ones(1).device)
    handle = _C.graphs.Pool(device).handle
    assert handle != (0, 0) and handle != _C.graphs.Pool(device).handle
    pools = [_C.graphs.Pool(device, handle) for _ in range(2)]
    first = pools[0].arena(1000)
    assert first.nbytes >= 1000 and pools[1].arena(500).data_ptr() == first.data_ptr()
    assert pools[1].arena(5000).nbytes >= 5000
    x = vt.ones(100)
    steps = [
        capture(lambda: ((x * 2).exp() + (x * 3).sin()).sum(), pool=handle),
        capture(lambda: ((x * 4).exp() - (x * 5).cos()).sum(), pool=handle),
    ]
    expected = [step() for step in steps]
    for _ in range(4):
        for step, value in zip(steps, expected):
            equal(step(), value.cpu().numpy())


def test_steps_may_be_dropped_at_any_time() -> None:
    x = vt.ones(1 << 16)
    results = []
    for i in range(20):
        step = capture(lambda y, i=i: (y * x + i).sum())
        for _ in range(3):
            results.append((step(x), i))
        if i % 3 == 0:
            step.reset()
        del step
        if i % 5 == 0:
            gc.collect()
    for total, i in results:
        assert total.item() == (1 + i) * (1 << 16)


# --- a device that refuses


def simulated() -> Any:
    """The simulated device's library."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    library = next((line.split()[-1] for line in maps if "libvt_simulated_cuda" in line), None)
    if library is None:
        pytest.skip("needs --device simulated")
    return ctypes.CDLL(library)


@pytest.fixture
def refuse() -> Iterator[Any]:
    """refuse(n): the simulated device does not take over the n-th call of the next steps."""
    native = simulated()
    yield native.vt_simulated_refuse
    native.vt_simulated_refuse(-1)


def test_a_refused_op_is_named_with_its_line(refuse: Any) -> None:
    vt.manual_seed(3)
    x, steps = vt.ones(3), host(0.0)

    def function() -> Any:
        steps.add_(1)
        y = x * 2
        return y + vt.rand(3)  # this line

    step = capture(function)
    for call in range(3):
        refuse(call)
        with pytest.raises(RuntimeError, match="simulated refusal") as caught:
            step()
        assert re.search(r"recorded as: .*test_device_steps\.py:\d+", str(caught.value))
        assert not step.variants
    refuse(-1)
    vt.manual_seed(4)
    expected = [function().cpu().numpy() for _ in range(4)]
    vt.manual_seed(4)
    for value in expected:
        equal(step(), value)
    assert step.variants[0].replays == 3


def test_inputs_and_results_of_every_layout() -> None:
    """A graph fetches inputs that lie in one piece itself; others are copied before it."""
    weight = vt.randn(6, 5)

    def function(*inputs: Any) -> list[Any]:
        return [
            inputs[0] @ weight,
            inputs[1].t() + 1,
            inputs[2] * 2,
            inputs[3].sum(),
            inputs[0][1:],
        ]

    step = capture(function)
    base = vt.randn(40, 12)
    made: list[Any] = []
    for i in range(8):
        inputs = [
            base[i : i + 3, 3:9].clone(),
            base[2 * i : 2 * i + 4, ::2],  # with gaps
            vt.randn(6).expand(4, 6),
            vt.randn(3)[1:] if i % 2 else vt.randn(2),  # at another alignment
        ]
        made.append((step(*inputs), [x.clone() for x in function(*inputs)], inputs))
    assert step.variants[0].replays >= 5 and step.variants[0].native.count >= 4
    for found, expected, _ in made:  # later replays have not written over them
        for a, b in zip(found, expected):
            equal(a, b.cpu().numpy())


def test_addresses_of_a_call_that_failed_are_forgotten() -> None:
    """Its inputs are not those of the next run, whatever way that takes."""
    x = vt.ones(4)
    boom: list[int] = []

    optimizer = vt.optim.SGD([vt.nn.Parameter(vt.zeros(1))], lr=0.5)
    schedule = vt.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / 0 if boom else 1.0)

    def function(y: Any) -> Any:
        optimizer.step()
        schedule.step()
        return x + y

    step = capture(function)
    for i in range(4):
        equal(step(vt.full((4,), float(i))), np.full(4, 1 + i, np.float32))
    boom.append(1)
    with pytest.raises(ZeroDivisionError):
        step(vt.full((4,), 50.0))
    boom.clear()
    variant = step.variants[0]
    variant.inputs[0].copy_(vt.full((4,), 7.0))
    variant.lowered.program.join()
    variant.lowered.program.run()
    ((loan, how),) = variant.outputs
    loan.settle()
    equal(loan.tensor(*how), np.full(4, 8, np.float32))


def test_large_batches_of_the_host_are_brought_beside_the_graph() -> None:
    """Control blocks on both sides of what the graph takes by itself, one after another."""
    step = capture(lambda x: x.to(vt.get_default_device()).cumsum(0))
    for n in (3, 5000, 7, 300_000):
        for i in range(12):
            x = host(np.arange(n, dtype=np.float32) + i)
            equal(step(x)[:100], np.cumsum(x.numpy()[:100], dtype=np.float32))


def test_gelu_of_a_linear_layer() -> None:
    weight = vt.full((32, 16), 0.25).requires_grad_()
    x = vt.full((8, 16), 0.125)

    def step(x: Any) -> Any:
        weight.grad = None
        y = vt.nn.functional.gelu(vt.nn.functional.linear(x, weight))
        z = vt.nn.functional.gelu(y @ weight.detach())
        (y.sum() + z.sum()).backward()
        return y

    captured = capture(step)
    for _ in range(3):
        y = captured(x)
    grad = weight.grad.clone()
    assert vt.allclose(y.cpu(), step(x).cpu())
    assert vt.allclose(grad.cpu(), weight.grad.cpu())


def test_arrays_wrapped_inside_are_read_at_each_replay() -> None:
    """As in eager code and on the CPU: from_numpy shares the array's memory. Data that the function
    copies from the host (a list) is the same each time."""
    x, table, number = vt.ones(3), np.zeros(3, np.float32), np.zeros((), np.float32)

    @capture
    def step() -> Any:
        shared = vt.from_numpy(table).to(x.device)
        fixed = vt.tensor([1.0, 2.0, 3.0], device="cpu").to(x.device)
        return shared + fixed * x, x * vt.from_numpy(number)

    for i in range(5):
        table[:] = i
        number[...] = 10 * i
        total, product = step()
        equal(total, np.float32([1, 2, 3]) + i)
        equal(product, np.full(3, 10 * i, np.float32))
    assert step.variants[0].replays == 4


def test_graphs_wait_for_earlier_replays_before_rates_are_written() -> None:
    joins = simulated().vt_simulated_joins
    p = vt.nn.Parameter(vt.ones(2))
    rate = vt.tensor(0.5)
    optimizer = vt.optim.SGD([p], lr=rate)
    g = vt.Graph()
    with vt.graph(g):
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()
    for i in range(3):
        rate.fill_(i + 1.0)
        before = joins()
        g.replay()
        assert joins() == before + 1
    equal(p, np.full(2, 1.0 - 1 - 2 - 3, np.float32))


@pytest.mark.parametrize("named", [True, False])
def test_graphed_callables_share_a_pool(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named, or one of their own."""
    pool, made_pools = _C.graphs.Pool, []

    def made_pool(device: str, handle: Any) -> Any:
        made_pools.append(pool(device, handle))
        return made_pools[-1]

    monkeypatch.setattr(_C.graphs, "Pool", made_pool)
    handle = pool(str(vt.ones(1).device)).handle if named else None

    def steps(scale: float) -> list[Any]:
        return [lambda x: (x * scale).exp() * x, lambda x: (x + scale).sin() * x]

    samples = ((vt.ones(64, requires_grad=True),), (vt.ones(64, requires_grad=True),))
    made = make_graphed_callables(tuple(steps(2.0)), samples, pool=handle)
    for graphed, plain in zip(made, steps(2.0)):
        for i in range(3):
            x = vt.full((64,), 0.1 * i + 0.1, requires_grad=True)
            y = x.detach().clone().requires_grad_(True)
            graphed(x).sum().backward()
            plain(y).sum().backward()
            equal(x.grad, y.grad.cpu().numpy())
    assert len(made_pools) == 1 and (handle is None or made_pools[0].handle == handle)
