"""Opens the CUDA backend: where it is missing, queries answer and everything else says why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vibetensor._environment import env_flag

_native: Any = None
_problem = ""
_opened = False


def _find_library(name: str) -> str | None:
    """The path of one of NVIDIA's libraries by its short name, from the installed packages."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib  # pyright: ignore
    except ImportError:
        pass
    else:
        try:
            return load_nvidia_dynamic_lib(name).abs_path
        except Exception:  # Each version raises its own class; the scan follows.
            pass
    for folder in sys.path:
        for parent in ("nvidia/cu13/lib", "nvidia/cudnn/lib", "nvidia/nccl/lib"):
            for found in sorted(Path(folder or ".", parent).glob(f"lib{name}.so.*")):
                return str(found)
    return None


def native() -> Any:
    """The extension module, or None where this build has no CUDA backend. Raises ValueError, each time,
    where an environment variable says what it cannot."""
    global _native, _opened, _problem
    if not _opened:
        try:
            from vibetensor import _cuda  # pyright: ignore
        except ImportError as error:
            missing = "_cuda" in str(error) and "cannot import name" in str(error)
            _problem = (
                "this build has no CUDA backend (build with -C cmake.define.VT_CUDA=ON)"
                if missing
                else f"the CUDA backend could not be loaded: {error}"
            )
        else:
            _cuda.set_library_finder(_find_library)
            _cuda.set_sync_debug_mode(_cuda.sync_debug_mode())  # from VT_SYNC_DEBUG
            if env_flag("VT_CUTE_JIT", False):
                from vibetensor.cute_kernels import just_in_time

                _cuda.set_cute_compiler(just_in_time.symbols)
            _native = _cuda
        _opened = True
    return _native


def problem() -> str:
    """Why no CUDA device can be used; empty if one can."""
    module = native()
    if module is None:
        return _problem
    return "" if module.device_count() else module.device_problem()


def usable() -> Any:
    """The extension module with a usable device, or None."""
    module = native()
    return module if module is not None and module.device_count() else None


def required() -> Any:
    """The extension module with a usable device. Raises RuntimeError that says what is missing."""
    module = usable()
    if module is None:
        raise RuntimeError(f"no CUDA device can be used: {problem()}")
    return module


def device_index(device: Any = None) -> int:
    """The index of a device given as None (the current one), int, str or torch.device."""
    module = required()
    if device is None:
        return module.current_device()
    if isinstance(device, int):
        return device
    import vibetensor.torch as torch

    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return module.current_device() if device.index is None else device.index
