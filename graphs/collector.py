"""Work that makes many objects and no garbage in cycles, without Python's collector in between."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No automatic collections meanwhile; `gc.collect()` still works. What passes make of a tape of
    thousands of ops starts collections of all objects there are, which can take longer than the
    passes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:  # who had switched it off, another thread in here too, is left to switch it on
            gc.enable()
