"""Kernels that are launched again and again: each launch has its own operands, sizes and numbers,
whatever is still under way, from any thread and on any stream."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch

ROUNDS = 200  # the way of launching changes after a few


def _launch_graphs() -> int:
    from vibetensor import _cuda  # pyright: ignore

    return _cuda.launch_graphs()


def _expect_launch_graphs(count: int) -> None:
    """Threads that were joined may still be giving theirs back."""
    for _ in range(500):
        if _launch_graphs() == count:
            return
        time.sleep(0.01)
    assert _launch_graphs() == count


def _sums(seed: int, errors: list[str]) -> None:
    rng = np.random.default_rng(seed)
    kept, expected = [], []
    for i in range(ROUNDS):
        rows, columns = (int(n) for n in rng.integers(1, 70, 2))
        a, b = (rng.integers(-9, 9, (rows, columns)).astype(np.float32) for _ in range(2))
        x, y = torch.tensor(a).cuda(), torch.tensor(b).cuda()
        if i % 3 == 1:
            x, y, a, b = x.t(), y.t(), a.T, b.T
        kept += [x + y, x * i, (x - y).sum(0)]
        expected += [a + b, a * i, (a - b).sum(0)]
    for mine, other in zip(kept, expected):
        if not np.array_equal(mine.cpu().numpy(), other):
            errors.append(f"{seed}: {mine} is not {other}")


def _busy() -> torch.Tensor:
    """Work that keeps the default stream busy for some 10 ms."""
    busy = torch.full((8192, 8192), 1 / 8192, device="cuda")
    for _ in range(3):
        busy = busy @ busy
    return busy


def test_every_launch_has_operands_of_its_own() -> None:
    errors: list[str] = []
    _sums(0, errors)
    assert not errors
    assert _launch_graphs() > 0


def test_many_launches_before_the_first_is_done() -> None:
    total, part = torch.zeros(5, device="cuda"), torch.ones(5, device="cuda")
    for _ in range(100):
        total.add_(part)
    for _ in range(3):
        _busy()
        for i in range(3000):
            total.add_(part, alpha=i)
    assert total.tolist() == [100 + 3 * sum(range(3000))] * 5


def test_a_busy_device_is_not_waited_for() -> None:
    """Neither by the launch that makes a graph nor by the end of a thread, which gives it back."""
    x = torch.zeros(3, dtype=torch.int16, device="cuda")
    x.bitwise_xor_(5)
    _busy()
    torch.cuda.synchronize()
    seen = []

    def launch() -> None:
        for _ in range(ROUNDS):
            x.bitwise_xor_(5)
        seen.append(_launch_graphs())

    _busy()
    done = torch.cuda.Event()
    done.record()
    before = _launch_graphs()
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert not done.query()
    assert seen[0] > before
    _expect_launch_graphs(before)
    assert x.tolist() == [5] * 3


def test_kernels_in_turn() -> None:
    x = torch.zeros(1000, device="cuda")
    expected = np.zeros(1000, np.float32)
    ops: list[Callable[[Any, int], Any]] = [
        lambda t, i: t + i,
        lambda t, i: t * (1 - 2 * (i % 2)),
        lambda t, i: abs(t),
        lambda t, i: t - i // 2,
        lambda t, i: t / 2,
    ]
    for i in range(ROUNDS):
        for op in ops:
            x, expected = op(x, i), op(expected, i).astype(np.float32)
    np.testing.assert_array_equal(x.cpu().numpy(), expected)


def test_shared_memory_grows_and_shrinks() -> None:
    """One kernel asks for more shared memory than it was first launched with, and for less."""
    rng = np.random.default_rng(0)
    for classes in [100] * 60 + [20000, 50304, 70, 12000, 31999, 100] * 3:
        logits = torch.tensor(rng.standard_normal((4, classes)).astype(np.float32))
        target = torch.tensor(rng.integers(0, classes, 4))
        results = []
        for device in ("cpu", "cuda"):
            x = logits.to(device, copy=True).requires_grad_()
            loss = torch.nn.functional.cross_entropy(x, target.to(device))
            loss.backward()
            results.append((loss.item(), x.grad.cpu().numpy()))
        assert abs(results[0][0] - results[1][0]) < 1e-5
        np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-5, atol=1e-7)


def test_events_and_other_streams_see_the_launches_before_them() -> None:
    side = torch.cuda.Stream()
    x = torch.zeros(1 << 20, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(1, ROUNDS + 1):
        if i % 50 == 0:
            _busy()
        start.record()
        x.add_(1)
        end.record()
        with torch.cuda.stream(side):
            side.wait_event(end)
            seen = x.clone()
        torch.cuda.current_stream().wait_stream(side)
        if i % 20 == 0:
            end.synchronize()
            assert 0 < start.elapsed_time(end) < 100
            assert (seen == i).all().item()


def test_streams_stay_ordered() -> None:
    side = torch.cuda.Stream()
    x = torch.zeros(1 << 20, device="cuda")
    for i in range(100):
        x.add_(1)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.mul_(2).sub_(i + 1)
        torch.cuda.current_stream().wait_stream(side)
    expected = np.float32(0)
    for i in range(100):
        expected = np.float32(np.float32(np.float32(expected + 1) * 2) - np.float32(i + 1))
    assert (x == float(expected)).all().item()


def test_threads_launch_the_same_kernels() -> None:
    errors: list[str] = []
    before = _launch_graphs()

    def on_a_stream(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream() if seed % 2 else torch.cuda.default_stream()):
            _sums(seed, errors)

    threads = [threading.Thread(target=on_a_stream, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    _expect_launch_graphs(before)


def test_a_step_is_captured_meanwhile() -> None:
    """A captured step of this thread, with the same kernels, while another launches them."""
    errors: list[str] = []
    stop = threading.Event()

    def launch() -> None:
        while not stop.is_set():
            _sums(3, errors)

    @torch.compile
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x + y) * 3 - y).sum(0)

    thread = threading.Thread(target=launch)
    thread.start()
    try:
        for i in range(40):
            x, y = (torch.full((9 + i // 10, 5), float(v), device="cuda") for v in (i, 2))
            eager = x + y
            assert step(x, y).tolist() == [((i + 2) * 3 - 2) * (9.0 + i // 10)] * 5
            assert (eager == i + 2).all().item()
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_another_library_captures_and_works_on_the_default_stream() -> None:
    cupy = pytest.importorskip("cupy")
    x = torch.zeros(1 << 16, device="cuda")
    theirs = cupy.from_dlpack(x)
    with cupy.cuda.Stream.null:
        for i in range(ROUNDS):
            x.add_(1)
            cupy.multiply(theirs, 2, out=theirs)
            x.sub_(i)
            cupy.subtract(theirs, 1, out=theirs)
            x.clamp_(-100, 100)
    expected = 0.0
    for i in range(ROUNDS):
        expected = min(max((expected + 1) * 2 - i - 1, -100.0), 100.0)
    assert (x == expected).all().item()
    side = cupy.cuda.Stream(non_blocking=True)
    other = cupy.zeros(8, dtype=cupy.float32)
    cupy.add(other, 1, out=other)
    cupy.cuda.Device().synchronize()
    y = torch.zeros(3, dtype=torch.float64, device="cuda")
    with side:
        side.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        cupy.add(other, 1, out=other)
        for _ in range(ROUNDS):
            y.add_(1)  # makes a graph of its own, and is launched
        graph = side.end_capture()
    assert y.tolist() == [ROUNDS] * 3
    for _ in range(3):
        graph.launch(side)
    side.synchronize()
    assert other.tolist() == [4.0] * 8
    assert y.tolist() == [ROUNDS] * 3


PROGRAM = """
import hashlib
import vibetensor.torch as torch
from vibetensor import _cuda
F = torch.nn.functional
torch.manual_seed(0)
digest = hashlib.sha256()
def keep(*tensors):
    for t in tensors:
        digest.update(t.detach().cpu().numpy().tobytes())
