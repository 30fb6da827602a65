"""Private pools: what goes into one, for how long it stays, and who may share it."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

import vibetensor.torch as torch
from vibetensor.torch.cuda import memory

MiB = 1 << 20
pytestmark = pytest.mark.skipif(
    memory.get_allocator_backend() != "native", reason="needs the native allocator"
)


def make(n: int = 1000) -> Any:
    return torch.empty(n, device="cuda")


def pools_in_use() -> set[tuple[int, int]]:
    return {row["pool"] for row in torch.cuda.pool_stats()}


def test_pool_is_filled_by_its_block_and_thread() -> None:
    pool, outer = torch.cuda.MemPool(), torch.cuda.MemPool()
    assert pool.id != outer.id and pool.id[0] > 0 and pool.id[1] == 0
    assert pool.use_count() == 1 and pool.snapshot() == []
    found: list[Any] = []
    with torch.cuda.use_mem_pool(outer):
        first = make(5000)
        with torch.cuda.use_mem_pool(pool):
            assert pool.use_count() == 2
            inside = make(100_000)
            thread = threading.Thread(target=lambda: found.append(make(3000)))
            thread.start()
            thread.join()
        second = make(6000)
    outside = make(7000)

    def owner(tensor: Any) -> tuple[int, int]:
        address = tensor.data_ptr()
        for segment in torch.cuda.memory_snapshot():
            if any(b["address"] == address for b in segment["blocks"]):
                return segment["segment_pool_id"]
        raise AssertionError("not in any segment")

    assert owner(inside) == pool.id and owner(first) == owner(second) == outer.id
    assert owner(found[0]) == owner(outside) == (0, 0)
    assert {s["segment_pool_id"] for s in pool.snapshot()} == {pool.id}
    assert pool.use_count() == 1
    stats = torch.cuda.memory_stats()
    name = f"pool.{pool.id[0]}_{pool.id[1]}"
    assert stats[f"{name}.allocated_bytes"] == 400_384 and stats[f"{name}.use_count"] == 1
    assert stats[f"{name}.blocks"] == 1
    assert f"{pool.id}" in torch.cuda.memory_summary()
    nested = torch.cuda.memory_stats_as_nested_dict()
    assert nested["allocated_bytes"]["all"]["current"] == torch.cuda.memory_allocated()


def test_pool_keeps_its_memory_and_tensors_outlive_it() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        kept, gone = torch.full((MiB,), 5.0, device="cuda"), make(20 * MiB)
    del gone
    torch.cuda.empty_cache()  # somebody holds the pool
    (row,) = [r for r in torch.cuda.pool_stats() if r["pool"] == pool.id]
    assert row["cached"] >= 80 * MiB and row["allocated"] == 4 * MiB
    name = pool.id
    del pool
    gc.collect()
    torch.cuda.empty_cache()
    (row,) = [r for r in torch.cuda.pool_stats() if r["pool"] == name]
    assert row["use_count"] == 0 and row["cached"] < 16 * MiB
    assert (kept == 5).all().item()
    del kept
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert name not in pools_in_use()


def test_handles_share_memory() -> None:
    handle = torch.cuda.graph_pool_handle()
    assert handle[0] == 0 and handle != torch.cuda.graph_pool_handle()
    with torch.cuda.use_mem_pool(handle):
        address = make(MiB).data_ptr()
    with torch.cuda.use_mem_pool(handle):
        assert make(MiB).data_ptr() == address
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool.id):
        make(MiB)
    assert pool.id in pools_in_use() and handle in pools_in_use()
    with pytest.raises(RuntimeError), torch.cuda.use_mem_pool(pool):
        raise RuntimeError("the block ends all the same")
    assert pool.use_count() == 1


def test_pools_are_refused_with_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="expected a MemPool"), torch.cuda.use_mem_pool("x"):
        pass
    with pytest.raises(TypeError, match="expected a MemPool"):
        torch.cuda.memory_snapshot("x")
    with pytest.raises(ValueError, match="default pool"), torch.cuda.use_mem_pool((0, 0)):
        pass
    with pytest.raises(NotImplementedError, match="no_split"):
        torch.cuda.MemPool(no_split=True)
