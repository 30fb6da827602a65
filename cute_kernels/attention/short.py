"""What attention of short sequences shares: up to 256 queries and keys of 64 values.

A block has one head of one batch whole in shared memory. Its two warpgroups share the rows, 64 at a
time; every sum has one owner, so there are no atomics, and the bits are the same each time.

Memory contract: q, k, v, o and their gradients (B, H, T, 64), dense in the last dimension, any other
strides that are multiples of 8; lse (B, H, T) float32. Rows from T on are neither read nor written.
"""

from dataclasses import dataclass

from ..contract import Extent, Tensor
from ..dsl import (
    DTYPES,
    Float32,
    LayoutEnum,
    OperandMajorMode,
    cpasync,
    cute,
    cutlass,
    hopper,
    warpgroup,
)

WARPGROUP = 128
ROWS = 64
WIDTH = 64
LOG2_E = 1.4426950408889634
DTYPE_CODES = {"bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class ShortVariant:
    """dtype, blocks of 64 rows, and whether a query sees later keys."""

    dtype: str
    blocks: int
    causal: bool

    @property
    def name(self) -> str:
        return f"{self.dtype}_{'causal' if self.causal else 'full'}_{self.blocks * ROWS}"


def owned(group: int, groups: int, blocks: int) -> list[int]:
    """The blocks of a warpgroup: the first with the last, so that causal work is even."""
    if groups == 1:
        return list(range(blocks))
    return [b for b in range(blocks) if (b % 4 in (0, 3)) == (group == 0)]


class Short:
    """What forward and backward share."""

    def __init__(self, variant: ShortVariant) -> None:
        self.blocks = variant.blocks
        self.causal = variant.causal
        self.dtype = DTYPES[DTYPE_CODES[variant.dtype]]
        self.groups = min(2, variant.blocks)
        self.threads = self.groups * WARPGROUP
        self.tile = (ROWS, ROWS, WIDTH)

    def heads(self, t):
        """(B, H, T, 64) as (T, 64, H, B), with the width known."""
        strides = cute.select(t.stride, mode=[2, 3, 1, 0])
        shape = (t.shape[2], WIDTH, t.shape[1], t.shape[0])
        return cute.make_tensor(t.iterator, cute.make_layout(shape, stride=strides))

    def layouts(self):
        """Shared memory of a (T, 64) operand, as rows of 64 and, transposed, as the other operand."""
        rows = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, self.tile, self.dtype, self.blocks)
        columns = hopper.make_smem_layout_b(
            LayoutEnum.COL_MAJOR, (ROWS, WIDTH, ROWS), self.dtype, self.blocks
        )
        return rows, columns

    def mma(self, a_major, b_major, source=warpgroup.OperandSource.SMEM):
        return hopper.make_trivial_tiled_mma(
            self.dtype, self.dtype, a_major, b_major, Float32, (1, 1, 1), (ROWS, ROWS), source
        )

    def sums(self, mma):
        return cute.make_rmem_tensor(mma.partition_shape_C((ROWS, ROWS)), Float32)

    def product(self, kind: str):
        """A fresh one each time: whether it adds is set where it is used."""
        if kind == "rows":  # both operands by rows of 64 values
            return self.mma(OperandMajorMode.K, OperandMajorMode.K)
        return self.mma(OperandMajorMode.K, OperandMajorMode.MN, warpgroup.OperandSource.RMEM)

    @cute.jit
    def multiply(
        self,
        kind: cutlass.Constexpr,
        acc: cute.Tensor,
        a: cute.Tensor,
        b: cute.Tensor,
        fresh: cutlass.Constexpr,
    ) -> None:
        """acc (+)= a b over the last mode of the fragments."""
        mma = self.product(kind)
        for s in cutlass.range_constexpr(cute.size(a, mode=[2])):
            mma.set(warpgroup.Field.ACCUMULATE, not (fresh and s == 0))
            cute.gemm(mma, acc, a[(None, None, s)], b[(None, None, s)], acc)

    @cute.jit
    def rounded(self, acc: cute.Tensor, mma: cute.TiledMma) -> cute.Tensor:
        """Sums as the left operand of the next product: the registers are where it wants them."""
        out = cute.make_rmem_tensor(mma.partition_shape_A((ROWS, ROWS)), self.dtype)
        for i in cutlass.range_constexpr(cute.size(acc)):
            out[i] = acc[i].to(self.dtype)
        return out

    @cute.jit
    def open_barriers(self, barriers: cute.Pointer, count: cutlass.Constexpr) -> None:
        """Makes barriers that one arrival fills, for all threads to see."""
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            with cute.arch.elect_one():
                for b in cutlass.range_constexpr(count):
                    cute.arch.mbarrier_init(barriers + b, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

    @cute.jit
    def bring(
        self,
        load: cute.CopyAtom,
        tiles: cute.Tensor,
        to: cute.Tensor,
        b: cutlass.Constexpr,
        barrier: cute.Pointer,
    ) -> None:
        """Copies one block of an operand's tiles into shared memory."""
        t_s, t_g = cpasync.tma_partition(
            load, 0, cute.make_layout(1), cute.group_modes(to, 0, 2), cute.group_modes(tiles, 0, 2)
        )
        cute.copy(load, t_g[(None, b)], t_s[(None, b)], tma_bar_ptr=barrier)


def tensors(v: ShortVariant, names, access: str) -> tuple[Tensor, ...]:
    """Operands of one shape in a contract."""
    dtype = DTYPE_CODES[v.dtype]
    return tuple(Tensor(n, dtype, ("b", "h", "t", "width"), access) for n in names)


def extents(v: ShortVariant) -> tuple[Extent, ...]:
    """The contract's, the length at most what the blocks hold; `causal` is 0 or 1."""
    return (
        Extent("b"),
        Extent("h"),
        Extent("t", maximum=v.blocks * ROWS),
        Extent("width", divisible_by=WIDTH, minimum=WIDTH, maximum=WIDTH),
        Extent("causal", minimum=int(v.causal), maximum=int(v.causal)),
    )


def probabilities(q, k, scale, causal):
    """The weights and their log-sum-exp, in float64."""
    import numpy as np

    scores = np.asarray(q, np.float64) @ np.asarray(k, np.float64).swapaxes(-1, -2) * scale
    if causal:
        t = scores.shape[-1]
        scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    sums = np.exp(scores - top).sum(-1, keepdims=True)
    return np.exp(scores - top) / sums, (top + np.log(sums))[..., 0]


VARIANTS = tuple(
    ShortVariant(dtype, blocks, causal)
    for dtype in ("bf16",)
    for blocks in (2, 4)
    for causal in (True, False)
)
