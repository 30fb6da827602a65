"""c = epilogue(a @ b.T + bias) for bfloat16 a (m, k) and b (n, k), accumulated in float32.

Persistent and warp-specialised: a block takes every blocks-th tile. One warp of the first warpgroup
brings tiles of a and b into a ring of stages by TMA; two warpgroups multiply them (wgmma), each half
of the tile's rows, and write their part of c straight from the accumulators. Tiles are numbered in
groups of GROUP rows of tiles, so that blocks at work at the same time share tiles of b in the L2.

TMA fills what lies outside a and b with zeros; c is written inside its bounds only.
"""

from dataclasses import dataclass

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import BFloat16, CUstream, Float32, Int32, Int64, const_expr, cute, cutlass
from ..registry import Kernel, register
from ..rows import present

EPILOGUES = ("bias", "gelu_tanh")
CONSUMERS = 2  # warpgroups
GROUP = 8


@dataclass(frozen=True)
class GemmVariant:
    """The tile, stages of the ring, and what is applied to the product (and the bias, if given)."""

    epilogue: str
    tile_m: int
    tile_n: int
    tile_k: int
    stages: int

    @property
    def name(self) -> str:
        return f"{self.epilogue}_{self.tile_m}x{self.tile_n}x{self.tile_k}_{self.stages}"


SHAPES = ((128, 64, 64, 6), (128, 128, 64, 6), (128, 256, 64, 4))


def variants(epilogue: str) -> tuple[GemmVariant, ...]:
    return tuple(GemmVariant(epilogue, *shape) for shape in SHAPES)


def contract(v: GemmVariant) -> Contract:
    return Contract(
        extents=(
            Extent("m"),
            Extent("n", divisible_by=8, minimum=8),
            Extent("k", divisible_by=8, minimum=8),
        ),
        tensors=(
            Tensor("a", "bfloat16", ("m", "k")),
            Tensor("b", "bfloat16", ("n", "k")),
            Tensor("bias", "bfloat16", ("n",), align=4, optional=True),
            Tensor("c", "bfloat16", ("m", "n"), "write"),
            # The value before the activation, for its gradient.
            Tensor("saved", "bfloat16", ("m", "n"), "write", optional=True),
        ),
        scalars=(Scalar("blocks", "int32"),),
    )


