"""torch.cuda: devices, streams, memory. Without a usable device queries answer, the rest explains.

The backend is opened on first use; importing this module costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vibetensor.torch.cuda import _backend
from vibetensor.torch.cuda import memory as memory
from vibetensor.torch.cuda import nvtx as nvtx
from vibetensor.torch.cuda.mem_pool import MemPool as MemPool
from vibetensor.torch.cuda.mem_pool import graph_pool_handle as graph_pool_handle
from vibetensor.torch.cuda.mem_pool import use_mem_pool as use_mem_pool
from vibetensor.torch.cuda.memory import OutOfMemoryError as OutOfMemoryError
from vibetensor.torch.cuda.memory import caching_allocator_alloc as caching_allocator_alloc
from vibetensor.torch.cuda.memory import caching_allocator_delete as caching_allocator_delete
from vibetensor.torch.cuda.memory import empty_cache as empty_cache
from vibetensor.torch.cuda.memory import get_allocator_backend as get_allocator_backend
from vibetensor.torch.cuda.memory import (
    get_per_process_memory_fraction as get_per_process_memory_fraction,
)
from vibetensor.torch.cuda.memory import host_memory_stats as host_memory_stats
from vibetensor.torch.cuda.memory import (
    host_memory_stats_as_nested_dict as host_memory_stats_as_nested_dict,
)
from vibetensor.torch.cuda.memory import list_gpu_processes as list_gpu_processes
from vibetensor.torch.cuda.memory import max_memory_allocated as max_memory_allocated
from vibetensor.torch.cuda.memory import max_memory_reserved as max_memory_reserved
from vibetensor.torch.cuda.memory import mem_get_info as mem_get_info
from vibetensor.torch.cuda.memory import memory_allocated as memory_allocated
from vibetensor.torch.cuda.memory import memory_reserved as memory_reserved
from vibetensor.torch.cuda.memory import memory_snapshot as memory_snapshot
from vibetensor.torch.cuda.memory import memory_stats as memory_stats
from vibetensor.torch.cuda.memory import memory_stats_as_nested_dict as memory_stats_as_nested_dict
from vibetensor.torch.cuda.memory import memory_summary as memory_summary
from vibetensor.torch.cuda.memory import pool_stats as pool_stats
from vibetensor.torch.cuda.memory import (
    reset_accumulated_host_memory_stats as reset_accumulated_host_memory_stats,
)
from vibetensor.torch.cuda.memory import (
    reset_accumulated_memory_stats as reset_accumulated_memory_stats,
)
from vibetensor.torch.cuda.memory import (
    reset_peak_host_memory_stats as reset_peak_host_memory_stats,
)
from vibetensor.torch.cuda.memory import reset_peak_memory_stats as reset_peak_memory_stats
from vibetensor.torch.cuda.memory import set_memory_limit as set_memory_limit
from vibetensor.torch.cuda.memory import set_out_of_memory_callback as set_out_of_memory_callback
from vibetensor.torch.cuda.memory import (
    set_per_process_memory_fraction as set_per_process_memory_fraction,
)
from vibetensor.torch.cuda.streams import (
    Event as Event,
)
from vibetensor.torch.cuda.streams import (
    ExternalStream as ExternalStream,
)
from vibetensor.torch.cuda.streams import (
    Stream as Stream,
)
from vibetensor.torch.cuda.streams import (
    StreamContext as StreamContext,
)
from vibetensor.torch.cuda.streams import (
    current_stream as current_stream,
)
from vibetensor.torch.cuda.streams import (
    default_stream as default_stream,
)
from vibetensor.torch.cuda.streams import (
    set_stream as set_stream,
)
from vibetensor.torch.cuda.streams import (
    stream as stream,
)


def is_available() -> bool:
    """Whether a CUDA device can be used."""
    return _backend.usable() is not None


def device_count() -> int:
    """The number of CUDA devices."""
    native = _backend.native()
    return 0 if native is None else native.device_count()


def is_initialized() -> bool:
    """Whether the CUDA backend has been opened and found a device."""
    return is_available()


def init() -> None:
    """Opens the backend. Raises RuntimeError that says what is missing."""
    _backend.required()


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Whether the current device computes in bfloat16."""
    return is_available() and (including_emulation or get_device_capability()[0] >= 8)


def is_tf32_supported() -> bool:
    """Whether the current device has TF32 matrix instructions."""
    return is_available() and get_device_capability()[0] >= 8


def current_device() -> int:
    """The index of the calling thread's current device."""
    return _backend.required().current_device()


def set_device(device: Any) -> None:
    """Makes `device` current on the calling thread; -1 changes nothing."""
    if device == -1:  # of a tensor that is on no GPU
        return
    index = _backend.device_index(device)
    if index >= 0:
        _backend.required().set_device(index)


