"""What the allocator shows, and pools, limits and callbacks, through the public API."""

from __future__ import annotations

import gc
import pickle
import pickletools
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as torch
from vibetensor.torch.cuda import memory
from vibetensor.torch.cuda.memory_table import memory_table, size_text

MiB = 1 << 20
native = pytest.mark.skipif(
    memory.get_allocator_backend() != "native", reason="needs the native allocator"
)
records = pytest.mark.usefixtures("history")


def events(action: str, address: int | None = None) -> list[dict[str, Any]]:
    trace = memory._snapshot()["device_traces"][torch.cuda.current_device()]
    return [e for e in trace if e["action"] == action and (address is None or e["addr"] == address)]


def names(record: dict[str, Any]) -> list[str]:
    return [frame["name"] for frame in record["frames"]]


def block_of(tensor: Any, snapshot: dict[str, Any]) -> dict[str, Any]:
    address = tensor.data_ptr()
    (block,) = [b for s in snapshot["segments"] for b in s["blocks"] if b["address"] == address]
    return block


def make(n: int = 1000) -> Any:
    return torch.empty(n, device="cuda")


def line_of(function: Callable[..., Any]) -> int:
    return function.__code__.co_firstlineno + 1


# --- history and snapshots


@native
@records
def test_snapshot_tells_where_live_memory_comes_from(check_snapshot: Any) -> None:
    memory._record_memory_history()
    tensor = make()
    snapshot = memory._snapshot()
    check_snapshot(snapshot)
    block = block_of(tensor, snapshot)
    assert block["state"] == "active_allocated"
    assert (block["size"], block["requested_size"]) == (4096, 4000)
    place = block["frames"][0]
    assert (place["name"], place["line"]) == ("make", line_of(make))
    assert Path(place["filename"]).name == Path(__file__).name
    assert names(block)[1] == "test_snapshot_tells_where_live_memory_comes_from"
    assert snapshot["allocator_settings"]["backend"] == "native"
    alloc = events("alloc", tensor.data_ptr())[-1]
    assert alloc["size"] == 4096 and alloc["frames"] == block["frames"]
    assert torch.cuda.memory_snapshot()[0].keys() == snapshot["segments"][0].keys()


@records
@pytest.mark.parametrize("context", [None, "state", "alloc", "all"])
def test_context_says_which_stacks_are_kept(context: str | None) -> None:
    def drop(box: list[Any]) -> None:
        box.clear()

    memory._record_memory_history(context=context, clear_history=True)
    kept, gone = make(), make(77777)
    address = gone.data_ptr()
    box = [gone]
    del gone
    drop(box)
    allocs, requested = events("alloc", address), events("free_requested", address)
    completed = events("free_completed", address)
    assert len(allocs) == len(requested) == len(completed) == 1
    in_events = context in ("alloc", "all")
    assert names(allocs[0])[:1] == (["make"] if in_events else [])
    freed = names(requested[0])[:1]
    assert freed == (["drop"] if context == "all" else ["make"] if in_events else [])
    if memory.get_allocator_backend() == "native":
        block = block_of(kept, memory._snapshot())
        assert names(block)[:1] == ([] if context is None else ["make"])


@native
@records
def test_state_keeps_no_events() -> None:
    memory._record_memory_history("state")
    tensor = make()
    snapshot = memory._snapshot()
    assert snapshot["device_traces"][0] == []
    assert names(block_of(tensor, snapshot))[0] == "make"


@records
def test_stacks_of_work_without_the_gil() -> None:
    """Long ops and backward let go of the GIL; their allocations still know their lines."""
    x = torch.ones(1 << 16, device="cuda", requires_grad=True)
    loss = (x * 2).exp().sum()
    memory._record_memory_history(clear_history=True)

    def add() -> Any:
        return x.detach() + 1

    def run_backward() -> None:
        loss.backward()

    added = add()
    assert names(events("alloc", added.data_ptr())[0])[0] == "add"
    run_backward()
    grads = events("alloc", x.grad.data_ptr())
    assert "run_backward" in names(grads[-1])


