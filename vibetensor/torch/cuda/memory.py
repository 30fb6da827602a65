"""Device memory: what is free, what tensors hold, limits, and giving cached memory back.

`docs/allocator.md` tells how the allocator works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vibetensor import _C
from vibetensor.torch.cuda import _backend
from vibetensor.torch.cuda.mem_pool import MemPool as MemPool
from vibetensor.torch.cuda.mem_pool import use_mem_pool as use_mem_pool
from vibetensor.torch.cuda.memory_history import _dump_snapshot as _dump_snapshot
from vibetensor.torch.cuda.memory_history import _record_memory_history as _record_memory_history
from vibetensor.torch.cuda.memory_history import _snapshot as _snapshot
from vibetensor.torch.cuda.memory_history import memory_snapshot as memory_snapshot
from vibetensor.torch.cuda.memory_history import snapshot_html as snapshot_html
from vibetensor.torch.cuda.memory_table import memory_table

OutOfMemoryError = _C.OutOfMemoryError


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of a device, as the driver sees them."""
    return _backend.required().memory_info(_backend.device_index(device))


def empty_cache() -> None:
    """Gives cached device memory back to the driver; nothing without a device."""
    native = _backend.usable()
    if native is not None:
        native.empty_cache()


def memory_stats(device: Any = None) -> dict[str, int]:
    """The allocator's counters under torch's names ("allocated_bytes.all.current", ...).

    Each private pool (n, m) adds "pool.n_m.allocated_bytes", ".pending_bytes", ".cached_bytes",
    ".reserved_bytes", ".blocks" and ".use_count". Empty until something is allocated on the device,
    or without one.
    """
    stats = _stats(device)
    for row in pool_stats(device) if stats else ():
        if row["pool"] == (0, 0):
            continue
        name = "pool.{}_{}.".format(*row["pool"])
        for key in ("allocated", "pending", "cached", "reserved"):
            stats[f"{name}{key}_bytes"] = stats.get(f"{name}{key}_bytes", 0) + row[key]
        stats[name + "blocks"] = stats.get(name + "blocks", 0) + row["blocks"]
        stats[name + "use_count"] = row["use_count"]
    return stats


def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
    """:func:`memory_stats` with a dict for each part of a name."""
    return _nested(memory_stats(device))


def pool_stats(device: Any = None) -> list[dict[str, Any]]:
    """What each pool holds on each stream, in bytes; empty without a device.

    Each dict has ``pool`` (a pair; (0, 0) is the default pool), ``stream``, ``use_count``,
    ``allocated`` (by tensors), ``pending`` (waiting for other streams), ``cached``, ``reserved``
    (the sum), ``largest_free`` and ``blocks`` (allocated or pending).
    """
    native = _backend.usable()
    if native is None:
        return []
    return native.memory_usage(_backend.device_index(device))


def _stats(device: Any) -> dict[str, int]:
    native = _backend.usable()
    if native is None:
        return {}
    return native.memory_stats(_backend.device_index(device))


def _stat(name: str, device: Any) -> int:
    return _stats(device).get(name, 0)


