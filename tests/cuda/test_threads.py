"""Python threads beside a device: what waits lets others run, and each has a stream of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as torch


def _busy(seconds: float) -> torch.Tensor:
    """Queues about that much work on the current stream and returns its result."""
    x = torch.full((4096, 4096), 1 / 4096, device="cuda")
    y = x @ x
    torch.cuda.synchronize()
    start = time.perf_counter()
    y = y @ x
    torch.cuda.synchronize()
    for _ in range(round(seconds / (time.perf_counter() - start)) + 1):
        y = y @ x
    return y


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda y: y[0, 0].item(),
    "cpu": lambda y: y.cpu(),
    "tolist": lambda y: y[0, :2].tolist(),
    "numpy": lambda y: y.numpy(force=True),
    "nonzero": lambda y: (y > 2).nonzero(),
    "masked": lambda y: y[y > 2],
    "bool": lambda y: bool((y > 2).any()),
    "device": lambda y: torch.cuda.synchronize(),
    "stream": lambda y: torch.cuda.current_stream().synchronize(),
    "to device": lambda y: y.copy_(torch.zeros(4096, 4096)),
    "empty_cache": lambda y: torch.cuda.empty_cache(),
}


def _wait(name: str, seconds: float) -> tuple[float, float, list[float]]:
    """Waits for about that much work; the start, the end, and when another thread ran from then on."""
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    y = _busy(seconds)
    if name == "empty_cache":  # waits where it has something to unmap that is still in use
        y = y.sum()
    event = torch.cuda.Event()
    event.record()
    ticker.start()
    try:
        start = time.perf_counter()
        (event.synchronize() if name == "event" else WAITS[name](y))
        end = time.perf_counter()
    finally:
        done.set()
        ticker.join()
    return start, end, ticks


@pytest.mark.parametrize("name", [*WAITS, "event"])
def test_other_threads_run_during_a_wait(name: str) -> None:
    if name in WAITS:  # the driver loads a kernel on its first launch, and may wait for that
        WAITS[name](torch.zeros(4096, 4096, device="cuda"))
    for seconds in (
        0.3,
        1.0,
        3.0,
    ):  # less where another process had the device while it was measured
        start, end, ticks = _wait(name, seconds)
        if end - start > 0.05:
            break
    if name == "empty_cache" and end - start < 0.05:
        return  # nothing to wait for
    assert end - start > 0.05
    during = [t for t in ticks if start <= t <= end]
    assert len(during) > 10
    gaps = [b - a for a, b in zip([start, *during], [*during, end])]
    assert max(gaps) < (end - start) / 3


def test_threads_with_streams_of_their_own() -> None:
    failures: list[BaseException] = []
    together = threading.Barrier(64)

    def work(seed: int) -> None:
        try:
            stream = torch.cuda.Stream()
            together.wait(60)
            with torch.cuda.stream(stream):
                assert torch.cuda.current_stream() == stream
                x = torch.full((257, 129), float(seed), device="cuda", requires_grad=True)
                for step in range(20):
                    size = 1 << (step % 12)
                    scratch = torch.full((size, 33), step, device="cuda")
                    y = (x * x).sum() + scratch.sum()
                    (grad,) = torch.autograd.grad(y, x)
                    expected = seed * seed * 257 * 129 + step * size * 33
                    assert abs(y.item() - expected) <= 1e-5 * expected
                    assert (grad == 2 * seed).all().item()
                    kept = torch.randn(1000, device="cuda")
                    assert (kept.cpu() == kept.cpu()).all().item()
                product = torch.full((64, 64), float(seed), device="cuda") @ torch.eye(64).cuda()
                assert (product == seed).all().item()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads), "threads are stuck"
    assert not failures, failures[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    from vibetensor import _cuda  # pyright: ignore

    torch.cuda.synchronize()
    assert _cuda.check_memory(0) == ""


def test_tensors_cross_threads_and_are_freed_there() -> None:
    """What one thread made on its stream is used and dropped by another."""
    box: list[torch.Tensor] = []
    side = torch.cuda.Stream()

    def make() -> None:
        with torch.cuda.stream(side):
            box.append(torch.full((1 << 20,), 3.0, device="cuda") * 2)

    for _ in range(10):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        torch.cuda.current_stream().wait_stream(side)
        x = box.pop()
        x.record_stream(torch.cuda.current_stream())
        y = x + 1
        del x
        assert (y == 7).all().item()
