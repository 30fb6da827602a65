"""Private pools of device memory: what is allocated inside one never mixes with the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from vibetensor.torch.cuda import _backend


class MemPool:
    """A pool of device memory of its own, filled inside :func:`use_mem_pool`.

    Its memory stays with it while this object lives. Tensors may outlive it: their memory goes
    back when they die.

    Args:
        allocator: Must be None; memory always comes from the caching allocator.
        use_on_oom: Must be False; the pool's memory serves the pool only.
        no_split: Must be False; blocks are split.

    Raises:
        NotImplementedError: for other arguments, and with ``VT_CUDA_ALLOC=backend:async``.
    """

    def __init__(
        self, allocator: Any = None, use_on_oom: bool = False, no_split: bool = False
    ) -> None:
        if allocator is not None or use_on_oom or no_split:
            raise NotImplementedError(
                "MemPool: allocator, use_on_oom and no_split are not supported; use MemPool()"
            )
        native = _backend.required()
        self._pool = native._MemPool(native.current_device())

    @property
    def id(self) -> tuple[int, int]:
        """The pool's handle, a pair of numbers; what shares the handle shares the memory."""
        return self._pool.id

    @property
    def device(self) -> int:
        """The index of the device that was current when the pool was made."""
        return self._pool.device

    def use_count(self) -> int:
        """How many hold the pool on its device: this object, and each use_mem_pool block."""
        return self._pool.use_count()

    def snapshot(self, include_traces: bool = True) -> list[dict[str, Any]]:
        """The pool's segments on all devices, as :func:`memory_snapshot` gives them."""
        from vibetensor.torch.cuda.memory_history import memory_snapshot

        return memory_snapshot(self.id, include_traces)

    def __repr__(self) -> str:
        return f"<torch.cuda.MemPool id={self.id}>"


@contextlib.contextmanager
def use_mem_pool(pool: Any, device: Any = None) -> Iterator[None]:
    """Sends what the calling thread allocates inside the block to `pool`.

    Other threads, those that the block starts too, are not concerned. Blocks nest; the innermost
    one counts.

    Args:
        pool: A :class:`MemPool`, or a handle: `MemPool.id` or what :func:`graph_pool_handle` gave.
        device: The device concerned; None is the current one.
    """
    native = _backend.required()
    index = _backend.device_index(device)
    handle = pool_handle(pool)
    if isinstance(pool, MemPool):
        pool._pool.hold(index)
    native.begin_allocate_to_pool(index, handle)
    try:
        yield
    finally:
        native.end_allocate_to_pool(index, handle)


def graph_pool_handle() -> tuple[int, int]:
    """A new handle of a pool, for graphs that are to share memory."""
    return _backend.required().new_pool_handle()


def pool_handle(pool: Any) -> tuple[int, int]:
    """The handle of a MemPool, or a handle as it is. Raises TypeError for anything else."""
    handle = getattr(pool, "id", pool)
    if not (
        isinstance(handle, tuple) and len(handle) == 2 and all(isinstance(n, int) for n in handle)
    ):
        raise TypeError(f"expected a MemPool or its handle (a pair of ints), got {pool!r}")
    return handle