@records
def test_threads_record_their_own_stacks() -> None:
    memory._record_memory_history(clear_history=True)
    stop = threading.Event()
    addresses: dict[int, int] = {}

    def worker(n: int) -> None:
        keep = make(5000 + n)
        for i in range(300):
            y = torch.ones(30_000 + i, device="cuda") + 1  # lets go of the GIL
            del y
        addresses[keep.data_ptr()] = n
        stop.wait(60)

    threads = [threading.Thread(target=worker, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while len(addresses) < 4:
        memory._snapshot()
        assert all(t.is_alive() for t in threads)
    for address in addresses:
        assert names(events("alloc", address)[-1])[:2] == ["make", "worker"]
    stop.set()
    for thread in threads:
        thread.join()


@records
def test_stacks_go_with_the_last_who_needs_them() -> None:
    from vibetensor import _cuda  # pyright: ignore

    first = make()  # makes the segment that serves the rest
    torch.cuda.synchronize()
    gc.collect()
    memory._record_memory_history(None)
    assert memory._snapshot()["device_traces"][0] == []
    before = _cuda.captured_stacks()
    memory._record_memory_history(max_entries=20)
    for _ in range(50):
        make()
        for _ in range(2):
            make()
    assert 2 <= _cuda.captured_stacks() - before <= 12
    code = compile("keep = empty(10, device='cuda')", "made on the fly", "exec")
    space = {"empty": torch.empty}
    exec(code, space)
    held = sys.getrefcount(code)
    assert _cuda.captured_stacks() > before
    memory._record_memory_history(None)
    del space
    gc.collect()
    assert _cuda.captured_stacks() == before
    assert sys.getrefcount(code) < held
    del first


@records
def test_ring_keeps_the_newest_events() -> None:
    memory._record_memory_history(max_entries=5, clear_history=True)
    for n in range(10):
        make(100_000 + n)
    trace = memory._snapshot()["device_traces"][0]
    assert len(trace) == 5
    assert [e["action"] for e in trace][-1] == "snapshot"
    memory._record_memory_history(max_entries=3)  # goes on
    assert len(memory._snapshot()["device_traces"][0]) == 3
    memory._record_memory_history(
        clear_history=True, skip_actions=["free_requested", "snapshot", "segment_map"]
    )
    make()
    assert {e["action"] for e in memory._snapshot()["device_traces"][0]} == {
        "alloc",
        "free_completed",
    }


def test_recording_is_refused_with_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match="enabled"):
        memory._record_memory_history("some")
    with pytest.raises(RuntimeError, match="context"):
        memory._record_memory_history(context="free")
    with pytest.raises(RuntimeError, match="stacks"):
        memory._record_memory_history(stacks="c++")
    with pytest.raises(ValueError, match="unknown action 'frees'"):
        memory._record_memory_history(skip_actions=["frees"])


@records
def test_pending_memory_is_seen(check_snapshot: Any) -> None:
    memory._record_memory_history(clear_history=True)
    side, load = torch.cuda.Stream(), torch.zeros(64 * MiB, device="cuda")
    x = torch.ones(MiB, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(50):
            load += 1
        x.sum()
    x.record_stream(side)
    address = x.data_ptr()
    del x
    snapshot = memory._snapshot()
    check_snapshot(snapshot)
    if memory.get_allocator_backend() == "native":
        states = {b["address"]: b["state"] for s in snapshot["segments"] for b in s["blocks"]}
        assert states[address] == "active_pending_free"
        assert events("free_completed", address) == []
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # looks at what is pending
    assert len(events("free_completed", address)) == 1


@records
def test_dump_is_plain_and_drawn(tmp_path: Path, check_snapshot: Any) -> None:
    from vibetensor.train.cli import main

    memory._record_memory_history(clear_history=True)
    kept = [make(n * 1000) for n in range(1, 20)]
    del kept[::2]
    path = tmp_path / "snapshot.pickle"
    memory._dump_snapshot(path)
    codes = list(pickletools.genops(path.read_bytes()))
    assert max(code.proto for code, _, _ in codes) <= 4
    assert not {"GLOBAL", "STACK_GLOBAL", "REDUCE"} & {code.name for code, _, _ in codes}
    with open(path, "rb") as file:
        snapshot = pickle.load(file)
    check_snapshot(snapshot)
    assert main(["viz", "memory", str(path)]) == 0
    page = (tmp_path / "snapshot.html").read_text()
    assert Path(__file__).name in page and ":make" not in page
    memory.snapshot_html(tmp_path / "now.html", title="now")
    assert "<title>now</title>" in (tmp_path / "now.html").read_text()


@native
@records
@pytest.mark.torch
def test_pytorch_viewer_reads_a_real_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    viewer = pytest.importorskip("torch.cuda._memory_viz")
    memory._record_memory_history(clear_history=True)
    before = memory._snapshot()
    kept = [make(n * 100_000) for n in range(1, 30)]
    del kept[::3]
    snapshot = memory._snapshot()
    assert f"segments: {len(snapshot['segments'])}" in viewer.segsum(snapshot)
    assert "TOTAL MEM" in viewer.trace(snapshot)
    assert ":make" in viewer.memory(snapshot, format_flamegraph=str)
    assert ":make" in viewer.segments(snapshot, format_flamegraph=str)
    compared = viewer.compare(before["segments"], snapshot["segments"], format_flamegraph=str)
    assert isinstance(compared, str) and "only_after" in capsys.readouterr().out
    assert "MemoryViz" in viewer.trace_plot(snapshot)
    assert "MemoryViz" in viewer.segment_plot(snapshot)


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


@records
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
    assert names(event)[0] == "make"


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


# --- pools


def pools_in_use() -> set[tuple[int, int]]:
    return {row["pool"] for row in torch.cuda.pool_stats()}


@native
def test_pool_is_filled_by_its_block_and_thread() -> None:
    pool, outer = torch.cuda.MemPool(), torch.cuda.MemPool()
    assert pool.id != outer.id and pool.id[0] > 0 and pool.id[1] == 0
    assert pool.use_count() == 1 and pool.snapshot() == []
    found: list[Any] = []
    with torch.cuda.use_mem_pool(outer):
        first = make(5000)
        with torch.cuda.use_mem_pool(pool):
            assert pool.use_count() == 2
            inside = make(100_000)
            thread = threading.Thread(target=lambda: found.append(make(3000)))
            thread.start()
            thread.join()
        second = make(6000)
    outside = make(7000)

    def owner(tensor: Any) -> tuple[int, int]:
        address = tensor.data_ptr()
        for segment in torch.cuda.memory_snapshot():
            if any(b["address"] == address for b in segment["blocks"]):
                return segment["segment_pool_id"]
        raise AssertionError("not in any segment")

    assert owner(inside) == pool.id and owner(first) == owner(second) == outer.id
    assert owner(found[0]) == owner(outside) == (0, 0)
    assert {s["segment_pool_id"] for s in pool.snapshot()} == {pool.id}
    assert pool.use_count() == 1
    stats = torch.cuda.memory_stats()
    name = f"pool.{pool.id[0]}_{pool.id[1]}"
    assert stats[f"{name}.allocated_bytes"] == 400_384 and stats[f"{name}.use_count"] == 1
    assert stats[f"{name}.blocks"] == 1
    assert f"{pool.id}" in torch.cuda.memory_summary()
    nested = torch.cuda.memory_stats_as_nested_dict()
    assert nested["allocated_bytes"]["all"]["current"] == torch.cuda.memory_allocated()


@native
def test_pool_keeps_its_memory_and_tensors_outlive_it() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        kept, gone = torch.full((MiB,), 5.0, device="cuda"), make(20 * MiB)
    del gone
    torch.cuda.empty_cache()  # somebody holds the pool
    (row,) = [r for r in torch.cuda.pool_stats() if r["pool"] == pool.id]
    assert row["cached"] >= 80 * MiB and row["allocated"] == 4 * MiB
    name = pool.id
    del pool
    gc.collect()
    torch.cuda.empty_cache()
    (row,) = [r for r in torch.cuda.pool_stats() if r["pool"] == name]
    assert row["use_count"] == 0 and row["cached"] < 16 * MiB
    assert (kept == 5).all().item()
    del kept
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert name not in pools_in_use()


@native
def test_handles_share_memory() -> None:
    handle = torch.cuda.graph_pool_handle()
    assert handle[0] == 0 and handle != torch.cuda.graph_pool_handle()
    with torch.cuda.use_mem_pool(handle):
        address = make(MiB).data_ptr()
    with torch.cuda.use_mem_pool(handle):
        assert make(MiB).data_ptr() == address
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool.id):
        make(MiB)
    assert pool.id in pools_in_use() and handle in pools_in_use()
    with pytest.raises(RuntimeError), torch.cuda.use_mem_pool(pool):
        raise RuntimeError("the block ends all the same")
    assert pool.use_count() == 1


@native
def test_pools_are_refused_with_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="expected a MemPool"), torch.cuda.use_mem_pool("x"):
        pass
    with pytest.raises(ValueError, match="default pool"), torch.cuda.use_mem_pool((0, 0)):
        pass
    with pytest.raises(NotImplementedError, match="no_split"):
        torch.cuda.MemPool(no_split=True)
    with pytest.raises(ValueError, match="negative"):
        memory._record_memory_history(max_entries=-1)


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
    """This file again, with VT_CUDA_ALLOC=backend:async."""
    if memory.get_allocator_backend() != "native":
        pytest.skip("this is that run")
    root = Path(__file__).parents[2]
    done = run_python(
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
        "-q", "-p", "no:cacheprovider", "--rootdir", root, "-c", root / "pyproject.toml", __file__,
        env={"VT_CUDA_ALLOC": "backend:async", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
