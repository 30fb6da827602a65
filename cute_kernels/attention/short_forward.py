"""Attention of short sequences, forward: short.py has the memory contract.

The online softmax of Milakov and Gimelshein ("Online normalizer calculation for softmax", 2018).
"""

from ..contract import Contract, Scalar, Tensor
from ..dsl import (
    CUstream,
    Float32,
    Int32,
    LayoutEnum,
    SmemAllocator,
    const_expr,
    cpasync,
    cute,
    cutlass,
    hopper,
    warpgroup,
)
from ..registry import Kernel, register
from .short import (
    LOG2_E,
    ROWS,
    VARIANTS,
    WARPGROUP,
    WIDTH,
    Short,
    ShortVariant,
    extents,
    owned,
    probabilities,
    tensors,
)

# A score that no key has: finite, so that differences of two are no NaN.
NEVER = -1e30


class Forward(Short):
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        o: cute.Tensor,
        lse: cute.Tensor,
        scale: Float32,
        stream: CUstream,
    ) -> None:
        q, k, v, o = (self.heads(t) for t in (q, k, v, o))
        lse = cute.make_tensor(lse.iterator, cute.select(lse.layout, mode=[2, 1, 0]))
        rows, columns = self.layouts()
        one_rows, one_columns = (
            cute.slice_(rows, (None, None, 0)),
            cute.slice_(columns, (None, None, 0)),
        )
        load = cpasync.CopyBulkTensorTileG2SOp()
        v_t = cute.make_tensor(v.iterator, cute.select(v.layout, mode=[1, 0, 2, 3]))
        load_q, tma_q = cpasync.make_tiled_tma_atom(load, q, one_rows, (ROWS, WIDTH))
        load_k, tma_k = cpasync.make_tiled_tma_atom(load, k, one_rows, (ROWS, WIDTH))
        load_v, tma_v = cpasync.make_tiled_tma_atom(load, v_t, one_columns, (WIDTH, ROWS))
        size = cute.cosize(rows)

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.blocks]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, size], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, size], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, size], 1024]

        self.shared = Shared
        self.kernel(
            load_q, tma_q, load_k, tma_k, load_v, tma_v, o, lse, rows, columns, scale
        ).launch(grid=[q.shape[2], q.shape[3], 1], block=[self.threads, 1, 1], stream=stream)

    @cute.kernel
    def kernel(
        self,
        load_q: cute.CopyAtom,
        tma_q: cute.Tensor,
        load_k: cute.CopyAtom,
        tma_k: cute.Tensor,
        load_v: cute.CopyAtom,
        tma_v: cute.Tensor,
        o: cute.Tensor,
        lse: cute.Tensor,
        rows: cute.ComposedLayout,
        columns: cute.ComposedLayout,
        scale: Float32,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        head, batch, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        length = o.shape[0]
        shared = SmemAllocator().allocate(self.shared)
        barriers = shared.barriers.data_ptr()
        s_q = shared.q.get_tensor(rows.outer, swizzle=rows.inner)
        s_k = shared.k.get_tensor(rows.outer, swizzle=rows.inner)
        s_v = shared.v.get_tensor(columns.outer, swizzle=columns.inner)
        block_bytes = ROWS * WIDTH * self.dtype.width // 8
        # One barrier for the queries and keys of a block, one for its values.
        self.open_barriers(barriers, 2 * self.blocks)
        if warp == 0:
            for b in cutlass.range_constexpr(self.blocks):
                if b * ROWS < length:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(barriers + 2 * b, 2 * block_bytes)
                        cute.arch.mbarrier_arrive_and_expect_tx(barriers + 2 * b + 1, block_bytes)
                    rows_of = (ROWS, WIDTH), (None, 0, head, batch)
                    self.bring(load_q, cute.local_tile(tma_q, *rows_of), s_q, b, barriers + 2 * b)
                    self.bring(load_k, cute.local_tile(tma_k, *rows_of), s_k, b, barriers + 2 * b)
                    columns_of = (WIDTH, ROWS), (0, None, head, batch)
                    self.bring(
                        load_v, cute.local_tile(tma_v, *columns_of), s_v, b, barriers + 2 * b + 1
                    )
        group = cute.arch.make_warp_uniform(warp // 4)
        for g in cutlass.range_constexpr(self.groups):
            if group == g:
                for i in cutlass.range_constexpr(self.blocks):
                    if const_expr(i in owned(g, self.groups, self.blocks)):
                        if i * ROWS < length:
                            self.block(
                                i,
                                g,
                                length,
                                thread - g * WARPGROUP,
                                s_q,
                                s_k,
                                s_v,
                                barriers,
                                o[(None, None, head, batch)],
                                lse[(None, head, batch)],
                                scale,
                            )

    @cute.jit
    def block(
        self,
        i: cutlass.Constexpr,
        g: cutlass.Constexpr,
        length: Int32,
        thread: Int32,
        s_q,
        s_k,
        s_v,
        barriers,
        o,
        lse,
        scale: Float32,
    ) -> None:
        """64 queries over the keys they see."""
        qk, pv = self.product("rows"), self.product("columns")
        own = qk.get_slice(0)
        f_q = qk.make_fragment_A(own.partition_A(s_q))
        f_k = qk.make_fragment_B(own.partition_B(s_k))
        f_v = pv.make_fragment_B(pv.get_slice(0).partition_B(s_v))
        where = qk.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, ROWS)))
        out = self.sums(pv)
        out.fill(0.0)
        scores = self.sums(qk)
        top = cute.make_rmem_tensor((2,), Float32)
        total = cute.make_rmem_tensor((2,), Float32)
        top.fill(NEVER)
        total.fill(0.0)
        factor = scale * LOG2_E
        cute.arch.mbarrier_wait(barriers + 2 * i, 0)
        last = i + 1 if const_expr(self.causal) else self.blocks
        for j in cutlass.range_constexpr(last):
            if j * ROWS < length:
                cute.arch.mbarrier_wait(barriers + 2 * j, 0)
                warpgroup.fence()
                self.multiply(
                    "rows", scores, f_q[(None, None, None, i)], f_k[(None, None, None, j)], True
                )
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                for x in cutlass.range_constexpr(cute.size(scores)):
                    at = where[x]
                    unseen = j * ROWS + at[1] >= length
                    if const_expr(self.causal and i == j):
                        unseen = unseen or at[1] > at[0]
                    if unseen:
                        scores[x] = Float32(NEVER)
                for r in cutlass.range_constexpr(2):
                    best = top[r]
                    for c in cutlass.range_constexpr(8):
                        best = cute.arch.fmax(
                            best, cute.arch.fmax(scores[(0, r, c), 0, 0], scores[(1, r, c), 0, 0])
                        )
                    for distance in (1, 2):
                        best = cute.arch.fmax(
                            best, cute.arch.shuffle_sync_bfly(best, offset=distance)
                        )
                    shrink = cute.math.exp2((top[r] - best) * factor, fastmath=True)
                    top[r] = best
                    sum_r = total[r] * shrink
                    for c in cutlass.range_constexpr(8):
                        for e in cutlass.range_constexpr(2):
                            p = cute.math.exp2(
                                (scores[(e, r, c), 0, 0] - best) * factor, fastmath=True
                            )
                            scores[(e, r, c), 0, 0] = p
                            sum_r += p
                            out[(e, r, c), 0, 0] = out[(e, r, c), 0, 0] * shrink
                    total[r] = sum_r
                weights = self.rounded(scores, pv)
                cute.arch.mbarrier_wait(barriers + 2 * j + 1, 0)
                warpgroup.fence()
                self.multiply("columns", out, weights, f_v[(None, None, None, j)], False)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
        for r in cutlass.range_constexpr(2):
            whole = total[r]
            for distance in (1, 2):
                whole += cute.arch.shuffle_sync_bfly(whole, offset=distance)
            inverse = 1.0 / whole
            for c in cutlass.range_constexpr(8):
                for e in cutlass.range_constexpr(2):
                    out[(e, r, c), 0, 0] = out[(e, r, c), 0, 0] * inverse
            row = i * ROWS + where[(0, r, 0), 0, 0][0]
            if thread % 4 == 0 and row < length:
                lse[row] = top[r] * scale + cute.math.log(whole)
        self.write(
            out, Float32(1.0), pv, s_q[(None, None, i)], o, Int32(i * ROWS), length, thread, 1 + g
        )

    @cute.jit
    def write(
        self,
        acc: cute.Tensor,
        scale: Float32,
        mma: cute.TiledMma,
        through: cute.Tensor,
        to: cute.Tensor,
        first: Int32,
        rows: Int32,
        thread: Int32,
        barrier: cutlass.Constexpr,
    ) -> None:
        """Writes 64 rows of sums, through shared memory that this warpgroup has to itself."""
        atom = hopper.get_smem_store_op(LayoutEnum.ROW_MAJOR, self.dtype, Float32)
        to_shared = cute.make_tiled_copy_S(atom, cute.make_tiled_copy_C_atom(atom, mma))
        mine = to_shared.get_slice(thread)
        values = cute.make_rmem_tensor(cute.shape(mine.partition_S(through)), self.dtype)
        sums = to_shared.retile(acc)
        for i in cutlass.range_constexpr(cute.size(acc)):
            values[i] = (sums[i] * scale).to(self.dtype)
        cute.copy(to_shared, values, mine.partition_D(through))
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)
        # 8 threads a row, 16 bytes each.
        for p in cutlass.range_constexpr(ROWS * WIDTH // 8 // WARPGROUP):
            row, column = p * (WARPGROUP // 8) + thread // 8, thread % 8
            if first + row < rows:
                source = cute.local_tile(through, (1, 8), (row, column))
                target = cute.local_tile(to, (1, 8), (first + row, column))
                line = cute.make_rmem_tensor((1, 8), self.dtype)
                cute.autovec_copy(source, line)
                cute.autovec_copy(line, target)
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)


def contract(v: ShortVariant) -> Contract:
    lse = Tensor("lse", "float32", ("b", "h", "t"), "write", align=4, stride_divisible_by=1)
    all_of = (*tensors(v, ("q", "k", "v"), "read"), *tensors(v, ("o",), "write"), lse)
    return Contract(extents(v), all_of, (Scalar("scale", "float32"),))


def reference(q, k, v, scale, causal):
    """o and lse in float64."""
    import numpy as np

    p, lse = probabilities(q, k, scale, causal)
    return {"o": p @ np.asarray(v, np.float64), "lse": lse}


KERNEL = register(
    Kernel(
        name="attention_short_forward",
        doc="Attention of up to 256 keys, with its log-sum-exp.",
        variants=VARIANTS,
        contract=contract,
        make=Forward,
        reference=reference,
        instructions=("HGMMA", "UTMALDG"),
        family="attention",
    )
)
