"""Philox4x32-10 on the device: the numbers of csrc/core/generator.h for a seed and a counter."""

from .dsl import Uint32, Uint64, cute, cutlass


@cute.jit
def philox(seed: Uint64, counter: Uint64):
    """The four 32-bit numbers of a counter."""
    c0, c1 = Uint32(counter & Uint64(0xFFFFFFFF)), Uint32(counter >> Uint64(32))
    c2, c3 = Uint32(0), Uint32(0)
    k0, k1 = Uint32(seed & Uint64(0xFFFFFFFF)), Uint32(seed >> Uint64(32))
    for _ in cutlass.range_constexpr(10):
        p0 = Uint64(c0) * Uint64(0xD2511F53)
        p1 = Uint64(c2) * Uint64(0xCD9E8D57)
        n0 = Uint32(p1 >> Uint64(32)) ^ c1 ^ k0
        n2 = Uint32(p0 >> Uint64(32)) ^ c3 ^ k1
        c1 = Uint32(p1 & Uint64(0xFFFFFFFF))
        c3 = Uint32(p0 & Uint64(0xFFFFFFFF))
        c0 = n0
        c2 = n2
        k0 = k0 + Uint32(0x9E3779B9)
        k1 = k1 + Uint32(0xBB67AE85)
    return c0, c1, c2, c3


def reference(seed, counters):
    """The same in NumPy: (len(counters), 4) numbers."""
    import numpy as np

    counters = np.asarray(counters, np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c0, c1 = counters & low, counters >> np.uint64(32)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        n0 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        n2 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c0, c1, c2, c3 = n0, p1 & low, n2, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)
