"""Process-wide settings and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vibetensor import _C

_precision = "highest"
_deterministic = True


def set_default_dtype(d: Any) -> None:
    """Sets the dtype of new floating-point tensors (float32 at start)."""
    _C._set_default_dtype(d)


def set_default_device(device: Any) -> None:
    """Only the CPU can be the default device of this build; anything else raises RuntimeError."""
    wanted = _C.device("cpu" if device is None else device)
    if wanted.type != "cpu":
        raise RuntimeError(f"set_default_device: no backend for '{wanted}' in this build")


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
    """Accepted for compatibility: every kernel here is deterministic."""
    del mode, warn_only


def compile(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Returns the model or function itself.

    Works as a decorator too. The options of torch.compile are accepted and have no effect until
    capture mode gives them a meaning.
    """
    if model is None:
        return lambda fn: fn
    del options
    return model
