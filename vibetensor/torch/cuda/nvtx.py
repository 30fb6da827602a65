"""torch.cuda.nvtx: ranges and marks that profilers show (Nsight Systems), and ranges of ops.

Where NVIDIA's library of these (the package `nvidia-nvtx`, or a CUDA toolkit) is missing, everything
here does nothing. No GPU is needed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from vibetensor import _C
from vibetensor._environment import env_flag

__all__ = [
    "is_available",
    "mark",
    "mark_ops",
    "op_ranges",
    "range",
    "range_end",
    "range_pop",
    "range_push",
    "range_start",
]

_SONAMES = ("libnvtx3interop.so.1", "libnvToolsExt.so.1")


@functools.cache
def is_available() -> bool:
    """Whether the library was found; it is looked for once."""
    from vibetensor.torch.cuda._backend import _find_library

    if _C.nvtx.is_open():
        return True
    found = (_find_library(name) for name in ("nvtx3interop", "nvToolsExt"))
    return any(_C.nvtx.open(path) for path in (*filter(None, found), *_SONAMES))


def range_push(msg: str) -> int:
    """Begins a range inside those of this thread; returns its depth, from 0 (negative: no library)."""
    return _C.nvtx.push(msg) if is_available() else -1


def range_pop() -> int:
    """Ends the range that this thread began last; returns its depth (negative: there is none)."""
    return _C.nvtx.pop() if is_available() else -1


@contextlib.contextmanager
def range(msg: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """A range around a block, or as a decorator around a function; msg is formatted with the
    arguments by ``str.format``."""
    range_push(msg.format(*args, **kwargs))
    try:
        yield
    finally:
        range_pop()


def range_start(msg: str) -> int:
    """Begins a range that any thread may end; returns what `range_end` takes."""
    return _C.nvtx.start(msg) if is_available() else 0


def range_end(range_id: int) -> None:
    """Ends a range that `range_start` began."""
    if is_available():
        _C.nvtx.end(range_id)


def mark(msg: str) -> None:
    """Marks a moment."""
    if is_available():
        _C.nvtx.mark(msg)


def mark_ops(enabled: bool = True) -> bool:
    """Makes every op of all threads a range of its name, with the ops that it is made of inside, or
    ends that; returns whether it was so.

    Eager ops are, those of a captured step as it is recorded and as it is lowered to a graph (the
    ranges then hold the launches that become its nodes), and on the CPU those of each replay.
    `VT_NVTX=1` does it from the start. Costs each op a fraction of a microsecond; nothing while it
    is off.
    """
    return bool(_C.nvtx.mark_ops(bool(enabled) and is_available()))


@contextlib.contextmanager
def op_ranges(enabled: bool = True) -> Iterator[None]:
    """`mark_ops` for a block."""
    before = mark_ops(enabled)
    try:
        yield
    finally:
        mark_ops(before)


if env_flag("VT_NVTX", False):
    mark_ops()
