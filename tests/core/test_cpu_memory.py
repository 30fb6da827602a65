"""The CPU's blocks: kept for reuse, given back whole, in huge pages where the system has them."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

import vibetensor as vt
from vibetensor import _C

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def mapping(address: int) -> tuple[str, str]:
    """The name and the flags of the mapping that holds an address."""
    name = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            name = " ".join(rest[4:]) if start <= address < stop else None
        elif name is not None and first == "VmFlags:":
            return name, " ".join(rest)
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.parametrize("size", [1, 1000, 3 * MIB // 4, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1])
def test_blocks_are_kept_and_given_back(size: int) -> None:
    # Five sizes of each of some classes, so that blocks go back with the bytes they were made with.
    sizes = [size + size // 5 * i for i in range(5)]
    for _ in range(2):
        held = [vt.full((n,), 7, dtype=vt.uint8, device="cpu") for n in sizes]
        assert all(int(t[-1]) == 7 for t in held)
        del held
    _C._cpu_empty_cache()
    assert _C._cpu_memory_stats()["cached_bytes"] == 0


def test_large_blocks_go_back_to_the_system() -> None:
    gc.collect()
    _C._cpu_empty_cache()
    before = resident()
    held = [vt.ones(n * MIB + 5, dtype=vt.uint8, device="cpu") for n in (2, 3, 7, 33, 64)]
    assert resident() - before > 100 * MIB
    del held
    _C._cpu_empty_cache()
    assert resident() - before < 10 * MIB


def test_large_blocks_ask_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("the system has no transparent huge pages")
    # The C library keeps what is freed below its threshold, which the first of these lifts, and
    # would put the block there, among small pages that are in use.
    np.ones(31 * MIB, np.uint8)
    held = [np.ones(30 * MIB, np.uint8) for _ in range(4)]
    above = [np.ones(100_000, np.uint8) for _ in range(4)]
    del held
    block = vt.ones(64 * MIB, dtype=vt.uint8, device="cpu")
    assert block.data_ptr() % (2 * MIB) == 0 and len(above) == 4
    name, flags = mapping(block.data_ptr())
    assert name == "" and "hg" in flags.split()
