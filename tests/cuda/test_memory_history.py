"""Recorded history and snapshots: every place is told, in the format of PyTorch's viewer."""

from __future__ import annotations

import gc
import pickle
import pickletools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as torch
from vibetensor.torch.cuda import memory

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
    with pytest.raises(ValueError, match="negative"):
        memory._record_memory_history(max_entries=-1)


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


# --- the capture itself, which needs no device


@pytest.mark.cpu_only
@pytest.mark.parametrize("gil", [True, False])
def test_stack_is_that_of_the_caller(gil: bool) -> None:
    _cuda = pytest.importorskip("vibetensor._cuda")

    def inner() -> list[dict[str, Any]]:
        return _cuda.python_stack(gil=gil)

    def recurse(n: int) -> list[dict[str, Any]]:
        return recurse(n - 1) if n else inner()

    frames = recurse(2)
    assert [f["name"] for f in frames[:5]] == [
        "inner", "recurse", "recurse", "recurse", "test_stack_is_that_of_the_caller"
    ]  # fmt: skip
    assert frames[0]["line"] == line_of(inner) and frames[1]["line"] == line_of(recurse)
    assert Path(frames[0]["filename"]).name == Path(__file__).name
    assert frames[2] is frames[3]  # one object a place
    assert len(recurse(400)) == 256

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(inner()))
    thread.start()
    thread.join()
    assert [f["name"] for f in found[:3]] == ["inner", "<lambda>", "run"]


@pytest.mark.cpu_only
def test_capture_of_a_free_never_waits() -> None:
    _cuda = pytest.importorskip("vibetensor._cuda")
    assert _cuda.python_stack(wait=False)[0]["name"] == "test_capture_of_a_free_never_waits"
    assert _cuda.python_stack(gil=False, wait=False) == []


@pytest.mark.cpu_only
def test_captured_code_is_let_go() -> None:
    _cuda = pytest.importorskip("vibetensor._cuda")
    before = _cuda.captured_stacks()
    space: dict[str, Any] = {"stack": _cuda.python_stack}
    code = compile("def f():\n    return stack()\nf()", "made on the fly", "exec")
    exec(code, space)
    assert _cuda.captured_stacks() == before  # nobody kept the frames' stack
    held = sys.getrefcount(code)
    for _ in range(100):
        exec(code, space)
    assert _cuda.captured_stacks() == before and sys.getrefcount(code) == held


@pytest.mark.cpu_only
def test_threads_capture_at_once() -> None:
    _cuda = pytest.importorskip("vibetensor._cuda")
    wrong: list[str] = []

    def worker(n: int) -> None:
        for i in range(500):
            frames = _cuda.python_stack(gil=(i + n) % 2 == 0)
            if frames[0]["name"] != "worker":
                wrong.append(frames[0]["name"])

    threads = [threading.Thread(target=worker, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
