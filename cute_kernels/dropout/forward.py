"""Dropout: y = x * scale where an element's number is at least `limit` (p times 2^32), else 0.

Element i takes lane i % 4 of counter `offset` + i / 4: the numbers csrc/core/generator.h gives, so
which elements stay does not depend on the kernel. With `state` (device memory: seed, offset) a
replay of a captured launch draws new numbers: they replace the seed and are added to the offset.
"""

from dataclasses import dataclass

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import DTYPES, CUstream, Float32, Int64, Uint8, Uint64, const_expr, cute, cutlass
from ..philox import philox
from ..philox import reference as philox_reference
from ..registry import Kernel, register
from ..rows import present

DTYPE_CODES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class DropoutVariant:
    """dtype, elements of a thread (whole counters) and threads of a block."""

    dtype: str
    width: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.dtype}_{self.threads}"


VARIANTS = (
    DropoutVariant("bf16", 8, 256),
    DropoutVariant("f16", 8, 256),
    DropoutVariant("f32", 4, 256),
)


def contract(v: DropoutVariant) -> Contract:
    return Contract(
        extents=(Extent("n", divisible_by=8), Extent("words", minimum=2, maximum=2)),
        tensors=(
            Tensor("x", DTYPE_CODES[v.dtype], ("n",)),
            Tensor("y", DTYPE_CODES[v.dtype], ("n",), "write", may_alias=("x",)),
            Tensor("mask", "uint8", ("n",), "write", align=8, optional=True),
            Tensor("state", "int64", ("words",), align=8, optional=True),
        ),
        scalars=(
            Scalar("limit", "uint64"),
            Scalar("scale", "float32"),
            Scalar("seed", "uint64"),
            Scalar("offset", "uint64"),
        ),
    )


class DropoutForward:
    def __init__(self, variant: DropoutVariant):
        self.v = variant
        self.dtype = DTYPES[DTYPE_CODES[variant.dtype]]

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        y: cute.Tensor,
        mask: cute.Tensor,
        state: cute.Tensor,
        limit: Uint64,
        scale: Float32,
        seed: Uint64,
        offset: Uint64,
        stream: CUstream,
    ):
        self.kernel(x, y, mask, state, limit, scale, seed, offset).launch(
            grid=[cute.ceil_div(x.shape[0], self.v.threads * self.v.width), 1, 1],
            block=[self.v.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        y: cute.Tensor,
        mask: cute.Tensor,
        state: cute.Tensor,
        limit: Uint64,
        scale: Float32,
        seed: Uint64,
        offset: Uint64,
    ):
        width = self.v.width
        t, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        # In 64 bits: the last block's threads may lie past 2^31 elements.
        number = Int64(block) * self.v.threads + t
        first = number * width
        if first < Int64(x.shape[0]):
            if present(state):
                seed = Uint64(state[0])
                offset = offset + Uint64(state[1])
            stored = cute.make_rmem_tensor((width,), self.dtype)
            values = cute.make_rmem_tensor((width,), Float32)
            kept = cute.make_rmem_tensor((width,), Uint8)
            source = cute.make_tensor((x.iterator + first).align(16), cute.make_layout(width))
            cute.autovec_copy(source, stored)
            values.store(stored.load().to(Float32) * scale)
            counter = offset + Uint64(number) * Uint64(width // 4)
            for c in cutlass.range_constexpr(width // 4):
                drawn = philox(seed, counter + Uint64(c))
                for k in cutlass.range_constexpr(4):
                    kept[4 * c + k] = Uint8(1)
                    if Uint64(drawn[k]) < limit:
                        kept[4 * c + k] = Uint8(0)
                        values[4 * c + k] = Float32(0)
            stored.store(values.load().to(self.dtype))
            target = cute.make_tensor((y.iterator + first).align(16), cute.make_layout(width))
            cute.autovec_copy(stored, target)
            if present(mask):
                if const_expr(width == 8):
                    place = (mask.iterator + first).align(8)
                else:
                    place = (mask.iterator + first).align(4)
                cute.autovec_copy(kept, cute.make_tensor(place, cute.make_layout(width)))


def reference(x, limit, scale, seed, offset, state=None):
    """y in float64, and mask."""
    import numpy as np

    x = np.asarray(x, np.float64)
    if state is not None:
        seed, offset = int(state[0]), offset + int(state[1])
    counters = np.arange(-(-x.size // 4), dtype=np.uint64) + np.uint64(offset)
    kept = philox_reference(seed, counters).reshape(-1)[: x.size].astype(np.uint64) >= limit
    return {"y": np.where(kept, x * scale, 0), "mask": kept.astype(np.uint8)}


register(
    Kernel(
        name="dropout_forward",
        doc="Dropout with the numbers of the library's generator; the mask out.",
        variants=VARIANTS,
        contract=contract,
        make=DropoutForward,
        reference=reference,
    )
)
