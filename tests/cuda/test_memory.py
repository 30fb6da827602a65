"""Limits, callbacks and statistics of device memory, through the public API."""

from __future__ import annotations

import gc
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as torch
from vibetensor.torch.cuda import memory
from vibetensor.torch.cuda.memory_table import memory_table, size_text

MiB = 1 << 20


def events(action: str) -> list[dict[str, Any]]:
    trace = memory._snapshot()["device_traces"][torch.cuda.current_device()]
    return [event for event in trace if event["action"] == action]


def make(n: int = 1000) -> Any:
    return torch.empty(n, device="cuda")


# --- out of memory


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """limit(n): n bytes more than what is held now may be held, until the test ends."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    yield lambda nbytes: memory.set_memory_limit(torch.cuda.memory_reserved() + nbytes)
    memory.set_memory_limit(None)
    memory.set_out_of_memory_callback(None)


@pytest.mark.usefixtures("history")
def test_out_of_memory_is_recorded_and_observed(limit: Callable[[int], None]) -> None:
    memory._record_memory_history(clear_history=True)
    seen: list[tuple[int, ...]] = []
    active = True

    def observe(*arguments: int) -> None:
        if active:
            seen.append(arguments)
            assert events("oom") != []  # a snapshot may be taken here

    memory._attach_out_of_memory_observer(observe)
    limit(32 * MiB)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        make(64 * MiB)
    active = False
    (event,) = events("oom")
    device, wanted, total, free = seen[0]
    assert (device, wanted, event["size"]) == (0, 256 * MiB, 256 * MiB)
    assert event["device_free"] == free <= total == torch.cuda.mem_get_info()[1]
    assert event["frames"][0]["name"] == "make"


def test_callback_may_free_memory(limit: Callable[[int], None]) -> None:
    limit(64 * MiB)
    cache = [make(8 * MiB)]  # half of it
    calls = []

    def free(device: int, wanted: int) -> bool:
        calls.append((device, wanted))
        torch.cuda.synchronize()
        if not cache:
            return False
        cache.clear()
        return True

    memory.set_out_of_memory_callback(free)
    kept = make(12 * MiB)
    assert calls == [(0, 48 * MiB)] and cache == []
    with pytest.raises(torch.cuda.OutOfMemoryError):
        make(12 * MiB)
    assert len(calls) == 2
    del kept


def test_callback_that_raises_is_reported(
    limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: reported.append(one.exc_value))
    limit(32 * MiB)
    memory.set_out_of_memory_callback(lambda device, wanted: 1 // 0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        make(64 * MiB)
    assert [type(e) for e in reported] == [ZeroDivisionError]
    reported.clear()
    with pytest.raises(TypeError, match="callable"):
        memory.set_out_of_memory_callback(3)


def test_limits(limit: Callable[[int], None]) -> None:
    limit(16 * MiB)
    make(2 * MiB)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="memory limit is"):
        make(16 * MiB)
    memory.set_memory_limit(None)
    make(16 * MiB)
    torch.cuda.set_per_process_memory_fraction(0.5)
    assert torch.cuda.get_per_process_memory_fraction() == 0.5
    torch.cuda.set_per_process_memory_fraction(1.0)
    with pytest.raises(ValueError, match="below 0"):
        memory.set_memory_limit(-1)


# --- memory without a tensor, statistics


def test_memory_without_a_tensor() -> None:
    before = torch.cuda.memory_allocated()
    side = torch.cuda.Stream()
    first = torch.cuda.caching_allocator_alloc(1000)
    second = torch.cuda.caching_allocator_alloc(5 * MiB, stream=side)
    assert first % 512 == 0 and torch.cuda.memory_allocated() - before == 1024 + 5 * MiB
    torch.cuda.caching_allocator_delete(second)
    again = torch.cuda.caching_allocator_alloc(5 * MiB, "cuda", side.cuda_stream)
    if memory.get_allocator_backend() == "native":
        assert again == second  # of that stream: reused at once
    torch.cuda.caching_allocator_delete(again)
    with pytest.raises(RuntimeError, match="was not returned by"):
        torch.cuda.caching_allocator_delete(first + 512)
    torch.cuda.caching_allocator_delete(first)
    with pytest.raises(RuntimeError, match="has been deleted"):
        torch.cuda.caching_allocator_delete(first)
    with pytest.raises(TypeError, match="Invalid type for stream"):
        torch.cuda.caching_allocator_alloc(10, stream="main")
    assert torch.cuda.caching_allocator_alloc(0) == 0
    torch.cuda.caching_allocator_delete(0)


def test_page_locked_memory_is_counted() -> None:
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_accumulated_host_memory_stats()
    torch.cuda.reset_peak_host_memory_stats()
    before = torch.cuda.host_memory_stats()
    size = 7 * MiB
    block = 7 * MiB
    pinned = torch.empty(size, dtype=torch.uint8).pin_memory()
    stats = torch.cuda.host_memory_stats()

    def grown(name: str) -> int:
        return stats[name] - before[name]

    assert grown("active_requests.current") == 1 and grown("active_bytes.current") == block
    assert grown("allocations.allocated") == grown("num_host_alloc") == 1
    assert stats["host_alloc_time.count"] == 1
    assert stats["host_alloc_time.avg"] == stats["host_alloc_time.max"] > 0
    del pinned
    stats = torch.cuda.host_memory_stats()
    assert grown("active_requests.current") == 0 and grown("active_bytes.freed") == block
    assert grown("allocated_bytes.current") == block  # kept for reuse
    assert stats["active_bytes.peak"] >= block
    torch.cuda.empty_cache()
    stats = torch.cuda.host_memory_stats()
    assert grown("allocated_bytes.current") == 0 and grown("num_host_free") == 1
    nested = memory.host_memory_stats_as_nested_dict()
    assert nested["host_free_time"]["count"] == stats["host_free_time.count"]


def test_summary_shows_the_counters() -> None:
    kept = make(50 * MiB)
    text = torch.cuda.memory_summary()
    lines = text.splitlines()
    assert {len(line) for line in lines} == {77}
    (row,) = [line for line in lines if line.startswith("| Allocated memory ")]
    assert row.split("|")[2].strip() == size_text(torch.cuda.memory_allocated()).strip()
    assert "default, 0" in text and len(torch.cuda.memory_summary(abbreviated=True)) < len(text)
    del kept


def test_processes_are_listed() -> None:
    make()
    lines = torch.cuda.list_gpu_processes().splitlines()
    assert lines[0] == "GPU:0" and len(lines) >= 2
    if lines[1] != "no processes are running":  # a container may hide them
        assert all(
            re.fullmatch(r"process +\d+ uses .*(MB|unknown) GPU memory", n) for n in lines[1:]
        )


@pytest.mark.cpu_only
@pytest.mark.torch
@pytest.mark.parametrize("abbreviated", [False, True])
def test_summary_has_the_form_of_torch(abbreviated: bool, monkeypatch: Any) -> None:
    real = pytest.importorskip("torch.cuda.memory")
    rng = random.Random(1)
    stats = {"num_ooms": 3, "num_alloc_retries": 12}
    by_kind = ["allocated_bytes", "active_bytes", "requested_bytes", "reserved_bytes",
               "inactive_split_bytes", "allocation", "active", "segment",
               "inactive_split"]  # fmt: skip
    keys = [f"{name}.{kind}" for name in by_kind for kind in ("all", "small_pool", "large_pool")]
    for key in [*keys, "oversize_allocations", "oversize_segments"]:
        for column in ("current", "peak", "allocated", "freed"):
            stats[f"{key}.{column}"] = rng.randrange(1 << rng.randrange(1, 45))
    monkeypatch.setattr(real, "_get_device_index", lambda *args, **named: 0)
    monkeypatch.setattr(real, "memory_stats", lambda device: stats)
    theirs = real.memory_summary(0, abbreviated).splitlines()
    ours = memory_table(stats, [], 0, abbreviated).splitlines()
    assert ours[2:] == theirs[2:]


# --- the driver's allocator


def test_driver_allocator_refuses_by_name_what_it_has_not(run_python: Callable[..., Any]) -> None:
    done = run_python(
        """