class Gemm:
    def __init__(self, variant: GemmVariant):
        self.v = variant
        self.tile = (variant.tile_m, variant.tile_n, variant.tile_k)
        self.threads = 128 * (1 + CONSUMERS)

    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        bias: cute.Tensor,
        c: cute.Tensor,
        saved: cute.Tensor,
        blocks: Int32,
        stream: CUstream,
    ):
        helpers = cutlass.utils.hopper_helpers
        rows = cutlass.utils.LayoutEnum.ROW_MAJOR
        major = cute.nvgpu.warpgroup.OperandMajorMode.K
        mma = helpers.make_trivial_tiled_mma(
            BFloat16, BFloat16, major, major, Float32, (CONSUMERS, 1, 1), (64, self.v.tile_n)
        )
        a_layout = helpers.make_smem_layout_a(rows, self.tile, BFloat16, self.v.stages)
        b_layout = helpers.make_smem_layout_b(
            cutlass.utils.LayoutEnum.from_tensor(b), self.tile, BFloat16, self.v.stages
        )
        load = cute.nvgpu.cpasync.CopyBulkTensorTileG2SOp()
        a_atom, a_coordinates = cute.nvgpu.cpasync.make_tiled_tma_atom(
            load, a, cute.slice_(a_layout, (None, None, 0)), (self.v.tile_m, self.v.tile_k)
        )
        b_atom, b_coordinates = cute.nvgpu.cpasync.make_tiled_tma_atom(
            load, b, cute.slice_(b_layout, (None, None, 0)), (self.v.tile_n, self.v.tile_k)
        )
        self.kernel(
            mma, a_atom, a_coordinates, a_layout, b_atom, b_coordinates, b_layout, bias, c, saved
        ).launch(grid=[blocks, 1, 1], block=[self.threads, 1, 1], stream=stream)

    @cute.jit
    def place(self, tile: Int32, rows: Int32, columns: Int32):
        """The (row, column) of a tile: down GROUP rows of tiles, then to the next column."""
        in_group = GROUP * columns
        group = tile // in_group
        height = rows - group * GROUP
        if height > GROUP:
            height = Int32(GROUP)
        at = tile - group * in_group
        return group * GROUP + at % height, at // height

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        a_atom: cute.CopyAtom,
        a: cute.Tensor,
        a_layout: cute.ComposedLayout,
        b_atom: cute.CopyAtom,
        b: cute.Tensor,
        b_layout: cute.ComposedLayout,
        bias: cute.Tensor,
        c: cute.Tensor,
        saved: cute.Tensor,
    ):
        tile_m, tile_n, tile_k = self.tile
        stages = self.v.stages
        t, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())

        memory = cutlass.memory.SmemAllocator()
        barriers = memory.allocate_array(Int64, 2 * stages, byte_alignment=8)
        a_ring = memory.allocate_tensor(
            BFloat16, a_layout.outer, byte_alignment=1024, swizzle=a_layout.inner
        )
        b_ring = memory.allocate_tensor(
            BFloat16, b_layout.outer, byte_alignment=1024, swizzle=b_layout.inner
        )
        ring = cutlass.pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers,
            num_stages=stages,
            producer_group=cutlass.pipeline.CooperativeGroup(cutlass.pipeline.Agent.Thread),
            consumer_group=cutlass.pipeline.CooperativeGroup(
                cutlass.pipeline.Agent.Thread, 128 * CONSUMERS
            ),
            tx_count=(tile_m + tile_n) * tile_k * 2,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
            enable_multicast_signaling=True,
        )

        # (tile, tile_k, tiles, steps along k)
        a_tiles = cute.local_tile(a, (tile_m, tile_k), (None, None))
        b_tiles = cute.local_tile(b, (tile_n, tile_k), (None, None))
        one = cute.make_layout(1)
        a_to, a_from = cute.nvgpu.cpasync.tma_partition(
            a_atom, 0, one, cute.group_modes(a_ring, 0, 2), cute.group_modes(a_tiles, 0, 2)
        )
        b_to, b_from = cute.nvgpu.cpasync.tma_partition(
            b_atom, 0, one, cute.group_modes(b_ring, 0, 2), cute.group_modes(b_tiles, 0, 2)
        )
        m, n = c.shape[0], c.shape[1]
        rows, columns = cute.ceil_div(m, tile_m), cute.ceil_div(n, tile_n)
        tiles = rows * columns
        steps = cute.size(a_tiles, mode=[3])

        if warp < 4:
            cute.arch.setmaxregister_decrease(40)
            if warp == 0:
                state = cutlass.pipeline.make_pipeline_state(
                    cutlass.pipeline.PipelineUserType.Producer, stages
                )
                for tile in cutlass.range(block, tiles, blocks, unroll=1):
                    row, column = self.place(tile, rows, columns)
                    for step in cutlass.range(steps, unroll=1):
                        ring.producer_acquire(state)
                        full = ring.producer_get_barrier(state)
                        cute.copy(
                            a_atom,
                            a_from[None, row, step],
                            a_to[None, state.index],
                            tma_bar_ptr=full,
                        )
                        cute.copy(
                            b_atom,
                            b_from[None, column, step],
                            b_to[None, state.index],
                            tma_bar_ptr=full,
                        )
                        state.advance()
                # The block may not end while its loads are on their way.
                ring.producer_tail(state)
        else:
            cute.arch.setmaxregister_increase(232)
            # Always added to: the accumulators begin as zeros.
            mma.set(cute.nvgpu.warpgroup.Field.ACCUMULATE, True)
            thread = mma.get_slice(t - 128)
            a_parts = mma.make_fragment_A(thread.partition_A(a_ring))
            b_parts = mma.make_fragment_B(thread.partition_B(b_ring))
            places = thread.partition_C(cute.make_identity_tensor((tile_m, tile_n)))
            sums = cute.make_rmem_tensor(places.shape, Float32)
            state = cutlass.pipeline.make_pipeline_state(
                cutlass.pipeline.PipelineUserType.Consumer, stages
            )
            behind = cutlass.pipeline.make_pipeline_state(
                cutlass.pipeline.PipelineUserType.Consumer, stages
            )
            for tile in cutlass.range(block, tiles, blocks, unroll=1):
                row, column = self.place(tile, rows, columns)
                sums.fill(0.0)
                for step in cutlass.range(steps, unroll=1):
                    ring.consumer_wait(state)
                    cute.nvgpu.warpgroup.fence()
                    for part in cutlass.range_constexpr(cute.size(a_parts, mode=[2])):
                        cute.gemm(
                            mma,
                            sums,
                            a_parts[None, None, part, state.index],
                            b_parts[None, None, part, state.index],
                            sums,
                        )
                    cute.nvgpu.warpgroup.commit_group()
                    # The products of the stage before have been read; its place is free.
                    cute.nvgpu.warpgroup.wait_group(1)
                    if step > 0:
                        ring.consumer_release(behind)
                        behind.advance()
                    state.advance()
                cute.nvgpu.warpgroup.wait_group(0)
                ring.consumer_release(behind)
                behind.advance()
                self.write(sums, places, row * tile_m, column * tile_n, bias, c, saved)

    @cute.jit
    def write(
        self,
        sums: cute.Tensor,
        places: cute.Tensor,
        first_row: Int32,
        first_column: Int32,
        bias: cute.Tensor,
        c: cute.Tensor,
        saved: cute.Tensor,
    ):
        """A thread's accumulators, two neighbouring columns at a time."""
        m, n = c.shape[0], c.shape[1]
        pair = cute.make_rmem_tensor((2,), BFloat16)
        values = cute.make_rmem_tensor((2,), Float32)
        for i in cutlass.range_constexpr(0, cute.size(sums), 2):
            row = first_row + places[i][0]
            column = first_column + places[i][1]
            if row < m and column < n:
                values[0] = sums[i]
                values[1] = sums[i + 1]
                if present(bias):
                    values[0] = values[0] + bias[column].to(Float32)
                    values[1] = values[1] + bias[column + 1].to(Float32)
                if const_expr(self.v.epilogue == "gelu_tanh"):
                    if present(saved):
                        pair.store(values.load().to(BFloat16))
                        cute.autovec_copy(pair, self.pair_of(saved, row, column))
                    x = values.load()
                    inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
                    # tanh(y) = 1 - 2 / (exp(2 y) + 1), which is right at both ends.
                    grown = cute.math.exp2(inner * (2 * 1.4426950408889634))
                    values.store(x - x / (grown + 1.0))
                pair.store(values.load().to(BFloat16))
                cute.autovec_copy(pair, self.pair_of(c, row, column))

    @cute.jit
    def pair_of(self, tensor: cute.Tensor, row: Int32, column: Int32):
        start = cute.domain_offset((row, column), tensor).iterator
        return cute.make_tensor(start.align(4), cute.make_layout(2))


def reference(a, b, bias=None, epilogue="bias"):
    """c and the saved value before the activation, in float64."""
    import numpy as np

    saved = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    if bias is not None:
        saved = saved + np.asarray(bias, np.float64)
    c = saved
    if epilogue == "gelu_tanh":
        c = saved / 2 * (1 + np.tanh(0.7978845608028654 * (saved + 0.044715 * saved**3)))
    return {"c": c, "saved": saved}


register(
    Kernel(
        name="gemm_tn",
        doc="bfloat16 product a @ b.T, with a bias added.",
        variants=variants("bias"),
        contract=contract,
        make=Gemm,
        reference=reference,
        instructions=("HGMMA", "UTMALDG"),
    )
)
register(
    Kernel(
        name="gemm_tn_gelu",
        doc="bfloat16 product a @ b.T, with a bias added, through GELU (tanh); the input of it out.",
        variants=variants("gelu_tanh"),
        contract=contract,
        make=Gemm,
        reference=reference,
        instructions=("HGMMA", "UTMALDG"),
    )
)
