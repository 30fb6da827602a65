"""Settings (of the process, the default device of the thread) and torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vibetensor import _C

_precision = "highest"
_deterministic = False
_deterministic_warn_only = False


def set_default_dtype(d: Any) -> None:
    """Sets the dtype of new floating-point tensors (float32 at start)."""
    _C._set_default_dtype(d)


def set_default_device(device: Any) -> None:
    """Sets where new tensors that name no device go, on the calling thread; None is the start (CPU).

    Holds for every op that makes a tensor out of sizes or data, `tensor` and `as_tensor` included
    (they copy tensors and arrays there), and so for modules; not for `from_numpy`, `from_dlpack`,
    `Generator()`, the legacy `Tensor(...)` and `new_*`. "cuda" without an index follows
    `torch.cuda.set_device`. `with torch.device("cuda"):` sets it for a block.

    Raises RuntimeError, which names the reason, where there is no such device.
    """
    _C._set_default_device(device)


def _with_default_device(device: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run with `device` as the default: what `@torch.device(...)` gives."""

    if not callable(function):
        raise TypeError(f"torch.device as a decorator takes a function, got {function!r}")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with device:
            return function(*args, **kwargs)

    return run


def set_float32_matmul_precision(precision: str) -> None:
    """'highest', 'high' or 'medium'. CPU matmuls always use full float32 ('highest')."""
    global _precision
    if precision not in ("highest", "high", "medium"):
        raise ValueError(f"precision must be 'highest', 'high' or 'medium', got {precision!r}")
    _precision = precision


def get_float32_matmul_precision() -> str:
    """The value last set."""
    return _precision


def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
    """Whether everything must give the same bits in every run.

    Our own kernels always do. With ``mode`` so do those of cuDNN: convolutions on CUDA, and the
    gradients of attention. ``warn_only`` is accepted; nothing here has to raise.
    """
    global _deterministic, _deterministic_warn_only
    _deterministic, _deterministic_warn_only = bool(mode), bool(warn_only)
    from vibetensor.torch.cuda import _backend

    native = _backend.native()
    if native is not None:
        native.set_cudnn_flag("deterministic_algorithms", _deterministic)


def are_deterministic_algorithms_enabled() -> bool:
    """What use_deterministic_algorithms last set; off at start."""
    return _deterministic


def is_deterministic_algorithms_warn_only_enabled() -> bool:
    """The warn_only that use_deterministic_algorithms last set."""
    return _deterministic and _deterministic_warn_only


def compile(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Returns the model or function itself.

    Works as a decorator too. The options of torch.compile are accepted and have no effect until
    capture mode gives them a meaning.
    """
    if model is None:
        return lambda fn: fn
    del options
    return model
