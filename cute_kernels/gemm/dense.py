"""Matrix products: d = epilogue(a bᵀ), batched, bfloat16 or float16 in, float32 sums.

One block a SM takes tiles of d in turn. The first warp loads tiles of a and b by TMA into a ring of
stages. The other two warpgroups multiply them by wgmma, apply the epilogue to their sums in
registers, and write them through shared memory by TMA. Either both work on one tile, half of its
rows each, or they alternate ("ping-pong"): one multiplies while the other is in its epilogue.
Blocks of a cluster have tiles beside or below each other, and load what they share once.

Memory contract: the operands are dense in their last dimension; what lies beyond them reads as zero
(TMA fills it in) and is not written. d may be c, and no other operand.
"""

from dataclasses import dataclass, replace

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import (
    DTYPES,
    CUstream,
    Float32,
    Int32,
    LayoutEnum,
    SmemAllocator,
    Uint32,
    const_expr,
    cpasync,
    cute,
    cutlass,
    hopper,
    pipeline,
    warp_copies,
    warpgroup,
)
from ..registry import Kernel, register
from ..rows import present
from .epilogue import (
    LOWER_TAIL,
    Epilogue,
    activated,
    reference_activation,
    reference_slope,
    slope,
    slope_and_activated,
)

WARPGROUP = 128
WARPS = 4  # of a warpgroup
WORKERS = 2  # warpgroups that multiply
# Tiles that share columns of b run together: those stay in L2.
BAND = 8
# setmaxregister: the loading warpgroup needs few, what it gives up goes to the others.
LOADER_REGISTERS, WORKER_REGISTERS = 40, 232
DTYPE_CODES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# Named barriers; of each, the next one is the second warpgroup's.
WRITE_BARRIER, TURN_BARRIER = 1, 3
# Pieces that are written together where each has a buffer of its own: with half of the fences and barriers.
AT_ONCE = 2
#: Rows of `sums` for each 128 rows of d: one a warp.
SUMS_ROWS, SUMS_TILE = 4, 128


@dataclass(frozen=True)
class GemmVariant:
    """dtypes of the operands and of d; which dimension of a and of b is dense ("k", or "m" and "n");
    the tile, the stages of the ring, whether the warpgroups alternate, blocks of a cluster down and
    across, and columns and stages of the way out (of each warpgroup where they alternate)."""

    dtype: str = "bf16"
    out: str = "bf16"
    a_dense: str = "k"
    b_dense: str = "k"
    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 64
    stages: int = 5
    pingpong: bool = True
    down: int = 1
    across: int = 1
    out_columns: int = 64
    out_stages: int = 2

    @property
    def name(self) -> str:
        kind = "turns" if self.pingpong else "joint"
        cluster = f"_{self.down}x{self.across}" if self.down * self.across > 1 else ""
        return f"{self.dtype}_{self.out}_{self.tile_m}x{self.tile_n}x{self.stages}_{kind}{cluster}"


def contract(v: GemmVariant, e: Epilogue) -> Contract:
    dtype, out = DTYPE_CODES[v.dtype], DTYPE_CODES[v.out]

    def operand(name: str, rows: str, dense: str) -> Tensor:
        return Tensor(name, dtype, ("l", rows, "k") if dense == "k" else ("l", "k", rows))

    def like_d(name: str, access: str, alias: tuple[str, ...] = ()) -> Tensor:
        return Tensor(name, out, ("l", "m", "n"), access, may_alias=alias)

    tensors = [operand("a", "m", v.a_dense), operand("b", "n", v.b_dense)]
    if e.bias:
        tensors.append(Tensor("bias", dtype, ("n",), align=4, optional=True))
    if e.save or e.slope_at_z:
        tensors.append(like_d("z", "write" if e.save else "read"))
    if e.again:
        tensors.append(like_d("y", "write"))
    if e.add:
        tensors.append(like_d("c", "read"))
    tensors.append(like_d("d", "write", ("c",) if e.add else ()))
    dense_k = v.a_dense == "k" or v.b_dense == "k"
    extents = [Extent("l"), Extent("m"), Extent("n", divisible_by=8)]
    extents.append(Extent("k", divisible_by=8 if dense_k else 1))
    if v.a_dense == "m":
        extents[1] = Extent("m", divisible_by=8)
    if e.column_sums:
        tensors.append(
            Tensor(
                "sums",
                "float32",
                ("parts", "n"),
                "write",
                align=4,
                stride_divisible_by=1,
                optional=True,
            )
        )
        extents.append(Extent("parts"))
    return Contract(tuple(extents), tuple(tensors), (Scalar("max_blocks", "int32"),))


