"""Device memory: what is free, what tensors hold, limits, and giving cached memory back.

`docs/allocator.md` tells how the allocator works.
"""

from __future__ import annotations

from typing import Any

from vibetensor import _C
from vibetensor.torch.cuda import _backend

OutOfMemoryError = _C.OutOfMemoryError


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of a device, as the driver sees them."""
    return _backend.required().memory_info(_backend.device_index(device))


def empty_cache() -> None:
    """Gives cached device memory back to the driver; nothing without a device."""
    native = _backend.native()
    if native is not None and native.device_count():
        native.empty_cache()


def memory_stats(device: Any = None) -> dict[str, int]:
    """The allocator's counters under torch's names ("allocated_bytes.all.current", ...).

    Empty until something is allocated on the device, or without one.
    """
    native = _backend.native()
    if native is None or not native.device_count():
        return {}
    return native.memory_stats(_backend.device_index(device))


def _stat(name: str, device: Any) -> int:
    return memory_stats(device).get(name, 0)


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


def host_memory_stats() -> dict[str, int]:
    """Counters of the page-locked memory."""
    return _backend.required().host_memory_stats()


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """A table of who holds how much: one row a pool and stream."""
    del abbreviated
    return _backend.required().memory_report(_backend.device_index(device))
