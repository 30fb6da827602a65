"""Reading a memory snapshot from a file that may hold anything: what the page relies on is checked."""

from __future__ import annotations

import os
import pickle
from typing import Any

# What the page reads of each record; the rest may be missing, as in snapshots of other versions.
_SEGMENT = {"address": int, "total_size": int, "stream": int, "blocks": (list, tuple)}
_BLOCK = {"size": int, "state": str}
_EVENT = {"action": str, "size": int}
_FRAME = {"filename": str, "line": int, "name": str}
_OPTIONAL = {
    "address": int,
    "addr": int,
    "device": int,
    "device_free": int,
    "requested_size": int,
    "segment_pool_id": (list, tuple),
    "segment_type": str,
    "stream": int,
    "time_us": int,
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers only: a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}; a snapshot holds plain data only")


def load_snapshot(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The snapshot in a pickle file. Raises ValueError, which names the file and what is wrong,
    where the file holds something else."""
    with open(path, "rb") as file:
        try:
            snapshot = _PlainUnpickler(file).load()
            check_snapshot(snapshot)
        except OSError:
            raise
        except Exception as error:  # a broken pickle raises nearly anything
            raise ValueError(f"'{os.fspath(path)}' is not a memory snapshot: {error}") from error
    return snapshot


def check_snapshot(snapshot: Any) -> None:
    """Raises ValueError, with the place, where a snapshot lacks what a page needs or has it in
    another type."""
    if not isinstance(snapshot, dict) or "segments" not in snapshot:
        raise ValueError("it has no segments")
    checked = _Checked()
    for at, segment in _items("segments", snapshot["segments"]):
        checked.record(at, segment, _SEGMENT)
        if segment.get("device", 0) < 0:
            raise ValueError(f"{at}.device is {segment['device']}")
        for place, block in _items(f"{at}.blocks", segment["blocks"]):
            checked.record(place, block, _BLOCK)
            _amount(f"{place}.size", block["size"])
    for at, trace in _items("device_traces", snapshot.get("device_traces", ())):
        for place, event in _items(at, trace):
            checked.record(place, event, _EVENT)
            _amount(f"{place}.size", event["size"])
    if not isinstance(snapshot.get("allocator_settings") or {}, dict):
        raise ValueError("allocator_settings is no dict")


def _items(place: str, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{place} is {_kind(value)}, not a list")
    return ((f"{place}[{index}]", item) for index, item in enumerate(value))


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"


def _amount(place: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{place} is {value}")


class _Checked:
    """Checks records; a snapshot shares its lists of frames, and each is looked at once."""

    def __init__(self) -> None:
        self._stacks: set[int] = set()

    def record(self, place: str, record: Any, needed: dict[str, Any]) -> None:
        if not isinstance(record, dict):
            raise ValueError(f"{place} is {_kind(record)}, not a dict")
        for name, kind in needed.items():
            if name not in record:
                raise ValueError(f"{place} has no {name!r}")
            if not isinstance(record[name], kind):
                raise ValueError(f"{place}.{name} is {_kind(record[name])}")
        for name, kind in _OPTIONAL.items():
            if name in record and name not in needed and not isinstance(record[name], kind):
                raise ValueError(f"{place}.{name} is {_kind(record[name])}")
        frames = record.get("frames")
        if frames is None or id(frames) in self._stacks:
            return
        self._stacks.add(id(frames))
        for at, frame in _items(f"{place}.frames", frames):
            self.record(at, frame, _FRAME)