def _nested(flat: dict[str, int]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split(".")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return nested


def memory_allocated(device: Any = None) -> int:
    """Bytes that tensors hold."""
    return _stat("allocated_bytes.all.current", device)


def max_memory_allocated(device: Any = None) -> int:
    """The most bytes that tensors held since the last reset_peak_memory_stats."""
    return _stat("allocated_bytes.all.peak", device)


def memory_reserved(device: Any = None) -> int:
    """Bytes that the allocator holds, in use or cached."""
    return _stat("reserved_bytes.all.current", device)


def max_memory_reserved(device: Any = None) -> int:
    """The most bytes that the allocator held since the last reset_peak_memory_stats."""
    return _stat("reserved_bytes.all.peak", device)


def reset_peak_memory_stats(device: Any = None) -> None:
    """Starts the peaks again from what is held now."""
    _backend.required().reset_peak_stats(_backend.device_index(device))


def reset_accumulated_memory_stats(device: Any = None) -> None:
    """Starts the counts of allocations and frees again from zero."""
    _backend.required().reset_accumulated_stats(_backend.device_index(device))


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """Limits this process to a share of the device's memory; beyond it OutOfMemoryError is raised."""
    if not isinstance(fraction, float):
        raise TypeError("Invalid type for fraction argument, must be `float`")
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    _backend.required().set_memory_fraction(fraction, _backend.device_index(device))


def get_per_process_memory_fraction(device: Any = None) -> float:
    """The share set with set_per_process_memory_fraction, from 0 to 1."""
    return _backend.required().memory_fraction(_backend.device_index(device))


def set_memory_limit(nbytes: int | None, device: Any = None) -> None:
    """Limits this process to `nbytes` of the device's memory; None ends it. The lower of this and
    the share of set_per_process_memory_fraction counts."""
    if nbytes is not None and nbytes < 0:
        raise ValueError(f"set_memory_limit: {nbytes} bytes is below 0")
    _backend.required().set_memory_limit(
        2**64 - 1 if nbytes is None else nbytes, _backend.device_index(device)
    )


def set_out_of_memory_callback(
    callback: Callable[[int, int], bool] | None, device: Any = None
) -> None:
    """Sets what is asked when memory is short, after cached memory has been given back.

    Args:
        callback: Called with the device's index and the bytes wanted, on the thread that allocates.
            Returns True if it freed memory; the allocation is then tried again, and it is asked
            again if that fails. An exception is reported and counts as False. None removes it.
        device: The device concerned; None is the current one.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"expected a callable or None, got {type(callback).__name__}")
    _backend.required().set_out_of_memory_callback(_backend.device_index(device), callback)


def _attach_out_of_memory_observer(observer: Callable[[int, int, int, int], Any]) -> None:
    """Calls `observer(device, alloc, device_total, device_free)` before each OutOfMemoryError, on
    every device, until the process ends. It may take a snapshot."""
    if not callable(observer):
        raise TypeError(f"expected a callable, got {type(observer).__name__}")
    _backend.required().add_out_of_memory_observer(observer)


def caching_allocator_alloc(size: int, device: Any = None, stream: Any = None) -> int:
    """Allocates `size` bytes for work on `stream` (default: the current one) and returns their
    address. They are given back with :func:`caching_allocator_delete`; 0 bytes have address 0."""
    from vibetensor.torch.cuda.streams import Stream, current_stream

    index = _backend.device_index(device)
    if stream is None:
        stream = current_stream(index)
    if isinstance(stream, Stream):
        stream = stream.cuda_stream
    if not isinstance(stream, int):
        raise TypeError(
            "Invalid type for stream argument, must be `torch.cuda.Stream` or `int` representing "
            f"a stream's handle, got {type(stream).__name__}"
        )
    if size < 0:
        raise ValueError(f"caching_allocator_alloc: {size} bytes is below 0")
    return _backend.required().raw_alloc(size, index, stream)


def caching_allocator_delete(mem_ptr: int) -> None:
    """Gives back memory of :func:`caching_allocator_alloc`, in the order of its stream."""
    _backend.required().raw_delete(mem_ptr)


def get_allocator_backend() -> str:
    """Either "native" or "cudaMallocAsync", by VT_CUDA_ALLOC."""
    native = _backend.native()
    return "native" if native is None else native.allocator_backend()


def host_memory_stats() -> dict[str, int]:
    """Counters of the page-locked memory under torch's names; times are in microseconds.

    "allocations" and "allocated_bytes" count blocks got from the driver, in use or cached,
    "active_requests" and "active_bytes" those in use or waiting for copies; each has ".current",
    ".peak", ".allocated" and ".freed". "host_alloc_time" and "host_free_time" have ".total",
    ".max", ".min", ".count" and ".avg" of the "num_host_alloc" and "num_host_free" driver calls.
    Empty without a device.
    """
    native = _backend.usable()
    return {} if native is None else native.host_memory_stats()


def host_memory_stats_as_nested_dict() -> dict[str, Any]:
    """:func:`host_memory_stats` with a dict for each part of a name."""
    return _nested(host_memory_stats())


def reset_peak_host_memory_stats() -> None:
    """Starts the peaks of page-locked memory again from what is held now."""
    _backend.required().reset_peak_host_stats()


def reset_accumulated_host_memory_stats() -> None:
    """Starts the counts and times of page-locked memory again from zero."""
    _backend.required().reset_accumulated_host_stats()


def list_gpu_processes(device: Any = None) -> str:
    """The processes that compute on a device and the memory each uses, one a line.

    Raises:
        RuntimeError: where the driver has no management library (NVML), or it refuses.
    """
    from vibetensor.torch.cuda.nvml import process_table

    return process_table(_backend.device_index(device))


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """A table of the allocator's counters in torch's form, then what each pool and stream holds.

    Args:
        device: None is the current one.
        abbreviated: Without the rows of large and small blocks.
    """
    index = _backend.device_index(device)
    return memory_table(_stats(index), pool_stats(index), index, abbreviated)
