"""What the allocator did and what it holds, with the Python lines that asked for it.

The structures and names are torch's, so that PyTorch's memory viewer reads them;
`docs/memory-viewer.md` tells how to record, save and look at them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from vibetensor.torch.cuda import _backend
from vibetensor.torch.cuda.mem_pool import pool_handle

_MODES = {None: 0, "state": 1, "all": 2}
_CONTEXTS = {None: 0, "state": 1, "alloc": 2, "all": 3}


def _record_memory_history(
    enabled: str | bool | None = "all",
    context: str | None = "all",
    stacks: str = "all",
    max_entries: int = sys.maxsize,
    device: Any = None,
    clear_history: bool = False,
    compile_context: bool = False,
    global_record_annotations: bool = False,
    skip_actions: Sequence[str] | None = None,
) -> None:
    """Starts (or, with None, ends) recording where device memory is allocated, on all devices.

    Args:
        enabled: "all" records events and the origins of live memory, "state" the latter only;
            None stops and forgets everything.
        context: Which stacks are kept: "state", those of live memory; "alloc", also in the events;
            "all", also where memory was freed; None, no stacks.
        stacks: "python" or "all": the stacks are of Python in either case.
        max_entries: Events kept a device; then the newest replace the oldest.
        device: Has no effect.
        clear_history: Forget earlier events when this is called again.
        compile_context, global_record_annotations: Have no effect.
        skip_actions: Kinds of events to leave out: "alloc", "free_requested", "free_completed",
            "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom", "snapshot".
    """
    del device, compile_context, global_record_annotations
    if isinstance(enabled, bool):
        enabled = "all" if enabled else None
    if enabled not in _MODES:
        raise RuntimeError(f"expected enabled to be one of 'state', 'all' or None, got {enabled!r}")
    if context not in _CONTEXTS:
        raise RuntimeError(
            f"expected context to be one of 'state', 'alloc', 'all' or None, got {context!r}"
        )
    if stacks not in ("python", "all"):
        raise RuntimeError(f"expected stacks to be one of 'python' or 'all', got {stacks!r}")
    if max_entries < 0:
        raise ValueError(f"max_entries must not be negative, got {max_entries}")
    _backend.required().record_history(
        _MODES[enabled], _CONTEXTS[context], max_entries, list(skip_actions or ()), clear_history
    )


def memory_snapshot(
    mempool_id: tuple[int, int] | None = None, include_traces: bool = True
) -> list[dict[str, Any]]:
    """The segments of all devices and the blocks in them; empty without a device.

    Args:
        mempool_id: Of this pool only: `MemPool.id`; ``(0, 0)`` is the default pool.
        include_traces: Note the snapshot among the recorded events.

    Raises:
        NotImplementedError: with ``VT_CUDA_ALLOC=backend:async``, where the driver keeps them.
    """
    if mempool_id is not None:
        mempool_id = pool_handle(mempool_id)
    native = _backend.usable()
    if native is None:
        return []
    return native.memory_snapshot(mempool_id, include_traces)["segments"]


def _snapshot(device: Any = None, augment_with_fx_traces: bool = False) -> dict[str, Any]:
    """Segments, blocks, recorded events and settings of all devices.

    ``segments``: dicts as of :func:`memory_snapshot`. ``device_traces``: a list of events for each
    device, oldest first: ``action``, ``addr`` (``device_free`` of an out-of-memory error),
    ``size``, ``stream``, ``pool_id``, ``time_us``, ``frames``. Frames are dicts of ``filename``,
    ``line`` and ``name``, the innermost first. ``allocator_settings``: what ``VT_CUDA_ALLOC`` says.

    With ``VT_CUDA_ALLOC=backend:async`` there are events but no segments.
    """
    del device, augment_with_fx_traces
    native = _backend.usable()
    if native is None:
        return {
            "segments": [],
            "device_traces": [],
            "allocator_settings": {},
            "external_annotations": [],
        }
    return native.snapshot(True)


def _dump_snapshot(
    filename: str | os.PathLike[str] = "dump_snapshot.pickle", augment_with_fx_traces: bool = False
) -> None:
    """Writes :func:`_snapshot` to a file, for a memory viewer or for later."""
    import pickle

    snapshot = _snapshot(augment_with_fx_traces=augment_with_fx_traces)
    with open(filename, "wb") as file:
        pickle.dump(snapshot, file, protocol=4)


def snapshot_html(
    path: str | os.PathLike[str],
    snapshot: dict[str, Any] | None = None,
    title: str = "CUDA memory",
) -> None:
    """Writes a page that shows a snapshot, for a browser; it needs no network.

    Args:
        path: The HTML file to write.
        snapshot: From :func:`_snapshot`; None takes one now.
        title: The page's heading.
    """
    from vibetensor.viz.memory import write_memory_page

    write_memory_page(path, _snapshot() if snapshot is None else snapshot, title)
