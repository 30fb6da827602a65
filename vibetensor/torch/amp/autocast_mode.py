"""Autocast regions: which dtype matmul-like ops run in, by device type.

The casts themselves are made in the op front, as the ``autocast`` column of the op table says;
this file only switches them on and off for the calling thread, and is the only one that does.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import vibetensor.torch as torch
from vibetensor import _C

_DEVICE_TYPES = ("cpu", "cuda")


def _check_device_type(device_type: Any) -> str:
    if not isinstance(device_type, str):
        raise ValueError(f"Expected `device_type` of type `str`, got: `{type(device_type)}`")
    if device_type not in _DEVICE_TYPES:
        raise RuntimeError(
            f"unsupported autocast device_type '{device_type}': expected one of "
            f"{', '.join(_DEVICE_TYPES)}"
        )
    return device_type


def is_autocast_available(device_type: str) -> bool:
    """Whether autocast exists for a device type."""
    if not isinstance(device_type, str):
        raise ValueError(f"Expected `device_type` of type `str`, got: `{type(device_type)}`")
    return device_type in _DEVICE_TYPES


def is_autocast_enabled(device_type: str = "cuda") -> bool:
    """Whether the calling thread is in an autocast region of this device type."""
    return _C._get_autocast(_check_device_type(device_type))[0]


def set_autocast_enabled(device_type: Any, enabled: bool | None = None) -> None:
    """``(device_type, enabled)``, or with one argument ``enabled`` for cuda, as in torch."""
    if enabled is None:
        device_type, enabled = "cuda", device_type
    _C._set_autocast(_check_device_type(device_type), bool(enabled), None)


def get_autocast_dtype(device_type: str) -> Any:
    """The dtype that autocast regions use unless they name one."""
    return _C._get_autocast(_check_device_type(device_type))[1]


def set_autocast_dtype(device_type: str, dtype: Any) -> None:
    """Sets the dtype that autocast regions use unless they name one."""
    enabled = _C._get_autocast(_check_device_type(device_type))[0]
    _C._set_autocast(device_type, enabled, dtype)


def is_autocast_cpu_enabled() -> bool:
    """``is_autocast_enabled("cpu")``."""
    return is_autocast_enabled("cpu")


def get_autocast_cpu_dtype() -> Any:
    """``get_autocast_dtype("cpu")``."""
    return get_autocast_dtype("cpu")


def get_autocast_gpu_dtype() -> Any:
    """``get_autocast_dtype("cuda")``."""
    return get_autocast_dtype("cuda")


def is_autocast_cache_enabled() -> bool:
    """Whether weights cast inside a region are kept until it ends."""
    before = _C._set_autocast_cache_enabled(True)
    _C._set_autocast_cache_enabled(before)
    return before


def set_autocast_cache_enabled(enabled: bool) -> None:
    """Keeps, or stops keeping, weights cast inside a region until it ends."""
    _C._set_autocast_cache_enabled(enabled)


def clear_autocast_cache() -> None:
    """Forgets the weights cast so far."""
    _C._clear_autocast_cache()


class autocast:
    """A region in which matmul-like ops run in ``dtype`` and sensitive ones in float32.

    A context manager and a decorator; regions nest, and an inner ``enabled=False`` one switches
    casting off. ``dtype`` defaults to bfloat16 on cpu and float16 on cuda. A dtype that is not a
    half one, or cuda where there is none, switches the region off with a warning.
    """

    def __init__(
        self,
        device_type: str,
        dtype: Any = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        self.device = _check_device_type(device_type)
        self.fast_dtype = get_autocast_dtype(device_type) if dtype is None else dtype
        self._cache_enabled = cache_enabled
        self._outer: list[
            tuple[bool, Any, bool | None]
        ] = []  # what to restore, one entry a nesting
        if enabled and self.fast_dtype not in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"In {device_type.upper()} autocast, but the target dtype {self.fast_dtype} is "
                "not supported (torch.bfloat16 and torch.float16 are). Disabling autocast.",
                stacklevel=2,
            )
            enabled = False
        if enabled and device_type == "cuda" and not torch.cuda.is_available():
            warnings.warn("CUDA is not available. Disabling autocast.", stacklevel=2)
            enabled = False
        self._enabled = enabled

    def __enter__(self) -> autocast:
        caching = None
        if self._cache_enabled is not None:
            caching = _C._set_autocast_cache_enabled(self._cache_enabled)
        before = _C._set_autocast(self.device, self._enabled, self.fast_dtype)
        self._outer.append((*before, caching))
        _nesting.depth += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        _nesting.depth -= 1
        if _nesting.depth == 0:
            # The casts hold weights of this step: they must not outlive an optimizer's update.
            clear_autocast_cache()
        enabled, dtype, caching = self._outer.pop()
        _C._set_autocast(self.device, enabled, dtype)
        if caching is not None:
            _C._set_autocast_cache_enabled(caching)

    def __call__(self, func: Callable) -> Callable:
        if not callable(func):
            raise TypeError(
                f"autocast()(func) requires a callable, but got {type(func).__name__}: use "
                "`with torch.autocast(device_type=...):` around the forward pass"
            )

        @functools.wraps(func)
        def decorated(*args: Any, **kwargs: Any) -> Any:
            with self:
                return func(*args, **kwargs)

        return decorated


def _make_nesting() -> Any:
    from threading import local

    class Nesting(local):
        depth = 0

    return Nesting()


_nesting = _make_nesting()


def _cast(value: Any, device_type: str, dtype: Any) -> Any:
    if isinstance(value, torch.Tensor):
        castable = value.is_floating_point() and value.device.type == device_type
        return value.to(dtype) if castable and value.dtype != torch.float64 else value
    if isinstance(value, dict):
        return {
            _cast(k, device_type, dtype): _cast(v, device_type, dtype) for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [_cast(v, device_type, dtype) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    return value


def custom_fwd(fwd: Callable | None = None, *, device_type: str, cast_inputs: Any = None):
    """Decorates ``forward`` of an ``autograd.Function``.

    The backward pass (under :func:`custom_bwd`) then runs with the autocast state of the forward
    one. With ``cast_inputs``, floating-point inputs are cast to that dtype and the body runs with
    autocast off, when called in an autocast region; elsewhere it has no effect.
    """
    _check_device_type(device_type)
    if fwd is None:
        return functools.partial(custom_fwd, device_type=device_type, cast_inputs=cast_inputs)

    @functools.wraps(fwd)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        ctx = args[0]
        ctx._dtype = get_autocast_dtype(device_type)
        active = is_autocast_enabled(device_type)
        if cast_inputs is None:
            ctx._fwd_used_autocast = active
            return fwd(*args, **kwargs)
        ctx._fwd_used_autocast = False
        if not active:
            return fwd(*args, **kwargs)
        with autocast(device_type, enabled=False):
            args = (ctx, *_cast(args[1:], device_type, cast_inputs))
            return fwd(*args, **_cast(kwargs, device_type, cast_inputs))

    return decorated


def custom_bwd(bwd: Callable | None = None, *, device_type: str):
    """Decorates ``backward`` of an ``autograd.Function``; see :func:`custom_fwd`."""
    _check_device_type(device_type)
    if bwd is None:
        return functools.partial(custom_bwd, device_type=device_type)

    @functools.wraps(bwd)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        ctx = args[0]
        with autocast(device_type, dtype=ctx._dtype, enabled=ctx._fwd_used_autocast):
            return bwd(*args, **kwargs)

    return decorated
