"""Device memory: what is free, and giving cached memory back."""

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
