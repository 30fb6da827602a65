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
    """How exact matrix products of float32 on CUDA are; those on the CPU are always 'highest'.

    'highest' (at start): as exact as float32 arithmetic, on whichever units. 'high', 'medium':
    inputs may be rounded to TF32, as `backends.cuda.matmul.allow_tf32` says. ValueError for others.
    """
    global _precision
    if precision not in ("highest", "high", "medium"):
        raise ValueError(f"precision must be 'highest', 'high' or 'medium', got {precision!r}")
    _precision = precision
    from vibetensor.torch.backends import cuda

    cuda.matmul.allow_tf32 = precision != "highest"


def get_float32_matmul_precision() -> str:
    """The value last set, here or by `backends.cuda.matmul.allow_tf32` (then 'high' or 'highest')."""
    from vibetensor.torch.backends import cuda

    if not cuda.matmul.allow_tf32:
        return "highest"
    return "high" if _precision == "highest" else _precision


def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
    """Whether everything must give the same bits in every run.

    Our own kernels always do. With ``mode`` so do those of cuDNN: convolutions on CUDA, and the
    gradients of attention. ``warn_only`` is accepted; nothing here has to raise.
    """
    global _deterministic, _deterministic_warn_only
    _deterministic, _deterministic_warn_only = bool(mode), bool(warn_only)
    _C._set_kernel_switch("deterministic_algorithms", _deterministic)


def are_deterministic_algorithms_enabled() -> bool:
    """What use_deterministic_algorithms last set; off at start."""
    return _deterministic


def is_deterministic_algorithms_warn_only_enabled() -> bool:
    """The warn_only that use_deterministic_algorithms last set."""
    return _deterministic and _deterministic_warn_only


def compile(
    model: Callable[..., Any] | None = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    backend: Any = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    disable: bool = False,
    name: str | None = None,
    recompile_limit: int | None = None,
) -> Any:
    """A model or function that is captured and replayed: the same numbers, in less time.

    They are the same bit for bit but where a pass adds in another order on a GPU.

    A function that trains (calls backward and an optimizer) is replayed as a whole step; a model or
    another function as a forward and a backward, for each shape, dtype and mode it is called with.
    Calls that cannot be replayed run as they are: with host reads, shapes that depend on values,
    hooks, in inference mode, a second forward before the backward of the first. The first time one
    has to, a warning names the reason, with op and line.

    model: a Module (the result is a module with the same parameters; names in its ``state_dict``
    begin with ``_orig_mod.``) or a function; None makes a decorator.

    fullgraph: True raises CaptureError where the warning would be given.

    disable, or ``VT_COMPILE=0``: the model itself is returned, as with ``backend="eager"``.

    recompile_limit: how many captures are kept, 16 at first. options: ``{"optimize": False}`` replays
    ops as they were recorded; others, ``dynamic``, ``mode`` and ``backend`` have no effect.

    Raises RuntimeError for an unknown mode, and for mode and options together.
    """
    from vibetensor.graphs.compile import compile as compile_model

    del dynamic, name
    return compile_model(
        model,
        fullgraph=fullgraph,
        backend=backend,
        mode=mode,
        options=options,
        disable=disable,
        recompile_limit=recompile_limit,
    )
