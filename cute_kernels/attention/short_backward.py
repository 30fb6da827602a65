"""Attention of short sequences, backward: short.py has the memory contract.

As in Dao et al. ("FlashAttention", 2022) the scores are made again from the saved log-sum-exp, here
twice: by keys for dK and dV, and by queries for dQ. So every sum has one owner, and nothing goes through
float32 scratch.
"""

from ..contract import Contract, Scalar, Tensor
from ..dsl import (
    CUstream,
    Float32,
    Int32,
    SmemAllocator,
    const_expr,
    cpasync,
    cute,
    cutlass,
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
        self.open_barriers(barriers, self.blocks)
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
                        tiles = cute.local_tile(tma, (ROWS, WIDTH), (None, 0, head, batch))
                        self.bring(load, tiles, s, b, barriers + b)
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
        targets = [x[(None, None, head, batch)] for x in (grad_q, grad_k, grad_v)]
        # Gradients by keys first; nobody overwrites an operand before everybody has used it.
        told = length, thread % WARPGROUP, by_rows, by_columns, s_lse, s_delta, targets, scale
        for part in (self.keys, self.queries):
            for g in cutlass.range_constexpr(self.groups):
                if group == g:
                    for b in cutlass.range_constexpr(self.blocks):
                        if const_expr(b in owned(g, self.groups, self.blocks)):
                            if b * ROWS < length:
                                part(b, *told)

    @cute.jit
    def scored(
        self,
        weights: cute.Tensor,
        slopes: cute.Tensor,
        pairs,
        where: cute.Tensor,
        key: cutlass.Constexpr,
        first_key: cutlass.Constexpr,
        first_query: cutlass.Constexpr,
        length: Int32,
        s_lse: cute.Tensor,
        s_delta: cute.Tensor,
        factor: Float32,
    ) -> None:
        """The weights of 64 keys and queries again, and the gradient of their scores.

        pairs: the fragments of q k and of dO v. key: which coordinate of `where` is the key's.
        """
        (a, b), (c, d) = pairs
        warpgroup.fence()
        self.multiply("rows", weights, a, b, True)
        self.multiply("rows", slopes, c, d, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        for x in cutlass.range_constexpr(cute.size(weights)):
            at_key, at_query = where[x][key], where[x][1 - key]
            query = first_query + at_query
            p = cute.math.exp2(weights[x] * factor - s_lse[query], fastmath=True)
            unseen = first_key + at_key >= length or query >= length
            if const_expr(self.causal and first_key == first_query):
                unseen = unseen or at_key > at_query
            if unseen:
                p = Float32(0.0)
            weights[x] = p
            slopes[x] = p * (slopes[x] - s_delta[query])

    @cute.jit
    def keys(
        self,
        j: cutlass.Constexpr,
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
        t_q, _, t_g = by_columns
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
        at_j = (None, None, None, j)
        for i in cutlass.range_constexpr(j if self.causal else 0, self.blocks):
            if i * ROWS < length:
                at_i = (None, None, None, i)
                pairs = (f_k[at_j], f_q[at_i]), (f_v[at_j], f_g[at_i])
                self.scored(
                    weights, slopes, pairs, where, 0, j * ROWS, i * ROWS,
                    length, s_lse, s_delta, factor,
                )  # fmt: skip
                p_half, s_half = self.rounded(weights, columns), self.rounded(slopes, columns)
                warpgroup.fence()
                self.multiply("columns", d_v, p_half, r_g[at_i], False)
                self.multiply("columns", d_k, s_half, r_q[at_i], False)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
        self.write(d_v, Float32(1.0), columns, targets[2], Int32(j * ROWS), length, thread)
        self.write(d_k, scale, columns, targets[1], Int32(j * ROWS), length, thread)

    @cute.jit
    def queries(
        self,
        i: cutlass.Constexpr,
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
        _, t_k, _ = by_columns
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
        at_i = (None, None, None, i)
        for j in cutlass.range_constexpr(i + 1 if self.causal else self.blocks):
            if j * ROWS < length:
                at_j = (None, None, None, j)
                pairs = (f_q[at_i], f_k[at_j]), (f_g[at_i], f_v[at_j])
                self.scored(
                    weights, slopes, pairs, where, 1, j * ROWS, i * ROWS,
                    length, s_lse, s_delta, factor,
                )  # fmt: skip
                s_half = self.rounded(slopes, columns)
                warpgroup.fence()
                self.multiply("columns", d_q, s_half, r_k[at_j], False)
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


def contract(v: ShortVariant) -> Contract:
    lse = Tensor("lse", "float32", ("b", "h", "t"), align=4, stride_divisible_by=1)
    read = tensors(v, ("grad", "q", "k", "v", "o"), "read")
    written = tensors(v, ("grad_q", "grad_k", "grad_v"), "write")
    return Contract(extents(v), (*read, lse, *written), (Scalar("scale", "float32"),))


def reference(grad, q, k, v, scale, causal):
    """The three gradients in float64."""
    import numpy as np

    grad, q, k, v = (np.asarray(x, np.float64) for x in (grad, q, k, v))
    p, _ = probabilities(q, k, scale, causal)
    d_p = grad @ v.swapaxes(-1, -2)
    d_s = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * scale
    return {
        "grad_q": d_s @ k,
        "grad_k": d_s.swapaxes(-1, -2) @ q,
        "grad_v": p.swapaxes(-1, -2) @ grad,
    }


KERNEL = register(
    Kernel(
        name="attention_short_backward",
        doc="The gradients of attention of up to 256 keys.",
        variants=VARIANTS,
        contract=contract,
        make=Backward,
        reference=reference,
        instructions=("HGMMA", "UTMALDG"),
        family="attention",
    )
)