import vibetensor.torch as torch
from vibetensor.torch.cuda import memory
assert memory.get_allocator_backend() == "cudaMallocAsync"
memory._record_memory_history()
x = torch.ones(1000, device="cuda") + 1
assert x.sum().item() == 2000
assert memory.memory_allocated() >= 4096 and memory.memory_stats()["num_device_alloc"] > 0
snapshot = memory._snapshot()
assert snapshot["segments"] == [] and snapshot["device_traces"][0][0]["action"] == "alloc"
for call in (torch.cuda.memory_snapshot, torch.cuda.MemPool,
             torch.cuda.use_mem_pool(torch.cuda.graph_pool_handle()).__enter__):
    try:
        call()
    except NotImplementedError as error:
        assert "backend:async" in str(error), error
    else:
        raise AssertionError(call)
print("done")
""",
        env={"VT_CUDA_ALLOC": "backend:async"},
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr


def test_memory_behaves_with_the_driver_allocator(run_python: Callable[..., Any]) -> None:
    """These tests again, with VT_CUDA_ALLOC=backend:async."""
    if memory.get_allocator_backend() != "native":
        pytest.skip("this is that run")
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    done = run_python(
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
        "-q", "-p", "no:cacheprovider", "--rootdir", root, "-c", root / "pyproject.toml",
        here / "test_memory.py", here / "test_memory_history.py",
        env={
            "VT_CUDA_ALLOC": "backend:async",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",  # may hold options of those plugins
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
