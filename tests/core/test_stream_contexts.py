"""`with stream:` on threads, over a backend that only notes which stream is current."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import vibetensor.torch as torch
from vibetensor.torch.cuda import _backend
from vibetensor.torch.cuda.streams import Stream


class NotingBackend(threading.local):
    """As the real one has it: each thread has its own current device and streams."""

    def __init__(self) -> None:
        self.device = 0
        self.streams = {0: 0, 1: 0}

    def current_device(self) -> int:
        return self.device

    def set_device(self, device: int) -> None:
        self.device = device

    def current_stream(self, device: int) -> int:
        return self.streams[device]

    def set_current_stream(self, device: int, handle: int) -> None:
        self.streams[device] = handle


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> NotingBackend:
    noting = NotingBackend()
    monkeypatch.setattr(_backend, "required", lambda: noting)
    return noting


def test_threads_leave_their_own_streams(backend: NotingBackend) -> None:
    first, second = Stream._of(0, 0x100), Stream._of(1, 0x200)
    turns = threading.Barrier(2)
    after: dict[str, Any] = {}

    def enter(name: str, stream: Stream, leaves_first: bool) -> None:
        if not leaves_first:
            turns.wait(10)  # the other is inside
        with stream:
            assert backend.streams[stream.device_index] == stream.cuda_stream
            assert backend.device == stream.device_index
            if leaves_first:
                turns.wait(10)
            turns.wait(10)  # both are inside; the one that entered first leaves first
            if not leaves_first:
                turns.wait(10)
        after[name] = (backend.device, dict(backend.streams))
        if leaves_first:
            turns.wait(10)

    threads = [
        threading.Thread(target=enter, args=("a", first, True)),
        threading.Thread(target=enter, args=("b", second, False)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert after == {"a": (0, {0: 0, 1: 0}), "b": (0, {0: 0, 1: 0})}


def test_streams_nest(backend: NotingBackend) -> None:
    first, second = Stream._of(0, 0x100), Stream._of(0, 0x200)
    with first:
        with second, first:
            assert backend.streams[0] == 0x100
        with torch.cuda.stream(second):
            assert backend.streams[0] == 0x200
        assert backend.streams[0] == 0x100
    assert backend.streams[0] == 0
