"""Tests that need a GPU; without one they are skipped by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this folder's tests where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents and "cpu_only" not in item.keywords:
            item.add_marker(skip)


# The format that PyTorch's memory viewer reads, as its documentation and source tell.
_INT, _STR, _PAIR = int, str, tuple
_SEGMENT = {"device": _INT, "address": _INT, "total_size": _INT, "allocated_size": _INT,
            "active_size": _INT, "requested_size": _INT, "stream": _INT, "segment_type": _STR,
            "segment_pool_id": _PAIR, "is_expandable": bool, "frames": list,
            "blocks": list}  # fmt: skip
_BLOCK = {"address": _INT, "size": _INT, "requested_size": _INT, "state": _STR, "frames": list}
_EVENT = {"size": _INT, "stream": _INT, "time_us": _INT, "frames": list, "action": _STR,
          "pool_id": _PAIR}  # fmt: skip
_FRAME = {"filename": _STR, "line": _INT, "name": _STR}
_STATES = {"active_allocated", "active_pending_free", "inactive"}
_ACTIONS = {"alloc", "free_requested", "free_completed", "segment_alloc", "segment_free",
            "segment_map", "segment_unmap", "oom", "snapshot"}  # fmt: skip


def _has(record: dict[str, Any], fields: dict[str, type], optional: tuple[str, ...] = ()) -> None:
    assert record.keys() - set(optional) == fields.keys()
    for name, kind in fields.items():
        assert type(record[name]) is kind, (name, record[name])
    for frame in record.get("frames", ()):
        assert frame.keys() == _FRAME.keys()
        assert all(type(frame[name]) is kind for name, kind in _FRAME.items())


def _check_snapshot(snapshot: dict[str, Any]) -> None:
    assert {"segments", "device_traces", "allocator_settings"} <= snapshot.keys()
    assert isinstance(snapshot["allocator_settings"], dict)
    for segment in snapshot["segments"]:
        _has(segment, _SEGMENT)
        assert segment["segment_type"] in ("small", "large")
        at, sums = segment["address"], dict.fromkeys(("allocated", "active", "requested"), 0)
        for block in segment["blocks"]:
            _has(block, _BLOCK)
            assert block["address"] == at and block["size"] > 0  # the blocks tile the segment
            assert block["state"] in _STATES
            at += block["size"]
            if block["state"] != "inactive":
                sums["active"] += block["size"]
                sums["requested"] += block["requested_size"]
                assert 0 < block["requested_size"] <= block["size"]
            if block["state"] == "active_allocated":
                sums["allocated"] += block["size"]
        assert at == segment["address"] + segment["total_size"]
        assert all(segment[f"{name}_size"] == value for name, value in sums.items())
    for trace in snapshot["device_traces"]:
        for event in trace:
            assert event["action"] in _ACTIONS
            place = "device_free" if event["action"] == "oom" else "addr"
            _has(event, {**_EVENT, place: _INT})
        times = [event["time_us"] for event in trace]
        assert times == sorted(times)


@pytest.fixture(scope="session")
def check_snapshot() -> Callable[[dict[str, Any]], None]:
    """check_snapshot(snapshot): asserts the structure, names and sums of a memory snapshot."""
    return _check_snapshot


class FirstFit:
    """A plain allocator that records as the real one does, for tests that need no device."""

    def __init__(self, size: int = 64 << 20, base: int = 1 << 46) -> None:
        self.size, self.base, self.time = size, base, 1_700_000_000_000_000
        self.live: dict[int, tuple[int, int, list[Any]]] = {}  # address: size, requested, frames
        self.trace: list[dict[str, Any]] = []
        self.live_after: list[int] = []  # bytes, after each event
        self._event("segment_alloc", self.base, size, [])

    def _event(self, action: str, address: int, size: int, frames: list[Any], **more: int) -> None:
        self.time += 3
        place = {"device_free": address} if action == "oom" else {"addr": address}
        self.trace.append(
            {"action": action, **place, "size": size, "stream": 0, "time_us": self.time,
             "frames": frames, "pool_id": (0, 0), **more}
        )  # fmt: skip
        self.live_after.append(sum(size for size, _, _ in self.live.values()))

    def allocate(self, requested: int, frames: list[Any]) -> int | None:
        size, at = (requested + 511) // 512 * 512, self.base
        for address in sorted(self.live):
            if address - at >= size:
                break
            at = address + self.live[address][0]
        if at + size > self.base + self.size:
            self._event("oom", self.size, requested, frames)
            return None
        self.live[at] = (size, requested, frames)
        self._event("alloc", at, size, frames)
        return at

    def free(self, address: int) -> None:
        size, _, frames = self.live[address]
        self._event("free_requested", address, size, frames)
        del self.live[address]
        self._event("free_completed", address, size, frames)

    def snapshot(self) -> dict[str, Any]:
        blocks, at = [], self.base
        for address in [*sorted(self.live), self.base + self.size]:
            if address > at:
                blocks.append({"address": at, "size": address - at, "requested_size": 0,
                               "state": "inactive", "frames": []})  # fmt: skip
            if address in self.live:
                size, requested, frames = self.live[address]
                blocks.append({"address": address, "size": size, "requested_size": requested,
                               "state": "active_allocated", "frames": frames})  # fmt: skip
                at = address + size
        used = sum(size for size, _, _ in self.live.values())
        segment = {
            "device": 0, "address": self.base, "total_size": self.size, "allocated_size": used,
            "active_size": used, "requested_size": sum(r for _, r, _ in self.live.values()),
            "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0),
            "is_expandable": False, "frames": [], "blocks": blocks,
        }  # fmt: skip
        return {"segments": [segment], "device_traces": [list(self.trace)],
                "allocator_settings": {"VT_CUDA_ALLOC": ""}}  # fmt: skip


@pytest.fixture
def first_fit() -> type[FirstFit]:
    """The class of a plain allocator with a recorded history."""
    return FirstFit


@pytest.fixture
def history() -> Iterator[None]:
    """Whatever a test records ends with it."""
    yield
    torch.cuda.memory._record_memory_history(None)


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Convolutions keep float32's bits, which the references have, whatever a test sets."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
