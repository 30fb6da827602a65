"""What NVIDIA's management library tells of a device: the processes that use it."""

from __future__ import annotations

import ctypes
from typing import Any

from vibetensor.torch.cuda import _backend


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used_memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


_INSUFFICIENT_SIZE = 7
_UNKNOWN = 2**64 - 1  # bytes that the driver does not tell


def _check(library: Any, status: int, what: str) -> None:
    if status != 0:
        library.nvmlErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVML: {what}: {library.nvmlErrorString(status).decode()}")


def _processes(library: Any, bus: str) -> list[tuple[int, int]]:
    """(process id, bytes or _UNKNOWN) of what computes on the device at a PCI address."""
    device, count = ctypes.c_void_p(), ctypes.c_uint(0)
    found = library.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(device))
    _check(library, found, f"finding the device at {bus}")
    ask = library.nvmlDeviceGetComputeRunningProcesses_v3
    for _ in range(5):  # new processes may come between two calls
        room = (_Process * max(count.value, 1))()
        count.value = len(room)
        status = ask(device, ctypes.byref(count), room)
        if status != _INSUFFICIENT_SIZE:
            _check(library, status, "listing the processes")
            return [(p.pid, p.used_memory) for p in room[: count.value]]
        count.value += 8
    raise RuntimeError("NVML: listing the processes: their number keeps growing")


def process_table(index: int) -> str:
    """The text of torch.cuda.list_gpu_processes for the device of an index."""
    properties = _backend.required().properties(index)
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise RuntimeError(f"list_gpu_processes needs the driver's NVML: {error}") from error
    place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    _check(library, library.nvmlInit_v2(), "starting")
    try:
        found = _processes(library, "{:08x}:{:02x}:{:02x}.0".format(*place))
    finally:
        library.nvmlShutdown()
    lines = [f"GPU:{index}"]
    for pid, used in found:
        amount = "unknown" if used == _UNKNOWN else f"{used / (1 << 20):.3f} MB"
        lines.append(f"process {pid:>10d} uses {amount:>15} GPU memory")
    return "\n".join(lines if found else [*lines, "no processes are running"])
