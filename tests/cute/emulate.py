"""Compiles a variant to PTX and runs it on tests/cute/ptx_machine.py, from arrays by name."""

from __future__ import annotations

import functools
import re
import struct
from typing import Any

import numpy as np
import ptx_machine
from ptx_machine import Memory, bfloat16_bits, bfloat16_values

from vibetensor.cute_kernels import compile as compiler
from vibetensor.cute_kernels import dsl, registry
from vibetensor.cute_kernels.contract import Tensor


def variant_of(kernel: str, variant: str) -> tuple[registry.Kernel, Any]:
    found = registry.load()[kernel]
    return found, next(v for v in found.variants if v.name == variant)


@functools.cache
def ptx_of(kernel: str, variant: str) -> str:
    found, chosen = variant_of(kernel, variant)
    arguments = compiler.placeholders(found.contract(chosen))
    made = dsl.cute.compile(
        found.make(chosen), *arguments, options=compiler.OPTIONS + " --keep-ptx"
    )
    return made.__ptx__


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """As it lies in memory: bfloat16 as 16 bits."""
    return bfloat16_bits(array) if dtype == "bfloat16" else np.asarray(array).astype(dtype)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """What remains of numbers that are stored as `dtype`."""
    raw = stored(np.asarray(array, np.float32), dtype)
    return bfloat16_values(raw) if dtype == "bfloat16" else raw.astype(np.float32)


def emulate(
    kernel: str,
    variant: str,
    grid: tuple[int, ...],
    extents: dict[str, int],
    arrays: dict[str, Any],
    scalars: dict[str, float] | None = None,
    pad: int = 0,
    memory: Memory | None = None,
) -> dict[str, np.ndarray] | None:
    """Runs a variant; what it writes, by name, as float32 or the integers that it is.

    `arrays`: numbers for what is read; for what is written a start value or "out", which is poison.
    A name equal to another tensor's is that tensor's memory. Rows are `pad` elements longer than they
    are used. None where the kernel trapped.
    """
    found, chosen = variant_of(kernel, variant)
    contract = found.contract(chosen)
    memory = memory or Memory()
    places: dict[str, tuple[int, np.ndarray]] = {}
    blob = b""

    def rows_of(t: Tensor) -> np.ndarray:
        shape = tuple(extents[s] for s in t.shape)
        given = arrays[t.name]
        item = np.uint16 if t.dtype == "bfloat16" else np.dtype(t.dtype)
        storage = np.frombuffer(
            b"\xff" * (int(np.prod(shape[:-1])) * (shape[-1] + _pad(t)) * np.dtype(item).itemsize),
            item,
        ).copy()
        storage = storage.reshape(*shape[:-1], shape[-1] + _pad(t))
        if not isinstance(given, str):
            storage[..., : shape[-1]] = stored(np.asarray(given).reshape(shape), t.dtype)
        return storage

    def _pad(t: Tensor) -> int:
        return pad if len(t.shape) > 1 else 0

    for t in contract.tensors:
        given = arrays.get(t.name)
        address, row = 0, 0
        if isinstance(given, str) and given != "out":
            places[t.name] = places[given]
        elif given is not None:
            storage = rows_of(t)
            places[t.name] = (memory.place(storage), storage)
        if t.name in places:
            address, storage = places[t.name]
            row = storage.shape[-1]
        shape = [extents[s] for s in t.shape]
        blob += struct.pack("<q", address) + struct.pack(f"<{len(shape)}i", *shape)
        blob += b"\0" * (-len(blob) % 8)
        if len(shape) > 1:
            blob += struct.pack("<q", row)
    for s in contract.scalars:
        code = {"float32": "f", "int32": "i", "int64": "q", "uint64": "Q"}[s.type]
        blob += b"\0" * (-len(blob) % struct.calcsize(code))
        blob += struct.pack(f"<{code}", (scalars or {})[s.name])
    text = ptx_of(kernel, variant)
    threads = tuple(int(n) for n in re.search(r"\.reqntid (\d+), (\d+), (\d+)", text).groups())
    whole = (*grid, 1, 1)[:3]
    if not ptx_machine.launch(text, blob, memory, whole, threads):
        return None
    out = {}
    for t in contract.tensors:
        if t.access == "read" or t.name not in places:
            continue
        address, storage = places[t.name]
        read = memory.read(address, storage)
        used = read[..., : extents[t.shape[-1]]]
        if read.shape != used.shape and arrays[t.name] == "out":
            rest = read[..., extents[t.shape[-1]] :]
            assert (rest.view(np.uint8) == 0xFF).all(), f"{t.name}: written past the row's end"
        out[t.name] = bfloat16_values(used) if t.dtype == "bfloat16" else used
    return out