class device:
    """Makes a device current inside a with block; None or -1 changes nothing."""

    def __init__(self, device: Any) -> None:
        self.idx = -1 if device in (None, -1) else _backend.device_index(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        if self.idx >= 0:
            native = _backend.required()
            self.prev_idx = native.current_device()
            native.set_device(self.idx)

    def __exit__(self, *error: object) -> None:
        if self.idx >= 0:
            _backend.required().set_device(self.prev_idx)


class device_of(device):
    """Makes the device of a tensor current inside a with block; nothing for a CPU tensor."""

    def __init__(self, obj: Any) -> None:
        super().__init__(obj.get_device() if obj.is_cuda else None)


def synchronize(device: Any = None) -> None:
    """Waits for all work of a device. Raises what that work failed with."""
    _backend.required().synchronize_device(_backend.device_index(device))


def is_current_stream_capturing() -> bool:
    """Whether what this thread does becomes part of a graph: it is recorded, or its current stream
    is being captured."""
    from vibetensor import _C

    if _C.graphs.recording() is not None:
        return True
    native = _backend.usable()
    if native is None:
        return False
    index = native.current_device()
    return native.stream_is_captured(index, native.current_stream(index))


def set_sync_debug_mode(debug_mode: int | str) -> None:
    """What happens when an op makes the host wait: "default" (0), "warn" (1) or "error" (2)."""
    modes = {"default": 0, "warn": 1, "error": 2}
    if isinstance(debug_mode, str):
        if debug_mode not in modes:
            raise RuntimeError(
                f"invalid value of debug_mode, expected one of `default`, `warn`, `error`, got {debug_mode!r}"
            )
        debug_mode = modes[debug_mode]
    _backend.required().set_sync_debug_mode(debug_mode)


def get_sync_debug_mode() -> int:
    """The mode last set: 0, 1 or 2."""
    return _backend.required().sync_debug_mode()


def get_device_properties(device: Any = None) -> Any:
    """Name, capability, memory and size of a device."""
    return _backend.required().properties(_backend.device_index(device))


def get_device_name(device: Any = None) -> str:
    """The name of a device."""
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """Major and minor compute capability of a device: (9, 0) for Hopper."""
    properties = get_device_properties(device)
    return properties.major, properties.minor


def get_arch_list() -> list[str]:
    """The architectures that this build has kernels for, "sm_90" for code and "compute_90" for PTX;
    empty without a CUDA backend."""
    module = _backend.native()
    if module is None:
        return []
    names = []
    for arch in module.built_architectures().split(","):
        number, _, kind = arch.partition("-")
        names += [f"sm_{number}"] if kind in ("", "real") else []
        names += [f"compute_{number}"] if kind in ("", "virtual") else []
    return names


def ipc_collect() -> None:
    """Does nothing: no memory of the device is shared with other processes."""


def can_device_access_peer(device: Any, peer_device: Any) -> bool:
    """Whether kernels on `device` can read memory of `peer_device`."""
    return _backend.required().can_access_peer(
        _backend.device_index(device), _backend.device_index(peer_device)
    )


def manual_seed(seed: int) -> None:
    """Seeds the generator of the current device; a no-op without devices."""
    if is_available():
        _generator(current_device()).manual_seed(seed)
    else:
        int(seed)


def manual_seed_all(seed: int) -> None:
    """Seeds the generators of all devices; a no-op without devices."""
    int(seed)
    for index in range(device_count()):
        _generator(index).manual_seed(seed)


def seed() -> None:
    """Seeds the generator of the current device from the system's randomness."""
    if is_available():
        _generator(current_device()).seed()


def initial_seed() -> int:
    """The seed of the current device's generator."""
    return _generator(current_device()).initial_seed()


def get_rng_state(device: Any = "cuda") -> Any:
    """The state of a device's generator: 16 bytes, seed and offset."""
    return _generator(_backend.device_index(device)).get_state()


def set_rng_state(new_state: Any, device: Any = "cuda") -> None:
    """Sets the state of a device's generator."""
    _generator(_backend.device_index(device)).set_state(new_state)


def get_rng_state_all() -> list[Any]:
    """The states of all devices' generators."""
    return [_generator(index).get_state() for index in range(device_count())]


def set_rng_state_all(new_states: Any) -> None:
    """Sets the states of all devices' generators."""
    for index, state in enumerate(new_states):
        _generator(index).set_state(state)


def _generator(index: int) -> Any:
    from vibetensor import _C

    return _C._default_generator(_C.device("cuda", index))


if TYPE_CHECKING:
    from vibetensor.torch.cuda import tunable as tunable
    from vibetensor.torch.cuda.graphs import CUDAGraph as CUDAGraph
    from vibetensor.torch.cuda.graphs import graph as graph
    from vibetensor.torch.cuda.graphs import make_graphed_callables as make_graphed_callables

_GRAPHS = ("graphs", "graph", "CUDAGraph", "make_graphed_callables")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "amp":  # built on torch.amp, which asks this package for devices
        import importlib

        return importlib.import_module("vibetensor.torch.cuda.amp")
    if name in _GRAPHS:
        import importlib

        graphs = importlib.import_module("vibetensor.torch.cuda.graphs")
        return graphs if name == "graphs" else getattr(graphs, name)
    if name == "tunable":
        import importlib

        return importlib.import_module("vibetensor.torch.cuda.tunable")
    if name == "default_generators":
        return tuple(_generator(index) for index in range(device_count()))
    if name == "capture":  # imported when asked for: it is built on this package
        from vibetensor.graphs import capture

        return capture
    raise AttributeError(f"module 'vibetensor.cuda' has no attribute '{name}'")
