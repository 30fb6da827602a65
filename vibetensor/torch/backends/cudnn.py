"""torch.backends.cudnn: the switches of cuDNN, which convolutions and attention on CUDA use.

``enabled``, ``benchmark`` (measure the candidates of each new convolution and keep the fastest),
``deterministic`` (convolutions that always sum in one order) and ``allow_tf32`` (float32
convolutions may round their inputs to TF32; on, as in torch) are read at every call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from vibetensor import _C
from vibetensor.torch.cuda import _backend

_SWITCHES = {
    "enabled": "cudnn_enabled",
    "benchmark": "cudnn_benchmark",
    "deterministic": "cudnn_deterministic",
    "allow_tf32": "cudnn_tf32",
}


def _get(name: str) -> bool:
    return _C._kernel_switch(_SWITCHES[name])


def _set(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise RuntimeError(f"set_{name}_cudnn expects a bool, but got {type(value).__name__}")
    _C._set_kernel_switch(_SWITCHES[name], value)


def is_available() -> bool:
    """Whether the library is found (it is opened for this) and a device can use it."""
    return version() is not None and _backend.native().device_count() > 0


def version() -> int | None:
    """cuDNN's version, 91300 for 9.13.0; None where it is not found."""
    native = _backend.native()
    return (native.cudnn_version() or None) if native is not None else None


def set_flags(
    _enabled: bool | None = None,
    _benchmark: bool | None = None,
    _benchmark_limit: int | None = None,
    _deterministic: bool | None = None,
    _allow_tf32: bool | None = None,
) -> tuple[bool, bool, None, bool, bool]:
    """Sets those switches that are given; returns the former values of all, in this order."""
    del _benchmark_limit  # as many candidates are measured as are worth it
    former = (_get("enabled"), _get("benchmark"), None, _get("deterministic"), _get("allow_tf32"))
    given = dict(
        enabled=_enabled,
        benchmark=_benchmark,
        deterministic=_deterministic,
        allow_tf32=_allow_tf32,
    )
    for name, value in given.items():
        if value is not None:
            _set(name, value)
    return former


@contextmanager
def flags(
    enabled: bool = False,
    benchmark: bool = False,
    benchmark_limit: int = 10,
    deterministic: bool = False,
    allow_tf32: bool = True,
) -> Iterator[None]:
    """Switches for the length of a with block."""
    former = set_flags(enabled, benchmark, benchmark_limit, deterministic, allow_tf32)
    try:
        yield
    finally:
        set_flags(*former)


def _switch(name: str) -> property:
    return property(lambda _: _get(name), lambda _, value: _set(name, value))


class _Cudnn(ModuleType):
    """Gives the module attributes that reach the backend."""

    enabled = _switch("enabled")
    benchmark = _switch("benchmark")
    deterministic = _switch("deterministic")
    allow_tf32 = _switch("allow_tf32")


sys.modules[__name__].__class__ = _Cudnn
