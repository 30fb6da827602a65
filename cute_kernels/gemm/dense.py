"""Matrix products: d = epilogue(a bᵀ), batched, bfloat16 or float16 in, float32 sums.

One block a SM takes tiles of d in turn. The first warp loads tiles of a and b by TMA into a ring of
stages. The other warpgroups multiply them by wgmma, 64 rows of the tile each, apply the epilogue to
their sums in registers, and write them through shared memory by TMA.

Memory contract: the operands are dense in their last dimension; what lies beyond them reads as zero
(TMA fills it in) and is not written. d may be c, and no other operand.
"""

from dataclasses import dataclass

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import (
    DTYPES,
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
    pipeline,
    warpgroup,
)
from ..registry import Kernel, register
from .epilogue import Epilogue, activated, reference_activation, reference_slope, slope

WARPGROUP = 128
WARPS = 4  # of a warpgroup
# Tiles that share columns of b run together: those stay in L2.
BAND = 8
# setmaxregister: the loading warpgroup needs few, what it gives up goes to the others.
LOADER_REGISTERS, WORKER_REGISTERS = 40, 232
DTYPE_CODES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class GemmVariant:
    """dtypes of the operands and of d; which dimension of a and of b is dense ("k", or "m" and "n");
    the tile, the stages of the ring, and columns and stages of the way out."""

    dtype: str = "bf16"
    out: str = "bf16"
    a_dense: str = "k"
    b_dense: str = "k"
    tile_m: int = 128
    tile_n: int = 256
    tile_k: int = 64
    stages: int = 4
    out_columns: int = 64
    out_stages: int = 2

    @property
    def name(self) -> str:
        return f"{self.dtype}_{self.out}_{self.tile_m}x{self.tile_n}x{self.stages}"


def contract(v: GemmVariant, e: Epilogue) -> Contract:
    dtype, out = DTYPE_CODES[v.dtype], DTYPE_CODES[v.out]

    def operand(name: str, rows: str, dense: str) -> Tensor:
        return Tensor(name, dtype, ("l", rows, "k") if dense == "k" else ("l", "k", rows))

    def like_d(name: str, access: str, alias: tuple[str, ...] = ()) -> Tensor:
        return Tensor(name, out, ("l", "m", "n"), access, may_alias=alias)

    tensors = [operand("a", "m", v.a_dense), operand("b", "n", v.b_dense)]
    if e.bias:
        tensors.append(Tensor("bias", dtype, ("n",)))
    if e.save or e.slope_at_z:
        tensors.append(like_d("z", "write" if e.save else "read"))
    if e.add:
        tensors.append(like_d("c", "read"))
    tensors.append(like_d("d", "write", ("c",) if e.add else ()))
    extents = [Extent("l"), Extent("m"), Extent("n", divisible_by=8), Extent("k", divisible_by=8)]
    if v.a_dense == "m":
        extents[1] = Extent("m", divisible_by=8)
    if e.column_sums:
        # One row for each warp of each tile.
        tensors.append(
            Tensor("sums", "float32", ("warps", "n"), "write", align=4, stride_divisible_by=1)
        )
        extents.append(Extent("warps"))
    return Contract(tuple(extents), tuple(tensors), (Scalar("max_blocks", "int32"),))


