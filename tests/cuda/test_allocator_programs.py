"""Random programs on the device: allocations, frees, work, waits and pools on many streams.

Every allocation is filled on its stream with a number of its own and compared with it, on the
stream that has it, before it is freed. Memory that is handed out while other work may still use it
shows as a wrong number. `tests/cpp/test_cuda_allocator_fuzz.cpp` plays the same kind of programs on
the simulated device.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as torch

MiB = 1 << 20


@dataclass
class Live:
    tensor: Any
    value: int
    stream: Any
    reads_only: bool = False  # another stream reads it, and nothing waits for that


class Player:
    """One thread's part of a program. Its streams are its own, so that its waits order its work;
    some of its memory it hands over to the other players."""

    numbers = itertools.count(1)

    def __init__(self, seed: int, streams: int, boxes: list[queue.Queue[Any]], own: int) -> None:
        self.rng = random.Random(seed)
        self.boxes, self.own = boxes, own
        self.streams = [torch.cuda.Stream() for _ in range(streams)]
        self.wrong: dict[Any, Any] = {}  # a count on each stream
        self.load: dict[Any, Any] = {}
        for stream in self.streams:
            with torch.cuda.stream(stream):
                self.wrong[stream] = torch.zeros((), dtype=torch.int64, device="cuda")
                self.load[stream] = torch.zeros(8 * MiB, device="cuda")
        self.live: list[Live] = []
        self.pools: list[Any] = []
        self.routes: list[contextlib.AbstractContextManager[None]] = []
        self.pooled = torch.cuda.memory.get_allocator_backend() == "native"
        self.operations = 0
        self.error: BaseException | None = None

    def size(self) -> int:
        """Elements: mostly small, some of many megabytes."""
        kind = self.rng.randrange(32)
        if kind == 0:
            return self.rng.randrange(1, 6 * MiB)
        if kind < 4:
            return self.rng.randrange(1, MiB)
        return (128 << self.rng.randrange(13)) - self.rng.randrange(100)

    def allocate(self) -> None:
        stream, value = self.rng.choice(self.streams), next(self.numbers)
        with torch.cuda.stream(stream):
            tensor = torch.empty(self.size(), dtype=torch.int32, device="cuda").fill_(value)
        self.live.append(Live(tensor, value, stream))

    def compare(self, one: Live, stream: Any) -> None:
        with torch.cuda.stream(stream):
            self.wrong[stream] += (one.tensor != one.value).sum()

    def release(self) -> None:
        one = self.live.pop(self.rng.randrange(len(self.live)))
        self.compare(one, one.stream)

    def use(self) -> None:
        one = self.rng.choice(self.live)
        if one.reads_only:
            return self.compare(one, one.stream)
        one.value = next(self.numbers)
        with torch.cuda.stream(one.stream):
            one.tensor.fill_(one.value)

    def use_elsewhere(self) -> None:
        """Another stream works with it; the owner's stream may go on before that."""
        one, other = self.rng.choice(self.live), self.rng.choice(self.streams)
        if other == one.stream:
            return
        other.wait_stream(one.stream)
        write = not one.reads_only and self.rng.random() < 0.5
        if write:
            one.value = next(self.numbers)
            with torch.cuda.stream(other):
                one.tensor.fill_(one.value)
        else:
            self.compare(one, other)
        one.tensor.record_stream(other)
        if write or self.rng.random() < 0.5:
            one.stream.wait_stream(other)
        else:
            one.reads_only = True

    def hand_over(self) -> None:
        one = self.live.pop(self.rng.randrange(len(self.live)))
        to = (self.own + 1) % len(self.boxes)
        self.boxes[to].put((one.tensor, one.value, one.stream.record_event()))

    def take_over(self) -> None:
        try:
            tensor, value, event = self.boxes[self.own].get_nowait()
        except queue.Empty:
            return
        stream = self.rng.choice(self.streams)
        stream.wait_event(event)
        tensor.record_stream(stream)
        one = Live(tensor, value, stream, reads_only=True)
        self.compare(one, stream)
        self.live.append(one)

    def begin_route(self) -> None:
        if not self.pooled or len(self.routes) > 1:
            return
        if len(self.pools) < 2 or self.rng.random() < 0.3:
            self.pools.append(torch.cuda.MemPool())
        route = torch.cuda.use_mem_pool(self.rng.choice(self.pools))
        route.__enter__()
        self.routes.append(route)

    def end_route(self) -> None:
        if self.routes:
            self.routes.pop().__exit__(None, None, None)

    def step(self) -> None:
        self.operations += 1
        dice = self.rng.randrange(1000)
        if dice < 350 or not self.live:
            return self.allocate() if len(self.live) < 80 else self.release()
        if dice < 600:
            return self.release()
        if dice < 680:
            return self.use()
        if dice < 820:
            return self.use_elsewhere()
        if dice < 850:
            return self.hand_over()
        if dice < 890:
            return self.take_over()
        if dice < 950:  # work that holds a stream up
            stream = self.rng.choice(self.streams)
            with torch.cuda.stream(stream):
                for _ in range(self.rng.randrange(1, 12)):
                    self.load[stream] += 1
        elif dice < 960:
            self.rng.choice(self.streams).synchronize()
        elif dice < 975:
            self.begin_route()
        elif dice < 990:
            self.end_route()
        elif dice < 994:
            if self.pools:
                self.pools.pop(self.rng.randrange(len(self.pools)))
        elif dice < 996:
            torch.cuda.empty_cache()
        elif dice < 998:
            torch.cuda.memory_stats()
        elif self.pooled:
            torch.cuda.memory_snapshot()

    def play(self, operations: int) -> None:
        try:
            for _ in range(operations):
                self.step()
            while self.routes:
                self.end_route()
        except BaseException as error:
            self.error = error

    def finish(self) -> int:
        """Frees everything and returns how many elements were wrong."""
        while not self.boxes[self.own].empty():
            self.take_over()
        while self.live:
            self.release()
        self.pools.clear()
        torch.cuda.synchronize()
        wrong = sum(int(count.item()) for count in self.wrong.values())
        self.wrong.clear()
        self.load.clear()
        return wrong


