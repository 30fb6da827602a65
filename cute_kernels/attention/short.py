"""Attention of short sequences: up to 256 queries and keys of 64 values, forward and backward.

A block has one head of one batch whole in shared memory. Its two warpgroups share the rows, 64 at a
time. The forward is the online softmax of Milakov and Gimelshein ("Online normalizer calculation for
softmax", 2018), the backward that of Dao et al. ("FlashAttention", 2022): the scores are made again
from the saved log-sum-exp, once by keys for dK and dV and once by queries for dQ, so that every sum has
one owner: no atomics, no float32 scratch, the same bits each time.

Memory contract: q, k, v, o and their gradients (B, H, T, 64), dense in the last dimension, any other
strides that are multiples of 8; lse (B, H, T) float32. Rows from T on are neither read nor written.
"""

from dataclasses import dataclass

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import (
    DTYPES,
    CUstream,
    Float32,
    Int32,
    LayoutEnum,
    OperandMajorMode,
    SmemAllocator,
    const_expr,
    cpasync,
    cute,
    cutlass,
    hopper,
    warpgroup,
)
from ..registry import Kernel, register

WARPGROUP = 128
ROWS = 64
WIDTH = 64
LOG2_E = 1.4426950408889634
# A score that no key has: finite, so that differences of two are no NaN.
NEVER = -1e30
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
        if warp == 0:
            with cute.arch.elect_one():
                for b in cutlass.range_constexpr(2 * self.blocks):
                    cute.arch.mbarrier_init(barriers + b, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        one = cute.make_layout(1)
        if warp == 0:
            for b in cutlass.range_constexpr(self.blocks):
                if b * ROWS < length:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(barriers + 2 * b, 2 * block_bytes)
                        cute.arch.mbarrier_arrive_and_expect_tx(barriers + 2 * b + 1, block_bytes)
                    for load, tma, s, bar in ((load_q, tma_q, s_q, 0), (load_k, tma_k, s_k, 0)):
                        g = cute.local_tile(tma, (ROWS, WIDTH), (None, 0, head, batch))
                        t_s, t_g = cpasync.tma_partition(
                            load, 0, one, cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
                        )
                        cute.copy(
                            load, t_g[(None, b)], t_s[(None, b)], tma_bar_ptr=barriers + 2 * b + bar
                        )
                    g = cute.local_tile(tma_v, (WIDTH, ROWS), (0, None, head, batch))
                    t_s, t_g = cpasync.tma_partition(
                        load_v, 0, one, cute.group_modes(s_v, 0, 2), cute.group_modes(g, 0, 2)
                    )
                    cute.copy(
                        load_v, t_g[(None, b)], t_s[(None, b)], tma_bar_ptr=barriers + 2 * b + 1
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


class Backward(Short):
    @cute.jit
    def __call__(
        self,
        grad: cute.Tensor,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        o: cute.Tensor,
        lse: cute.Tensor,
        grad_q: cute.Tensor,
        grad_k: cute.Tensor,
        grad_v: cute.Tensor,
        scale: Float32,
        stream: CUstream,
    ) -> None:
        grad, q, k, v, o, grad_q, grad_k, grad_v = (
            self.heads(t) for t in (grad, q, k, v, o, grad_q, grad_k, grad_v)
        )
        lse = cute.make_tensor(lse.iterator, cute.select(lse.layout, mode=[2, 1, 0]))
        rows, columns = self.layouts()
        one = cute.slice_(rows, (None, None, 0))
        load = cpasync.CopyBulkTensorTileG2SOp()
        loads = [cpasync.make_tiled_tma_atom(load, x, one, (ROWS, WIDTH)) for x in (q, k, v, grad)]
        (load_q, tma_q), (load_k, tma_k), (load_v, tma_v), (load_g, tma_g) = loads
        size = cute.cosize(rows)

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, self.blocks]
            lse: cute.struct.MemRange[Float32, self.blocks * ROWS]
            delta: cute.struct.MemRange[Float32, self.blocks * ROWS]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, size], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, size], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, size], 1024]
            grad: cute.struct.Align[cute.struct.MemRange[self.dtype, size], 1024]

        self.shared = Shared
        self.kernel(
            load_q,
            tma_q,
            load_k,
            tma_k,
            load_v,
            tma_v,
            load_g,
            tma_g,
            grad,
            o,
            lse,
            grad_q,
            grad_k,
            grad_v,
            rows,
            columns,
            scale,
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
        load_g: cute.CopyAtom,
        tma_g: cute.Tensor,
        grad: cute.Tensor,
        o: cute.Tensor,
        lse: cute.Tensor,
        grad_q: cute.Tensor,
        grad_k: cute.Tensor,
        grad_v: cute.Tensor,
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
        by_rows = [
            x.get_tensor(rows.outer, swizzle=rows.inner)
            for x in (shared.q, shared.k, shared.v, shared.grad)
        ]
        by_columns = [
            x.get_tensor(columns.outer, swizzle=columns.inner)
            for x in (shared.q, shared.k, shared.grad)
        ]
        s_lse = shared.lse.get_tensor(cute.make_layout(self.blocks * ROWS))
        s_delta = shared.delta.get_tensor(cute.make_layout(self.blocks * ROWS))
        if warp == 0:
            with cute.arch.elect_one():
                for b in cutlass.range_constexpr(self.blocks):
                    cute.arch.mbarrier_init(barriers + b, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        one = cute.make_layout(1)
        if warp == 0:
            for b in cutlass.range_constexpr(self.blocks):
                if b * ROWS < length:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(
                            barriers + b, 4 * ROWS * WIDTH * self.dtype.width // 8
                        )
                    for load, tma, s in zip(
                        (load_q, load_k, load_v, load_g), (tma_q, tma_k, tma_v, tma_g), by_rows
                    ):
                        g = cute.local_tile(tma, (ROWS, WIDTH), (None, 0, head, batch))
                        t_s, t_g = cpasync.tma_partition(
                            load, 0, one, cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
                        )
                        cute.copy(load, t_g[(None, b)], t_s[(None, b)], tma_bar_ptr=barriers + b)
        # delta = rowsum(dO O): 8 threads a row, 16 bytes each; the log-sum-exp in units of log 2.
        for p in cutlass.range_constexpr(self.blocks * ROWS * 8 // self.threads):
            row = p * (self.threads // 8) + thread // 8
            total = Float32(0.0)
            if row < length:
                a = cute.make_rmem_tensor((1, 8), self.dtype)
                b = cute.make_rmem_tensor((1, 8), self.dtype)
                cute.autovec_copy(
                    cute.local_tile(grad[(None, None, head, batch)], (1, 8), (row, thread % 8)), a
                )
                cute.autovec_copy(
                    cute.local_tile(o[(None, None, head, batch)], (1, 8), (row, thread % 8)), b
                )
                for x in cutlass.range_constexpr(8):
                    total += a[x].to(Float32) * b[x].to(Float32)
            for distance in (1, 2, 4):
                total += cute.arch.shuffle_sync_bfly(total, offset=distance)
            if thread % 8 == 0:
                s_delta[row] = total
                value = Float32(0.0)
                if row < length:
                    value = lse[row, head, batch] * LOG2_E
                s_lse[row] = value
        cute.arch.sync_threads()
        for b in cutlass.range_constexpr(self.blocks):
            if b * ROWS < length:
                cute.arch.mbarrier_wait(barriers + b, 0)
        group = cute.arch.make_warp_uniform(warp // 4)
        mine = thread % WARPGROUP
        targets = [x[(None, None, head, batch)] for x in (grad_q, grad_k, grad_v)]
        # Gradients by keys first; nobody overwrites an operand before everybody has used it.
        for g in cutlass.range_constexpr(self.groups):
            if group == g:
                for j in cutlass.range_constexpr(self.blocks):
                    if const_expr(j in owned(g, self.groups, self.blocks)):
                        if j * ROWS < length:
                            self.keys(
                                j,
                                g,
                                length,
                                mine,
                                by_rows,
                                by_columns,
                                s_lse,
                                s_delta,
                                targets,
                                scale,
                            )
        for g in cutlass.range_constexpr(self.groups):
            if group == g:
                for i in cutlass.range_constexpr(self.blocks):
                    if const_expr(i in owned(g, self.groups, self.blocks)):
                        if i * ROWS < length:
                            self.queries(
                                i,
                                g,
                                length,
                                mine,
                                by_rows,
                                by_columns,
                                s_lse,
                                s_delta,
                                targets,
                                scale,
                            )

    @cute.jit
    def keys(
        self,
        j: cutlass.Constexpr,
        g: cutlass.Constexpr,
        length: Int32,
        thread: Int32,
        by_rows,
        by_columns,
        s_lse,
        s_delta,
        targets,
        scale: Float32,
    ) -> None:
        """dK and dV of 64 keys: scores are held transposed, keys by queries."""
        s_q, s_k, s_v, s_g = by_rows
        t_q, t_k, t_g = by_columns
        rows, columns = self.product("rows"), self.product("columns")
        own, turned = rows.get_slice(0), columns.get_slice(0)
        f_k, f_v = (rows.make_fragment_A(own.partition_A(s)) for s in (s_k, s_v))
        f_q, f_g = (rows.make_fragment_B(own.partition_B(s)) for s in (s_q, s_g))
        r_q, r_g = (columns.make_fragment_B(turned.partition_B(s)) for s in (t_q, t_g))
        where = rows.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, ROWS)))
        d_k, d_v = self.sums(columns), self.sums(columns)
        d_k.fill(0.0)
        d_v.fill(0.0)
        weights, slopes = self.sums(rows), self.sums(rows)
        factor = scale * LOG2_E
        for i in cutlass.range_constexpr(j if self.causal else 0, self.blocks):
            if i * ROWS < length:
                warpgroup.fence()
                self.multiply(
                    "rows", weights, f_k[(None, None, None, j)], f_q[(None, None, None, i)], True
                )
                self.multiply(
                    "rows", slopes, f_v[(None, None, None, j)], f_g[(None, None, None, i)], True
                )
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                for x in cutlass.range_constexpr(cute.size(weights)):
                    key, query = where[x][0], where[x][1]
                    p = cute.math.exp2(weights[x] * factor - s_lse[i * ROWS + query], fastmath=True)
                    unseen = j * ROWS + key >= length or i * ROWS + query >= length
                    if const_expr(self.causal and i == j):
                        unseen = unseen or key > query
                    if unseen:
                        p = Float32(0.0)
                    weights[x] = p
                    slopes[x] = p * (slopes[x] - s_delta[i * ROWS + query])
                p_half, s_half = self.rounded(weights, columns), self.rounded(slopes, columns)
                warpgroup.fence()
                self.multiply("columns", d_v, p_half, r_g[(None, None, None, i)], False)
                self.multiply("columns", d_k, s_half, r_q[(None, None, None, i)], False)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
        self.write(d_v, Float32(1.0), columns, targets[2], Int32(j * ROWS), length, thread)
        self.write(d_k, scale, columns, targets[1], Int32(j * ROWS), length, thread)

    @cute.jit
    def queries(
        self,
        i: cutlass.Constexpr,
        g: cutlass.Constexpr,
        length: Int32,
        thread: Int32,
        by_rows,
        by_columns,
        s_lse,
        s_delta,
        targets,
        scale: Float32,
    ) -> None:
        """dQ of 64 queries."""
        s_q, s_k, s_v, s_g = by_rows
        t_q, t_k, t_g = by_columns
        rows, columns = self.product("rows"), self.product("columns")
        own, turned = rows.get_slice(0), columns.get_slice(0)
        f_q, f_g = (rows.make_fragment_A(own.partition_A(s)) for s in (s_q, s_g))
        f_k, f_v = (rows.make_fragment_B(own.partition_B(s)) for s in (s_k, s_v))
        r_k = columns.make_fragment_B(turned.partition_B(t_k))
        where = rows.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, ROWS)))
        d_q = self.sums(columns)
        d_q.fill(0.0)
        weights, slopes = self.sums(rows), self.sums(rows)
        factor = scale * LOG2_E
        for j in cutlass.range_constexpr(i + 1 if self.causal else self.blocks):
            if j * ROWS < length:
                warpgroup.fence()
                self.multiply(
                    "rows", weights, f_q[(None, None, None, i)], f_k[(None, None, None, j)], True
                )
                self.multiply(
                    "rows", slopes, f_g[(None, None, None, i)], f_v[(None, None, None, j)], True
                )
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                for x in cutlass.range_constexpr(cute.size(weights)):
                    query, key = where[x][0], where[x][1]
                    p = cute.math.exp2(weights[x] * factor - s_lse[i * ROWS + query], fastmath=True)
                    unseen = j * ROWS + key >= length or i * ROWS + query >= length
                    if const_expr(self.causal and i == j):
                        unseen = unseen or key > query
                    if unseen:
                        p = Float32(0.0)
                    slopes[x] = p * (slopes[x] - s_delta[i * ROWS + query])
                s_half = self.rounded(slopes, columns)
                warpgroup.fence()
                self.multiply("columns", d_q, s_half, r_k[(None, None, None, j)], False)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
        self.write(d_q, scale, columns, targets[0], Int32(i * ROWS), length, thread)

    @cute.jit
    def write(
        self,
        acc: cute.Tensor,
        scale: Float32,
        mma: cute.TiledMma,
        to: cute.Tensor,
        first: Int32,
        rows: Int32,
        thread: Int32,
    ) -> None:
        """Writes 64 rows of sums, two values at a time: the operands in shared memory are still needed."""
        where = mma.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, WIDTH)))
        for r in cutlass.range_constexpr(2):
            row = first + where[(0, r, 0), 0, 0][0]
            for c in cutlass.range_constexpr(8):
                if row < rows:
                    pair = cute.make_rmem_tensor((1, 2), self.dtype)
                    pair[0] = (acc[(0, r, c), 0, 0] * scale).to(self.dtype)
                    pair[1] = (acc[(1, r, c), 0, 0] * scale).to(self.dtype)
                    cute.autovec_copy(
                        pair, cute.local_tile(to, (1, 2), (row, where[(0, r, c), 0, 0][1] // 2))
                    )


def _tensors(v: ShortVariant, names, access: str) -> tuple[Tensor, ...]:
    dtype = DTYPE_CODES[v.dtype]
    return tuple(Tensor(n, dtype, ("b", "h", "t", "width"), access) for n in names)


def _extents(v: ShortVariant) -> tuple[Extent, ...]:
    return (
        Extent("b"),
        Extent("h"),
        Extent("t", maximum=v.blocks * ROWS),
        Extent("width", divisible_by=WIDTH, minimum=WIDTH, maximum=WIDTH),
    )


def forward_contract(v: ShortVariant) -> Contract:
    lse = Tensor("lse", "float32", ("b", "h", "t"), "write", align=4, stride_divisible_by=1)
    tensors = (*_tensors(v, ("q", "k", "v"), "read"), *_tensors(v, ("o",), "write"), lse)
    return Contract(_extents(v), tensors, (Scalar("scale", "float32"),))


def backward_contract(v: ShortVariant) -> Contract:
    lse = Tensor("lse", "float32", ("b", "h", "t"), align=4, stride_divisible_by=1)
    read = _tensors(v, ("grad", "q", "k", "v", "o"), "read")
    written = _tensors(v, ("grad_q", "grad_k", "grad_v"), "write")
    return Contract(_extents(v), (*read, lse, *written), (Scalar("scale", "float32"),))


def _probabilities(q, k, scale, causal):
    import numpy as np

    scores = np.asarray(q, np.float64) @ np.asarray(k, np.float64).swapaxes(-1, -2) * scale
    if causal:
        t = scores.shape[-1]
        scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    sums = np.exp(scores - top).sum(-1, keepdims=True)
    return np.exp(scores - top) / sums, (top + np.log(sums))[..., 0]


def forward_reference(q, k, v, scale, causal):
    """o and lse in float64."""
    import numpy as np

    p, lse = _probabilities(q, k, scale, causal)
    return {"o": p @ np.asarray(v, np.float64), "lse": lse}


def backward_reference(grad, q, k, v, scale, causal):
    """The three gradients in float64."""
    import numpy as np

    grad, q, k, v = (np.asarray(x, np.float64) for x in (grad, q, k, v))
    p, _ = _probabilities(q, k, scale, causal)
    d_p = grad @ v.swapaxes(-1, -2)
    d_s = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * scale
    return {
        "grad_q": d_s @ k,
        "grad_k": d_s.swapaxes(-1, -2) @ q,
        "grad_v": p.swapaxes(-1, -2) @ grad,
    }


VARIANTS = tuple(
    ShortVariant(dtype, blocks, causal)
    for dtype in ("bf16",)
    for blocks in (2, 4)
    for causal in (True, False)
)
FORWARD = register(
    Kernel(
        name="attention_short_forward",
        doc="Attention of up to 256 keys, with its log-sum-exp.",
        variants=VARIANTS,
        contract=forward_contract,
        make=Forward,
        reference=forward_reference,
        instructions=("HGMMA", "UTMALDG"),
        family="attention",
    )
)
BACKWARD = register(
    Kernel(
        name="attention_short_backward",
        doc="The gradients of attention of up to 256 keys.",
        variants=VARIANTS,
        contract=backward_contract,
        make=Backward,
        reference=backward_reference,
        instructions=("HGMMA", "UTMALDG"),
        family="attention",
    )
)