class Gemm:
    def __init__(self, variant: GemmVariant, epilogue: Epilogue) -> None:
        self.v = variant
        self.e = epilogue
        self.tile = (variant.tile_m, variant.tile_n, variant.tile_k)
        self.workers = variant.tile_m // 64  # warpgroups
        self.threads = WARPGROUP * (1 + self.workers)
        self.dtype = DTYPES[DTYPE_CODES[variant.dtype]]
        self.out = DTYPES[DTYPE_CODES[variant.out]]
        self.pieces = variant.tile_n // variant.out_columns

    def launch(self, a, b, bias, z, c, d, sums, max_blocks: Int32, stream: CUstream) -> None:
        """Traced: all arguments are the contract's, or None where the epilogue has none."""
        v = self.v

        def matrix(t, order):
            return (
                None
                if t is None
                else cute.make_tensor(t.iterator, cute.select(t.layout, mode=order))
            )

        # (L, rows, k) or (L, k, rows) to (rows, k, L); the dense dimension stays what it is.
        a = matrix(a, [1, 2, 0] if v.a_dense == "k" else [2, 1, 0])
        b = matrix(b, [1, 2, 0] if v.b_dense == "k" else [2, 1, 0])
        z, c, d = (matrix(t, [1, 2, 0]) for t in (z, c, d))
        major_a = LayoutEnum.ROW_MAJOR if v.a_dense == "k" else LayoutEnum.COL_MAJOR
        major_b = LayoutEnum.ROW_MAJOR if v.b_dense == "k" else LayoutEnum.COL_MAJOR
        mma = hopper.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            major_a.sm90_mma_major_mode(),
            major_b.sm90_mma_major_mode(),
            Float32,
            (self.workers, 1, 1),
            (64, v.tile_n),
        )
        piece = (v.tile_m, v.out_columns)
        smem_a = hopper.make_smem_layout_a(major_a, self.tile, self.dtype, v.stages)
        smem_b = hopper.make_smem_layout_b(major_b, self.tile, self.dtype, v.stages)
        smem_d = hopper.make_smem_layout_epi(self.out, LayoutEnum.ROW_MAJOR, piece, v.out_stages)
        one_a, one_b, one_d = (cute.slice_(s, (None, None, 0)) for s in (smem_a, smem_b, smem_d))
        get, put = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        load_a, tma_a = cpasync.make_tiled_tma_atom(get, a, one_a, (v.tile_m, v.tile_k))
        load_b, tma_b = cpasync.make_tiled_tma_atom(get, b, one_b, (v.tile_n, v.tile_k))
        store_d, tma_d = cpasync.make_tiled_tma_atom(put, d, one_d, piece)
        store_z, tma_z = None, None
        if const_expr(self.e.save):
            store_z, tma_z = cpasync.make_tiled_tma_atom(put, z, one_d, piece)
        self.stage_bytes = cute.size_in_bytes(self.dtype, one_a) + cute.size_in_bytes(
            self.dtype, one_b
        )
        size_a, size_b, size_d = (cute.cosize(s) for s in (smem_a, smem_b, smem_d))
        size_z = size_d if self.e.save else 0

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, v.stages * 2]
            ring_a: cute.struct.Align[cute.struct.MemRange[self.dtype, size_a], 1024]
            ring_b: cute.struct.Align[cute.struct.MemRange[self.dtype, size_b], 1024]
            out: cute.struct.Align[cute.struct.MemRange[self.out, size_d], 1024]
            saved: cute.struct.Align[cute.struct.MemRange[self.out, size_z], 1024]

        self.shared = Shared
        tiles_m = cute.ceil_div(d.shape[0], v.tile_m)
        tiles_n = cute.ceil_div(d.shape[1], v.tile_n)
        tiles = tiles_m * tiles_n * d.shape[2]
        self.kernel(
            mma,
            (load_a, load_b, store_d, store_z),
            (tma_a, tma_b, tma_d, tma_z),
            (smem_a, smem_b, smem_d),
            (d, bias, z, c, sums),
            (tiles_m, tiles_n, tiles),
        ).launch(
            grid=[cutlass.min(max_blocks, tiles), 1, 1],
            block=[self.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.jit
    def place(self, tile: Int32, tiles_m: Int32, tiles_n: Int32):
        """Row, column and batch of a tile: down a band, then the next column, then the next band."""
        a_batch = tiles_m * tiles_n
        batch = tile // a_batch
        inside = tile - batch * a_batch
        first = inside // (BAND * tiles_n) * BAND
        height = cutlass.min(Int32(BAND), tiles_m - first)
        inside = inside - first * tiles_n
        column = inside // height
        return first + inside - column * height, column, batch

    @cute.kernel
    def kernel(self, mma: cute.TiledMma, copies, tensors, layouts, operands, counts):
        v = self.v
        load_a, load_b, store_d, store_z = copies
        tma_a, tma_b, tma_d, tma_z = tensors
        smem_a, smem_b, smem_d = layouts
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            cpasync.prefetch_descriptor(load_a)
            cpasync.prefetch_descriptor(load_b)
            cpasync.prefetch_descriptor(store_d)
        shared = SmemAllocator().allocate(self.shared)
        ring = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=v.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, self.workers * WARPS),
            tx_count=self.stage_bytes,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        )
        s_a = shared.ring_a.get_tensor(smem_a.outer, swizzle=smem_a.inner)
        s_b = shared.ring_b.get_tensor(smem_b.outer, swizzle=smem_b.inner)
        s_d = shared.out.get_tensor(smem_d.outer, swizzle=smem_d.inner)
        if warp < WARPS:
            cute.arch.setmaxregister_decrease(LOADER_REGISTERS)
            if warp == 0:
                self.load(ring, load_a, tma_a, s_a, load_b, tma_b, s_b, counts)
        else:
            cute.arch.setmaxregister_increase(WORKER_REGISTERS)
            s_z = None
            if const_expr(self.e.save):
                s_z = shared.saved.get_tensor(smem_d.outer, swizzle=smem_d.inner)
            k_tiles = cute.ceil_div(tma_a.shape[1], v.tile_k)
            self.work(
                ring,
                mma,
                s_a,
                s_b,
                s_d,
                s_z,
                store_d,
                tma_d,
                store_z,
                tma_z,
                operands,
                counts,
                k_tiles,
            )

    @cute.jit
    def load(self, ring, load_a, tma_a, s_a, load_b, tma_b, s_b, counts) -> None:
        """Fills the ring, tile after tile."""
        v = self.v
        tiles_m, tiles_n, tiles = counts
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        to_a, from_a = self.parts(load_a, s_a, tma_a, (v.tile_m, v.tile_k))
        to_b, from_b = self.parts(load_b, s_b, tma_b, (v.tile_n, v.tile_k))
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, v.stages)
        for tile in cutlass.range(block, tiles, blocks, unroll=1):
            m, n, l = self.place(tile, tiles_m, tiles_n)
            for k in cutlass.range(cute.size(from_a, mode=[2]), unroll=1):
                ring.producer_acquire(state)
                full = ring.producer_get_barrier(state)
                cute.copy(
                    load_a, from_a[(None, m, k, l)], to_a[(None, state.index)], tma_bar_ptr=full
                )
                cute.copy(
                    load_b, from_b[(None, n, k, l)], to_b[(None, state.index)], tma_bar_ptr=full
                )
                ring.producer_commit(state)
                state.advance()
        ring.producer_tail(state)

    def parts(self, atom, smem, tensor, tile):
        """Both sides of a TMA copy: (one copy, stages) and (one copy, tiles…)."""
        tiles = cute.local_tile(tensor, tile, (None, None, None))
        return cpasync.tma_partition(
            atom,
            0,
            cute.make_layout(1),
            cute.group_modes(smem, 0, 2),
            cute.group_modes(tiles, 0, 2),
        )

    @cute.jit
    def work(
        self,
        ring,
        mma,
        s_a,
        s_b,
        s_d,
        s_z,
        store_d,
        tma_d,
        store_z,
        tma_z,
        operands,
        counts,
        k_tiles,
    ) -> None:
        """Multiplies what the ring brings and writes the tiles."""
        v, e = self.v, self.e
        d, bias, z, c, sums = operands
        tiles_m, tiles_n, tiles = counts
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        thread, _, _ = cute.arch.thread_idx()
        thread = thread - WARPGROUP
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) - WARPS
        group = cute.arch.make_warp_uniform(warp // WARPS)
        own = mma.get_slice(group * WARPGROUP)
        f_a = mma.make_fragment_A(own.partition_A(s_a))
        f_b = mma.make_fragment_B(own.partition_B(s_b))
        acc = cute.make_rmem_tensor(mma.partition_shape_C((v.tile_m, v.tile_n)), Float32)

        to_smem = hopper.get_smem_store_op(LayoutEnum.ROW_MAJOR, self.out, Float32)
        to_smem = cute.make_tiled_copy_S(to_smem, cute.make_tiled_copy_C_atom(to_smem, mma))
        mine = to_smem.get_slice(thread)
        r_d = cute.make_rmem_tensor(cute.shape(mine.partition_S(s_d))[:3], self.out)
        r_z = cute.make_rmem_tensor(cute.shape(mine.partition_S(s_d))[:3], self.out)
        values = to_smem.retile(acc)
        places = mma.get_slice(thread).partition_C(cute.make_identity_tensor((v.tile_m, v.tile_n)))
        places = to_smem.retile(places)
        count = cute.size(r_d)
        to_d = mine.partition_D(s_d)
        part_d, tile_d = self.parts(store_d, s_d, tma_d, (v.tile_m, v.out_columns))
        if const_expr(e.save):
            to_z = mine.partition_D(s_z)
            part_z, tile_z = self.parts(store_z, s_z, tma_z, (v.tile_m, v.out_columns))
        everyone = self.workers * WARPGROUP
        stores = pipeline.PipelineTmaStore.create(
            num_stages=v.out_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, everyone),
        )
        together = pipeline.NamedBarrier(barrier_id=1, num_threads=everyone)
        filled = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, v.stages)
        used = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, v.stages)
        for tile in cutlass.range(block, tiles, blocks, unroll=1):
            m, n, l = self.place(tile, tiles_m, tiles_n)
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for k in cutlass.range(k_tiles, unroll=1):
                ring.consumer_wait(filled)
                warpgroup.fence()
                for s in cutlass.range_constexpr(cute.size(f_a, mode=[2])):
                    at = (None, None, s, filled.index)
                    cute.gemm(mma, acc, f_a[at], f_b[at], acc)
                    mma.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                # The products of the stage before are done: it may be filled again.
                warpgroup.wait_group(1)
                if k > 0:
                    ring.consumer_release(used)
                    used.advance()
                filled.advance()
            warpgroup.wait_group(0)
            ring.consumer_release(used)
            used.advance()
            for p in cutlass.range_constexpr(self.pieces):
                for i in cutlass.range_constexpr(count):
                    place = places[p * count + i]
                    row, column = m * v.tile_m + place[0], n * v.tile_n + place[1]
                    inside = row < d.shape[0] and column < d.shape[1]
                    x = values[p * count + i]
                    if const_expr(e.bias):
                        if column < d.shape[1]:
                            x += bias[column].to(Float32)
                    if const_expr(e.save):
                        r_z[i] = x.to(self.out)
                        # The activation is of what backward will read.
                        x = r_z[i].to(Float32)
                    if const_expr(e.activation):
                        x = activated(x, e.activation)
                    if const_expr(e.slope_at_z):
                        if inside:
                            x *= slope(z[row, column, l].to(Float32), e.slope_at_z)
                    if const_expr(e.add):
                        if inside:
                            x += c[row, column, l].to(Float32)
                    values[p * count + i] = x
                    r_d[i] = x.to(self.out)
                if warp == 0:
                    stores.producer_acquire()
                together.arrive_and_wait()
                stage = (None, None, None, p % v.out_stages)
                cute.copy(to_smem, r_d, to_d[stage])
                if const_expr(e.save):
                    cute.copy(to_smem, r_z, to_z[stage])
                cute.arch.fence_proxy("async.shared", space="cta")
                together.arrive_and_wait()
                if warp == 0:
                    where = (None, m, n * self.pieces + p, l)
                    cute.copy(store_d, part_d[(None, p % v.out_stages)], tile_d[where])
                    if const_expr(e.save):
                        cute.copy(store_z, part_z[(None, p % v.out_stages)], tile_z[where])
                    stores.producer_commit()
            if const_expr(e.column_sums):
                self.add_columns(acc, sums, m * (self.workers * WARPS) + warp, n, d.shape[1])
        if warp == 0:
            stores.producer_tail()

    @cute.jit
    def add_columns(
        self, acc: cute.Tensor, sums: cute.Tensor, row: Int32, n: Int32, columns: Int32
    ):
        """Sums of the columns over a warp's 16 rows.

        Of each 8 columns a thread has two neighbours, in two rows eight apart; the threads four
        lanes on have the next rows.
        """
        lane = cute.arch.lane_idx()
        for j in cutlass.range_constexpr(self.v.tile_n // 8):
            for q in cutlass.range_constexpr(2):
                x = acc[(q, 0, j), 0, 0] + acc[(q, 1, j), 0, 0]
                for distance in (4, 8, 16):
                    x += cute.arch.shuffle_sync_bfly(x, offset=distance)
                column = n * self.v.tile_n + 8 * j + 2 * lane + q
                if lane < 4 and column < columns:
                    sums[row, column] = x


class Plain(Gemm):
    @cute.jit
    def __call__(
        self, a: cute.Tensor, b: cute.Tensor, d: cute.Tensor, max_blocks: Int32, stream: CUstream
    ):
        self.launch(a, b, None, None, None, d, None, max_blocks, stream)


class WithBias(Gemm):
    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        bias: cute.Tensor,
        d: cute.Tensor,
        max_blocks: Int32,
        stream: CUstream,
    ):
        self.launch(a, b, bias, None, None, d, None, max_blocks, stream)