def play(seed: int, operations: int, threads: int = 2, streams: int = 3) -> dict[str, Any]:
    """One program. Leaves the allocator as it was found."""
    start = time.perf_counter()
    before = torch.cuda.memory_allocated()
    boxes: list[queue.Queue[Any]] = [queue.Queue() for _ in range(threads)]
    players = [Player(seed * 1000 + n, streams, boxes, n) for n in range(threads)]
    running = [
        threading.Thread(target=player.play, args=(operations // threads,)) for player in players
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for player in players:
        if player.error is not None:
            raise player.error
    wrong = sum(player.finish() for player in players)
    done = sum(player.operations for player in players)
    from vibetensor import _cuda  # pyright: ignore

    stats = torch.cuda.memory_stats()
    return {
        "wrong": wrong,
        "operations": done,
        "seconds": time.perf_counter() - start,
        "left": torch.cuda.memory_allocated() - before,
        "inconsistent": _cuda.check_memory(0),
        "allocations": stats["allocation.all.allocated"],
    }


def check(result: dict[str, Any], operations: int) -> None:
    assert result["wrong"] == 0
    assert result["operations"] == operations
    assert result["left"] == 0
    assert result["inconsistent"] == ""
    assert result["allocations"] > operations // 2
    assert result["seconds"] < 30


@pytest.mark.parametrize("seed", [1, 2])
def test_no_allocation_is_corrupted(seed: int) -> None:
    check(play(seed, 60_000), 60_000)


@pytest.mark.usefixtures("history")
def test_no_allocation_is_corrupted_while_recorded() -> None:
    from vibetensor import _cuda  # pyright: ignore

    play(4, 100)  # makes segments, which remember who made them
    before = _cuda.captured_stacks()
    torch.cuda.memory._record_memory_history(max_entries=1000)
    check(play(4, 20_000), 20_000)
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    assert len(trace) == 1000
    assert all(event["frames"] for event in trace if event["action"] == "alloc")
    torch.cuda.memory._record_memory_history(None)
    torch.cuda.empty_cache()
    assert _cuda.captured_stacks() - before < 50  # those of segments that are left


@pytest.mark.parametrize(
    "settings",
    [
        "backend:async",
        "expandable_segments:false",
        "expandable_segments:false,max_split_size_mb:20,garbage_collection_threshold:0.02",
        "expandable_page_mb:2,roundup_power2_divisions:4",
    ],
)
def test_no_allocation_is_corrupted_with_settings(
    run_python: Callable[..., Any], settings: str
) -> None:
    done = run_python(
        Path(__file__).read_text(encoding="utf-8"), 3, 20_000, env={"VT_CUDA_ALLOC": settings}
    )
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), 20_000)


@pytest.mark.parametrize("told", [False, True])
def test_corruption_is_found(told: bool) -> None:
    """Memory freed under a stream that still reads it: the comparison tells, unless the allocator
    was told of the stream."""
    if torch.cuda.memory.get_allocator_backend() != "native":
        pytest.skip("which memory the driver hands out next is its own affair")
    owner, reader = torch.cuda.Stream(), torch.cuda.Stream()
    load = torch.zeros(64 * MiB, device="cuda")
    # Loading a kernel and mapping memory may wait for the device: not in the middle of what follows.
    for stream in (owner, reader):
        with torch.cuda.stream(stream):
            warm = [torch.empty(3 * MiB, dtype=torch.int32, device="cuda").fill_(1) for _ in "ab"]
            load += 1
            (warm[0] != 1).sum()
            del warm
    torch.cuda.synchronize()
    with torch.cuda.stream(owner):
        tensor = torch.empty(3 * MiB, dtype=torch.int32, device="cuda").fill_(1)
    reader.wait_stream(owner)
    with torch.cuda.stream(reader):
        for _ in range(50):  # some milliseconds
            load += 1
        wrong = (tensor != 1).sum()
    if told:
        tensor.record_stream(reader)
    address = tensor.data_ptr()
    del tensor
    with torch.cuda.stream(owner):
        other = torch.empty(3 * MiB, dtype=torch.int32, device="cuda").fill_(2)
    torch.cuda.synchronize()
    assert (other.data_ptr() == address) is not told
    assert wrong.item() == (0 if told else 3 * MiB)


if __name__ == "__main__":
    assert os.environ["VT_CUDA_ALLOC"]
    print(json.dumps(play(int(sys.argv[1]), int(sys.argv[2]))))