def words(t: cute.Tensor) -> cute.Tensor:
    """A dense tensor of 16-bit numbers as pairs of them."""
    flat = cute.make_tensor(t.iterator, cute.make_layout(cute.size(t)))
    return cute.recast_tensor(flat, Uint32)


def unpack(to: cute.Tensor, at: int, word: Uint32, dtype) -> None:
    """The two numbers of a word into two elements of a dense float32 tensor in registers."""
    flat = cute.make_tensor(to.iterator, cute.make_layout(cute.size(to)))
    if dtype is DTYPES["bfloat16"]:  # the upper half of a float32
        bits = cute.recast_tensor(flat, Uint32)
        bits[at] = word << 16
        bits[at + 1] = word & Uint32(0xFFFF0000)
        return
    pair = cute.make_rmem_tensor((2,), dtype)
    cute.recast_tensor(pair, Uint32)[0] = word
    for i in range(2):
        flat[at + i] = pair[i].to(Float32)


class Gemm:
    def __init__(self, variant: GemmVariant, epilogue: Epilogue) -> None:
        v = variant
        self.v = v
        self.e = epilogue
        self.tile = (v.tile_m, v.tile_n, v.tile_k)
        self.threads = WARPGROUP * (1 + WORKERS)
        self.dtype = DTYPES[DTYPE_CODES[v.dtype]]
        self.out = DTYPES[DTYPE_CODES[v.out]]
        self.pieces = v.tile_n // v.out_columns
        self.groups = 1 if v.pingpong else WORKERS  # that share a tile
        self.cluster = v.down * v.across
        # What the epilogue reads comes into the buffers of the way out; results take its place. The last
        # piece may be late: without a buffer of its own it comes where the first was.
        self.reads = bool(epilogue.slope_at_z or epilogue.add)
        self.late = self.reads and self.pieces > v.out_stages
        self.at_once = AT_ONCE if self.reads and not self.late else 1
        assert not self.reads or (v.pingpong and self.pieces - self.late == v.out_stages > 1)
        assert self.pieces % self.at_once == 0
        assert v.dtype == v.out in ("bf16", "f16")  # what the epilogue unpacks
        self.power = LOWER_TAIL[DTYPE_CODES[v.out]]
        assert epilogue.slope_at_z or not epilogue.again
        assert not epilogue.column_sums or (
            v.pingpong and v.tile_m == SUMS_TILE and v.tile_n == 128
        )

    def launch(
        self, a, b, bias, z, c, d, sums, max_blocks: Int32, stream: CUstream, y=None
    ) -> None:
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
        z, y, c, d = (matrix(t, [1, 2, 0]) for t in (z, y, c, d))
        major_a = LayoutEnum.ROW_MAJOR if v.a_dense == "k" else LayoutEnum.COL_MAJOR
        major_b = LayoutEnum.ROW_MAJOR if v.b_dense == "k" else LayoutEnum.COL_MAJOR
        mma = hopper.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            major_a.sm90_mma_major_mode(),
            major_b.sm90_mma_major_mode(),
            Float32,
            (self.groups, 1, 1),
            (64, v.tile_n),
        )
        piece = (v.tile_m, v.out_columns)
        smem_a = hopper.make_smem_layout_a(major_a, self.tile, self.dtype, v.stages)
        smem_b = hopper.make_smem_layout_b(major_b, self.tile, self.dtype, v.stages)
        ways_out = v.out_stages * (WORKERS // self.groups)
        smem_d = hopper.make_smem_layout_epi(self.out, LayoutEnum.ROW_MAJOR, piece, ways_out)
        one_a, one_b, one_d = (cute.slice_(s, (None, None, 0)) for s in (smem_a, smem_b, smem_d))
        get, put = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        spread = cpasync.CopyBulkTensorTileG2SMulticastOp()
        load_a, tma_a = cpasync.make_tiled_tma_atom(
            spread if v.across > 1 else get, a, one_a, (v.tile_m, v.tile_k), v.across
        )
        load_b, tma_b = cpasync.make_tiled_tma_atom(
            spread if v.down > 1 else get, b, one_b, (v.tile_n, v.tile_k), v.down
        )
        store_d, tma_d = cpasync.make_tiled_tma_atom(put, d, one_d, piece)
        # z: written, or read as c is.
        copy_x, tma_x = None, None
        if const_expr(self.e.save):
            copy_x, tma_x = cpasync.make_tiled_tma_atom(put, z, one_d, piece)
        if const_expr(self.reads):
            copy_x, tma_x = cpasync.make_tiled_tma_atom(get, c if self.e.add else z, one_d, piece)
        smem_y, store_y, tma_y = None, None, None
        if const_expr(self.e.again):
            smem_y = hopper.make_smem_layout_epi(
                self.out, LayoutEnum.ROW_MAJOR, piece, self.at_once * WORKERS
            )
            store_y, tma_y = cpasync.make_tiled_tma_atom(put, y, one_d, piece)
        self.stage_bytes = cute.size_in_bytes(self.dtype, one_a) + cute.size_in_bytes(
            self.dtype, one_b
        )
        size_a, size_b, size_d = (cute.cosize(s) for s in (smem_a, smem_b, smem_d))
        size_z = size_d if self.e.save else 0
        size_y = cute.cosize(smem_y) if self.e.again else 0

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, v.stages * 2]
            # Of each warpgroup for what it reads, then of each for a late piece.
            read: cute.struct.MemRange[cutlass.Int64, WORKERS * 2]
            ring_a: cute.struct.Align[cute.struct.MemRange[self.dtype, size_a], 1024]
            ring_b: cute.struct.Align[cute.struct.MemRange[self.dtype, size_b], 1024]
            out: cute.struct.Align[cute.struct.MemRange[self.out, size_d], 1024]
            saved: cute.struct.Align[cute.struct.MemRange[self.out, size_z], 1024]
            again: cute.struct.Align[cute.struct.MemRange[self.out, size_y], 1024]

        self.shared = Shared
        # Of clusters.
        tiles_m = cute.ceil_div(d.shape[0], v.tile_m * v.down)
        tiles_n = cute.ceil_div(d.shape[1], v.tile_n * v.across)
        tiles = tiles_m * tiles_n * d.shape[2]
        self.kernel(
            mma,
            (load_a, load_b, store_d, copy_x, store_y),
            (tma_a, tma_b, tma_d, tma_x, tma_y),
            (smem_a, smem_b, smem_d, smem_y),
            (d, bias, sums),
            (tiles_m, tiles_n, tiles),
        ).launch(
            grid=[cutlass.min(max_blocks // self.cluster, tiles) * self.cluster, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster, 1, 1] if self.cluster > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.jit
    def place(self, tile: Int32, tiles_m: Int32, tiles_n: Int32):
        """Row, column and batch of a block's tile in the cluster's tile `tile`: down a band, then the
        next column, then the next band."""
        a_batch = tiles_m * tiles_n
        batch = tile // a_batch
        inside = tile - batch * a_batch
        first = inside // (BAND * tiles_n) * BAND
        height = cutlass.min(Int32(BAND), tiles_m - first)
        inside = inside - first * tiles_n
        column = inside // height
        row = first + inside - column * height
        if const_expr(self.cluster > 1):
            block, _, _ = cute.arch.block_idx()
            rank = block % self.cluster
            row = row * self.v.down + rank % self.v.down
            column = column * self.v.across + rank // self.v.down
        return row, column, batch

    @cute.kernel
    def kernel(self, mma: cute.TiledMma, copies, tensors, layouts, operands, counts):
        v = self.v
        load_a, load_b, store_d, copy_x, store_y = copies
        tma_a, tma_b, tma_d, tma_x, tma_y = tensors
        smem_a, smem_b, smem_d, smem_y = layouts
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            cpasync.prefetch_descriptor(load_a)
            cpasync.prefetch_descriptor(load_b)
            cpasync.prefetch_descriptor(store_d)
        shared = SmemAllocator().allocate(self.shared)
        read = shared.read.data_ptr()
        if const_expr(self.reads):
            if warp == 0:
                with cute.arch.elect_one():
                    for i in cutlass.range_constexpr(WORKERS * 2):
                        cute.arch.mbarrier_init(read + i, 1)
                cute.arch.mbarrier_init_fence()
        # Every warp that reads a stage tells every block that fills it.
        readers = self.groups * WARPS * (v.down + v.across - 1)
        ring = pipeline.PipelineTmaAsync.create(
            barrier_storage=shared.barriers.data_ptr(),
            num_stages=v.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, readers),
            tx_count=self.stage_bytes,
            cta_layout_vmnk=cute.make_layout((1, v.down, v.across, 1)),
        )
        s_a = shared.ring_a.get_tensor(smem_a.outer, swizzle=smem_a.inner)
        s_b = shared.ring_b.get_tensor(smem_b.outer, swizzle=smem_b.inner)
        s_d = shared.out.get_tensor(smem_d.outer, swizzle=smem_d.inner)
        s_x = None
        if const_expr(self.e.save):
            s_x = shared.saved.get_tensor(smem_d.outer, swizzle=smem_d.inner)
        s_y = None
        if const_expr(self.e.again):
            s_y = shared.again.get_tensor(smem_y.outer, swizzle=smem_y.inner)
        if warp < WARPS:
            cute.arch.setmaxregister_decrease(LOADER_REGISTERS)
            if warp == 0:
                self.load(
                    ring,
                    (load_a, load_b),
                    (tma_a, tma_b),
                    (s_a, s_b),
                    counts,
                )
        else:
            cute.arch.setmaxregister_increase(WORKER_REGISTERS)
            k_tiles = cute.ceil_div(tma_a.shape[1], v.tile_k)
            self.work(
                ring,
                mma,
                (s_a, s_b, s_d, s_x, s_y),
                (store_d, copy_x, store_y),
                (tma_d, tma_x, tma_y),
                operands,
                counts,
                k_tiles,
                read,
            )

    @cute.jit
    def load(self, ring, copies, tensors, buffers, counts) -> None:
        """Fills the ring, tile after tile."""
        v = self.v
        load_a, load_b = copies
        tma_a, tma_b = tensors
        s_a, s_b = buffers
        tiles_m, tiles_n, tiles = counts
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        rank = block % self.cluster
        down, across = rank % v.down, rank // v.down
        to_a, from_a = self.parts(load_a, s_a, tma_a, (v.tile_m, v.tile_k), across, v.across)
        to_b, from_b = self.parts(load_b, s_b, tma_b, (v.tile_n, v.tile_k), down, v.down)
        # Of the cluster, the blocks in this one's row get a, those in its column b.
        mask_a = cutlass.Int16(sum(1 << v.down * i for i in range(v.across)) << down)
        mask_b = cutlass.Int16(((1 << v.down) - 1) << v.down * across)
        to_a_too = {"mcast_mask": mask_a} if v.across > 1 else {}
        to_b_too = {"mcast_mask": mask_b} if v.down > 1 else {}
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, v.stages)
        for tile in cutlass.range(block // self.cluster, tiles, blocks // self.cluster, unroll=1):
            m, n, l = self.place(tile, tiles_m, tiles_n)
            for k in cutlass.range(cute.size(from_a, mode=[2]), unroll=1):
                ring.producer_acquire(state)
                full = ring.producer_get_barrier(state)
                cute.copy(
                    load_a,
                    from_a[(None, m, k, l)],
                    to_a[(None, state.index)],
                    tma_bar_ptr=full,
                    **to_a_too,
                )
                cute.copy(
                    load_b,
                    from_b[(None, n, k, l)],
                    to_b[(None, state.index)],
                    tma_bar_ptr=full,
                    **to_b_too,
                )
                ring.producer_commit(state)
                state.advance()
        ring.producer_tail(state)

    def parts(self, atom, smem, tensor, tile, rank=0, ranks=1):
        """Both sides of a TMA copy: (one copy, stages) and (one copy, tiles…)."""
        tiles = cute.local_tile(tensor, tile, (None, None, None))
        return cpasync.tma_partition(
            atom,
            rank if ranks > 1 else 0,
            cute.make_layout(ranks),
            cute.group_modes(smem, 0, 2),
            cute.group_modes(tiles, 0, 2),
        )

    @cute.jit
    def work(
        self, ring, mma, buffers, copies, tensors, operands, counts, k_tiles: Int32, read_barriers
    ) -> None:
        """Multiplies what the ring brings and writes the tiles."""
        v, e = self.v, self.e
        s_a, s_b, s_d, s_x, s_y = buffers
        store_d, copy_x, store_y = copies
        tma_d, tma_x, tma_y = tensors
        d, bias, sums = operands
        tiles_m, tiles_n, tiles = counts
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        thread, _, _ = cute.arch.thread_idx()
        thread = thread - WARPGROUP
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) - WARPS
        lane = cute.arch.lane_idx()
        group = cute.arch.make_warp_uniform(warp // WARPS)
        if const_expr(v.pingpong):
            thread = thread - group * WARPGROUP
            warp = warp - group * WARPS
            own = mma.get_slice(0)
        else:
            own = mma.get_slice(group * WARPGROUP)
        f_a = mma.make_fragment_A(own.partition_A(s_a))
        f_b = mma.make_fragment_B(own.partition_B(s_b))
        acc = cute.make_rmem_tensor(mma.partition_shape_C((v.tile_m, v.tile_n)), Float32)

        to_smem = hopper.get_smem_store_op(LayoutEnum.ROW_MAJOR, self.out, Float32)
        copy_c = cute.make_tiled_copy_C_atom(to_smem, mma)
        to_smem = cute.make_tiled_copy_S(to_smem, copy_c)
        mine = to_smem.get_slice(thread)
        r_d = cute.make_rmem_tensor(cute.shape(mine.partition_S(s_d))[:3], self.out)
        r_z = cute.make_rmem_tensor(cute.shape(mine.partition_S(s_d))[:3], self.out)
        r_f = cute.make_rmem_tensor(cute.shape(mine.partition_S(s_d))[:3], Float32)
        r_b = cute.make_rmem_tensor((v.tile_n // 8,), Uint32)
        values = to_smem.retile(acc)
        count = cute.size(r_d)
        to_d = mine.partition_D(s_d)
        part_d, tile_d = self.parts(store_d, s_d, tma_d, (v.tile_m, v.out_columns))
        if const_expr(e.save):
            to_x = mine.partition_D(s_x)
            part_x, tile_x = self.parts(copy_x, s_x, tma_x, (v.tile_m, v.out_columns))
        if const_expr(self.reads):
            from_smem = cute.make_copy_atom(warp_copies.LdMatrix8x8x16bOp(False, 4), self.out)
            from_smem = cute.make_tiled_copy_S(from_smem, copy_c)
            from_d = from_smem.get_slice(thread).partition_S(s_d)
            r_x = cute.make_rmem_tensor(cute.shape(from_d)[:3], self.out)
            part_x, tile_x = self.parts(copy_x, s_d, tma_x, (v.tile_m, v.out_columns))
            read_barrier, late_barrier = read_barriers + group, read_barriers + WORKERS + group
            piece_bytes = v.tile_m * v.out_columns * self.out.width // 8
            read_phase = Int32(0)
        if const_expr(e.again):
            r_y = cute.make_rmem_tensor(cute.shape(mine.partition_S(s_d))[:3], self.out)
            to_y = mine.partition_D(s_y)
            part_y, tile_y = self.parts(store_y, s_y, tma_y, (v.tile_m, v.out_columns))
        everyone = self.groups * WARPGROUP
        stores = pipeline.PipelineTmaStore.create(
            num_stages=v.out_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, everyone),
        )
        first_out = Int32(0)
        together = WRITE_BARRIER
        if const_expr(v.pingpong):
            first_out = group * v.out_stages
            together = WRITE_BARRIER + group
        filled = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, v.stages)
        used = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, v.stages)
        first, step = block // self.cluster, blocks // self.cluster
        if const_expr(v.pingpong):
            first, step = first + group * step, WORKERS * step
            if group == 1:
                filled.advance(k_tiles)
                used.advance(k_tiles)
                cute.arch.barrier_arrive(
                    barrier_id=TURN_BARRIER, number_of_threads=WORKERS * WARPGROUP
                )
        for tile in cutlass.range(first, tiles, step, unroll=1):
            m, n, l = self.place(tile, tiles_m, tiles_n)
            if const_expr(e.bias):
                # Of each 8 columns a thread has two neighbours, a word.
                biased = d.shape[1] if present(bias) else 0
                for j in cutlass.range_constexpr(v.tile_n // 8):
                    column = n * v.tile_n + j * 8 + lane % 4 * 2
                    r_b[j] = Uint32(0)
                    if column < biased:
                        r_b[j] = words(bias)[column // 2]
            if const_expr(v.pingpong):
                cute.arch.barrier(
                    barrier_id=TURN_BARRIER + group, number_of_threads=WORKERS * WARPGROUP
                )
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
                if const_expr(self.reads):
                    if k == 0 and warp == 0:
                        # Where the last tile was, once it has been written.
                        cute.arch.cp_async_bulk_wait_group(0, read=True)
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(
                                read_barrier, v.out_stages * piece_bytes
                            )
                        for p in cutlass.range_constexpr(v.out_stages):
                            cute.copy(
                                copy_x,
                                tile_x[(None, m, n * self.pieces + p, l)],
                                part_x[(None, first_out + p)],
                                tma_bar_ptr=read_barrier,
                            )
                if k > 0:
                    ring.consumer_release(used)
                    used.advance()
                filled.advance()
            if const_expr(v.pingpong):  # the other's turn
                cute.arch.barrier_arrive(
                    barrier_id=TURN_BARRIER + 1 - group, number_of_threads=WORKERS * WARPGROUP
                )
            warpgroup.wait_group(0)
            ring.consumer_release(used)
            used.advance()
            if const_expr(v.pingpong):
                filled.advance(k_tiles)
                used.advance(k_tiles)
            if const_expr(e.bias):
                pair = cute.make_rmem_tensor((2,), Float32)
                for j in cutlass.range_constexpr(v.tile_n // 8):
                    unpack(pair, 0, r_b[j], self.dtype)
                    for i in cutlass.range_constexpr(cute.size(acc) // (v.tile_n // 4)):
                        for q in cutlass.range_constexpr(2):
                            acc[(q, i % 2, j), i // 2, 0] += pair[q]
            if const_expr(self.reads):
                cute.arch.mbarrier_wait(read_barrier, read_phase)
            for p in cutlass.range_constexpr(self.pieces):
                way = first_out + p % v.out_stages
                for i in cutlass.range_constexpr(count):
                    r_f[i] = values[self.place_of(p, i)]
                if const_expr(self.reads):
                    if const_expr(p == v.out_stages):
                        cute.arch.mbarrier_wait(late_barrier, read_phase)
                    cute.copy(from_smem, from_d[(None, None, None, way)], r_x)
                    read = cute.make_rmem_tensor((count,), Float32)
                    for i in cutlass.range_constexpr(count // 2):
                        unpack(read, 2 * i, words(r_x)[i], self.out)
                    for i in cutlass.range_constexpr(count):
                        if const_expr(e.again):
                            factor, read[i] = slope_and_activated(read[i], e.slope_at_z, self.power)
                            r_f[i] = r_f[i] * factor
                        elif const_expr(e.slope_at_z):
                            r_f[i] = r_f[i] * slope(read[i], e.slope_at_z, self.power)
                        else:
                            r_f[i] = r_f[i] + read[i]
                        values[self.place_of(p, i)] = r_f[i]
                if const_expr(e.save):
                    r_z.store(r_f.load().to(self.out))
                    for i in cutlass.range_constexpr(count // 2):
                        # The activation is of what backward will read.
                        unpack(r_f, 2 * i, words(r_z)[i], self.out)
                if const_expr(e.activation):
                    for i in cutlass.range_constexpr(count):
                        r_f[i] = activated(r_f[i], e.activation, self.power)
                r_d.store(r_f.load().to(self.out))
                if const_expr(not self.reads):
                    if warp == 0:
                        # A tile that does not end with the last buffer begins with one in use.
                        again = p == 0 and self.pieces % v.out_stages
                        cute.arch.cp_async_bulk_wait_group(
                            0 if again else v.out_stages - 1, read=True
                        )
                    cute.arch.barrier(barrier_id=together, number_of_threads=everyone)
                if const_expr(e.again):
                    r_y.store(read.load().to(self.out))
                    if const_expr(p % self.at_once == 0):
                        if warp == 0:
                            cute.arch.cp_async_bulk_wait_group(0, read=True)
                        cute.arch.barrier(barrier_id=together, number_of_threads=everyone)
                    way_y = group * self.at_once + p % self.at_once
                    cute.copy(to_smem, r_y, to_y[(None, None, None, way_y)])
                cute.copy(to_smem, r_d, to_d[(None, None, None, way)])
                if const_expr(e.save):
                    cute.copy(to_smem, r_z, to_x[(None, None, None, way)])
                if const_expr((p + 1) % self.at_once == 0):
                    cute.arch.fence_proxy("async.shared", space="cta")
                    cute.arch.barrier(barrier_id=together, number_of_threads=everyone)
                    if warp == 0:
                        for q in cutlass.range_constexpr(p + 1 - self.at_once, p + 1):
                            where = (None, m, n * self.pieces + q, l)
                            out = (None, first_out + q % v.out_stages)
                            cute.copy(store_d, part_d[out], tile_d[where])
                            if const_expr(e.save):
                                cute.copy(copy_x, part_x[out], tile_x[where])
                            if const_expr(e.again):
                                out_y = (None, group * self.at_once + q % self.at_once)
                                cute.copy(store_y, part_y[out_y], tile_y[where])
                        stores.producer_commit()
                        if const_expr(self.late and p == 1):
                            # Where the first piece was, which has been read for its store.
                            cute.arch.cp_async_bulk_wait_group(1, read=True)
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive_and_expect_tx(late_barrier, piece_bytes)
                            last = self.pieces - 1
                            cute.copy(
                                copy_x,
                                tile_x[(None, m, n * self.pieces + last, l)],
                                part_x[(None, first_out)],
                                tma_bar_ptr=late_barrier,
                            )
            if const_expr(self.reads):
                read_phase = read_phase ^ 1
            if const_expr(e.column_sums):
                if present(sums):
                    self.add_columns(acc, sums, m * SUMS_ROWS + warp, n, d.shape[1])
        if warp == 0:
            stores.producer_tail()

    def place_of(self, piece: int, i: int):
        """Where value i of a piece is among a thread's sums. A piece has, in this order, 8 values of
        each 64 rows and 16 columns; the sums have them of all columns before the next rows."""
        blocks = self.v.tile_m // (64 * self.groups)
        columns = piece * (self.v.out_columns // 16) + i // (8 * blocks)
        return (i % 8, columns), i // 8 % blocks, 0

    @cute.jit
    def add_columns(
        self, acc: cute.Tensor, sums: cute.Tensor, row: Int32, n: Int32, columns: Int32
    ):
        """Sums of the columns over a warp's rows.

        Of each 8 columns a thread has two neighbours; the threads 4, 8 and 16 lanes on have other
        rows of them. Each exchange halves the columns a thread has sums of.
        """
        lane = cute.arch.lane_idx()
        held = self.v.tile_n // 4
        s = cute.make_rmem_tensor((held,), Float32)
        for i in cutlass.range_constexpr(held):
            s[i] = (acc[(i % 2, 0, i // 2), 0, 0] + acc[(i % 2, 1, i // 2), 0, 0]) + (
                acc[(i % 2, 0, i // 2), 1, 0] + acc[(i % 2, 1, i // 2), 1, 0]
            )
        for distance in cutlass.range_constexpr(3):
            half = held >> (distance + 1)
            other = 16 >> distance
            upper = (lane & other) != 0
            for i in cutlass.range_constexpr(half):
                low, high = s[i], s[i + half]
                kept = high if upper else low
                sent = low if upper else high
                s[i] = kept + cute.arch.shuffle_sync_bfly(sent, offset=other)
        for i in cutlass.range_constexpr(held // 8):
            at = lane // 4 * (held // 8) + i
            column = n * self.v.tile_n + at // 2 * 8 + lane % 4 * 2 + at % 2
            if column < columns and row < sums.shape[0]:
                sums[row, column] = s[i]


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


class WithSlopeAndActivation(Gemm):
    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        z: cute.Tensor,
        y: cute.Tensor,
        d: cute.Tensor,
        sums: cute.Tensor,
        max_blocks: Int32,
        stream: CUstream,
    ):
        self.launch(a, b, None, z, None, d, sums, max_blocks, stream, y)


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
    if epilogue.bias and bias is not None:
        x = x + np.asarray(bias, np.float64)
    if epilogue.save:
        made["z"] = x
    if epilogue.activation:
        x = reference_activation(x, epilogue.activation)
    if epilogue.slope_at_z:
        x = x * reference_slope(np.asarray(z, np.float64), epilogue.slope_at_z)
    if epilogue.again:
        made["y"] = reference_activation(np.asarray(z, np.float64), epilogue.slope_at_z)
    if epilogue.add:
        x = x + np.asarray(c, np.float64)
    made["d"] = x
    if epilogue.column_sums:  # all rows of `sums` added up
        made["sums"] = x[0].sum(0)
    return made


# Which dimension of a and of b is dense: products of a linear layer, of its input gradient, and of its
# weight gradient.
LAYOUTS = {"tn": ("k", "k"), "nn": ("k", "n"), "nt": ("m", "n")}
TURNS = GemmVariant()
PAIRED = GemmVariant(down=2)
TALL = GemmVariant(tile_m=256, tile_n=128, stages=4, pingpong=False, across=2, out_columns=32)
WIDE = GemmVariant(tile_m=128, tile_n=256, stages=4, pingpong=False, down=2)

_READING = tuple(replace(v, out_columns=32, out_stages=4) for v in (TURNS, PAIRED))
_SAVING = tuple(replace(v, out_columns=32) for v in (TURNS, PAIRED))
# A stage more, for buffers of the way out: a store has the arithmetic of the next piece to read its own.
_SAVING += tuple(replace(v, stages=6, out_stages=1) for v in _SAVING)
_SAVING += (replace(TURNS, stages=4, out_columns=32, out_stages=3),)
# With room for y, of the ring or of the way out.
_AGAIN = (replace(_READING[0], stages=4), *(replace(v, out_stages=3) for v in _READING))


def _halves(*variants: GemmVariant) -> tuple[GemmVariant, ...]:
    """The same for float16."""
    return tuple(replace(v, dtype="f16", out="f16") for v in variants)


def _register(
    name: str, kind: type[Gemm], epilogue: Epilogue, layout: str, variants, doc: str
) -> None:
    a, b = LAYOUTS[layout]
    register(
        Kernel(
            name=f"{name}_{layout}",
            doc=doc,
            variants=tuple(replace(v, a_dense=a, b_dense=b) for v in variants),
            contract=lambda v: contract(v, epilogue),
            make=lambda v: kind(v, epilogue),
            reference=lambda **arrays: reference(epilogue=epilogue, a_dense=a, b_dense=b, **arrays),
            instructions=("HGMMA", "UTMALDG", "UTMASTG"),
            family="gemm",
        )
    )


for _layout in LAYOUTS:
    _register("gemm", Plain, Epilogue(), _layout,
              (TURNS, PAIRED, TALL, WIDE, *_halves(TURNS, PAIRED)), "a bᵀ.")  # fmt: skip
    _register("gemm_add", WithAddend, Epilogue(add=True), _layout, _READING + _halves(_READING[0]),
              "a bᵀ + c: residuals, and gradients that accumulate.")  # fmt: skip
_register("gemm_bias", WithBias, Epilogue(bias=True), "tn",
          (TURNS, PAIRED, TALL, *_halves(TURNS)), "a bᵀ + bias.")  # fmt: skip
_register("gemm_bias_add", WithBiasAndAddend, Epilogue(bias=True, add=True), "tn", _READING[1:],
          "a bᵀ + bias + c.")  # fmt: skip
for _name in ("gelu", "gelu_tanh"):
    _register(f"gemm_bias_{_name}", WithActivation, Epilogue(bias=True, save=True, activation=_name),
              "tn", _SAVING + _halves(_SAVING[0]), f"z = a bᵀ + bias, d = {_name}(z).")  # fmt: skip
    _register(f"gemm_slope_{_name}", WithSlope, Epilogue(slope_at_z=_name, column_sums=True), "nn",
              _READING + _halves(_READING[0]), f"a bᵀ times the slope of {_name} at z, and sums of its columns.")  # fmt: skip
    _register(f"gemm_slope_{_name}_again", WithSlopeAndActivation,
              Epilogue(slope_at_z=_name, again=True, column_sums=True), "nn", _AGAIN + _halves(_AGAIN[0]),
              f"a bᵀ times the slope of {_name} at z, sums of its columns, and y = {_name}(z).")  # fmt: skip