class WithActivation(Gemm):
    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        bias: cute.Tensor,
        z: cute.Tensor,
        d: cute.Tensor,
        max_blocks: Int32,
        stream: CUstream,
    ):
        self.launch(a, b, bias, z, None, d, None, max_blocks, stream)


class WithSlope(Gemm):
    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        z: cute.Tensor,
        d: cute.Tensor,
        sums: cute.Tensor,
        max_blocks: Int32,
        stream: CUstream,
    ):
        self.launch(a, b, None, z, None, d, sums, max_blocks, stream)


class WithAddend(Gemm):
    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        c: cute.Tensor,
        d: cute.Tensor,
        max_blocks: Int32,
        stream: CUstream,
    ):
        self.launch(a, b, None, None, c, d, None, max_blocks, stream)


class WithBiasAndAddend(Gemm):
    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        bias: cute.Tensor,
        c: cute.Tensor,
        d: cute.Tensor,
        max_blocks: Int32,
        stream: CUstream,
    ):
        self.launch(a, b, bias, None, c, d, None, max_blocks, stream)


def reference(a, b, epilogue: Epilogue, a_dense="k", b_dense="k", bias=None, z=None, c=None):
    """What the kernel writes, in float64; z is read where the epilogue has a slope, and made where it
    saves."""
    import numpy as np

    a, b = (np.asarray(x, np.float64) for x in (a, b))
    x = (a if a_dense == "k" else a.swapaxes(1, 2)) @ (b.swapaxes(1, 2) if b_dense == "k" else b)
    made = {}
    if epilogue.bias:
        x = x + np.asarray(bias, np.float64)
    if epilogue.save:
        made["z"] = x
    if epilogue.activation:
        x = reference_activation(x, epilogue.activation)
    if epilogue.slope_at_z:
        x = x * reference_slope(np.asarray(z, np.float64), epilogue.slope_at_z)
    if epilogue.add:
        x = x + np.asarray(c, np.float64)
    made["d"] = x
    if epilogue.column_sums:
        rows = -(-x.shape[1] // 16)
        padded = np.zeros((rows * 16, x.shape[2]))
        padded[: x.shape[1]] = x[0]
        made["sums"] = padded.reshape(rows, 16, -1).sum(1)
    return made


WIDE, SQUARE = (128, 256, 4), (128, 128, 5)
# Which dimension of a and of b is dense: products of a linear layer, of its input gradient, and of its
# weight gradient.
LAYOUTS = {"tn": ("k", "k"), "nn": ("k", "n"), "nt": ("m", "n")}


def _register(
    name: str, kind: type[Gemm], epilogue: Epilogue, layout: str, tiles, doc: str
) -> None:
    a, b = LAYOUTS[layout]
    register(
        Kernel(
            name=f"{name}_{layout}",
            doc=doc,
            variants=tuple(
                GemmVariant("bf16", "bf16", a, b, m, n, 64, stages) for m, n, stages in tiles
            ),
            contract=lambda v: contract(v, epilogue),
            make=lambda v: kind(v, epilogue),
            reference=lambda **arrays: reference(epilogue=epilogue, a_dense=a, b_dense=b, **arrays),
            instructions=("HGMMA", "UTMALDG", "UTMASTG"),
            family="gemm",
        )
    )


for _layout in LAYOUTS:
    _register("gemm", Plain, Epilogue(), _layout, (WIDE, SQUARE), "a bᵀ.")
    _register("gemm_add", WithAddend, Epilogue(add=True), _layout, (SQUARE,),
              "a bᵀ + c: residuals, and gradients that accumulate.")  # fmt: skip
_register("gemm_bias", WithBias, Epilogue(bias=True), "tn", (WIDE, SQUARE), "a bᵀ + bias.")
_register("gemm_bias_add", WithBiasAndAddend, Epilogue(bias=True, add=True), "tn", (SQUARE,),
          "a bᵀ + bias + c.")  # fmt: skip
for _name in ("gelu", "gelu_tanh"):
    _register(f"gemm_bias_{_name}", WithActivation, Epilogue(bias=True, save=True, activation=_name),
              "tn", (SQUARE,), f"z = a bᵀ + bias, d = {_name}(z).")  # fmt: skip
    _register(f"gemm_slope_{_name}", WithSlope, Epilogue(slope_at_z=_name, column_sums=True), "nn",
              (SQUARE,), f"a bᵀ times the slope of {_name} at z, and sums of its columns.")  # fmt: skip