for dtype in (torch.float32, torch.bfloat16):
    w = torch.randn(96, 64, dtype=torch.float32, device="cuda", requires_grad=True)
    for i in range(120):
        x = torch.randn(1 + i % 13, 64, device="cuda")
        y = F.layer_norm(F.gelu(F.linear(x, w)), (96,)).to(dtype)
        z = F.softmax(y[:, i % 5 :], -1) * (i + 1) + y.mean()
        z.float().square().sum().backward()
        if i % 30 == 29:
            keep(x, y.float(), z.float(), w.grad, x.cumsum(0), x.sort(1)[0], x.argmax(1))
            w.grad = None
print(digest.hexdigest(), _cuda.launch_graphs() > 0)
"""


def test_results_are_those_of_ordinary_launches(run_python: Callable[..., Any]) -> None:
    outcomes = [
        run_python(PROGRAM, env={**os.environ, "VT_CUDA_LAUNCH_GRAPHS": value}).stdout.split()
        for value in "10"
    ]
    assert outcomes[0][0] == outcomes[1][0]
    assert [ran[1] for ran in outcomes] == ["True", "False"]


def test_a_kernel_that_stops_is_named(run_python: Callable[..., Any]) -> None:
    done = run_python(
        "import vibetensor.torch as torch\n"
        "x = torch.zeros(3, 4).cuda()\n"
        "for i in range(100):\n"
        "    y = x[torch.tensor([i % 3]).cuda()] + 1\n"
        "torch.cuda.synchronize()\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        for i in range(100):\n"
        "            y = x[torch.tensor([7]).cuda()] + 1\n"
        "    except RuntimeError as error:\n"
        "        print(str(error).splitlines()[0])\n"
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("index: index 7 is out of bounds for a dimension of size 3" in s for s in lines)
