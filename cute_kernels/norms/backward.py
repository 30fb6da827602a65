"""Gradients of normalised rows.

With xhat = (total - mean) * rstd and g = dy * weight, per row
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dtotal
(RMSNorm without the mean(g), and with no bias), where dtotal is the gradient that reaches the residual sum by another
way. Weight and bias gradients are sums over rows of dy * xhat and dy, in two steps of fixed order:
a block walks over every `groups`-th row with its columns' sums in registers and writes them as one
row of `weight_parts` and `bias_parts`, whose columns the caller's second kernel sums.
"""

from dataclasses import asdict, dataclass

from ..contract import Contract, Extent, Tensor
from ..dsl import DTYPES, CUstream, Float32, const_expr, cute, cutlass
from ..registry import Kernel, register
from ..rows import WARP, piece, piece_of_vector, present, row_sum
from .forward import DTYPE_CODES, NormVariant, norm_variants


@dataclass(frozen=True)
class BackwardVariant(NormVariant):
    """With `reload` a row is read a second time, from the cache, instead of kept in registers:
    where a thread has 32 columns, their sums take the room."""

    reload: bool = False


def backward_variants(centred: bool) -> tuple[BackwardVariant, ...]:
    return tuple(
        BackwardVariant(**{**asdict(v), "threads": min(v.threads, 512)}, reload=v.threads > 512)
        for v in norm_variants(centred, elements=16)
    )


def contract(v: BackwardVariant) -> Contract:
    dtype, parameters = DTYPE_CODES[v.dtype], DTYPE_CODES[v.parameters]

    def rows(name: str, access: str, optional: bool = False, alias: tuple[str, ...] = ()) -> Tensor:
        return Tensor(name, dtype, ("m", "n"), access, optional=optional,
                      may_alias=alias)  # fmt: skip

    return Contract(
        extents=(
            Extent("m"),
            Extent("n", divisible_by=8, minimum=8, maximum=v.capacity),
            # One for each group of threads that takes rows.
            Extent("groups", divisible_by=4, minimum=4),
        ),
        tensors=(
            rows("dy", "read"),
            rows("total", "read"),
            Tensor("weight", parameters, ("n",), optional=True),
            Tensor("mean", "float32", ("m",), align=4, optional=not v.centred),
            Tensor("rstd", "float32", ("m",), align=4),
            rows("dtotal", "read", optional=True),
            rows("dx", "write", alias=("dy", "total", "dtotal")),
            Tensor("weight_parts", "float32", ("groups", "n"), "write",
                   optional=True),
            Tensor("bias_parts", "float32", ("groups", "n"), "write", optional=True),
        ),
    )  # fmt: skip


class NormBackward:
    def __init__(self, variant: BackwardVariant):
        self.v = variant
        self.dtype = DTYPES[DTYPE_CODES[variant.dtype]]
        self.parameters = DTYPES[DTYPE_CODES[variant.parameters]]
        self.width = variant.width
        self.vectors = variant.shape.vectors(variant.width)
        self.kept = 1 if variant.reload else self.vectors

    @cute.jit
    def __call__(
        self,
        dy: cute.Tensor,
        total: cute.Tensor,
        weight: cute.Tensor,
        mean: cute.Tensor,
        rstd: cute.Tensor,
        dtotal: cute.Tensor,
        dx: cute.Tensor,
        weight_parts: cute.Tensor,
        bias_parts: cute.Tensor,
        stream: CUstream,
    ):
        self.kernel(dy, total, weight, mean, rstd, dtotal, dx, weight_parts, bias_parts).launch(
            grid=[weight_parts.shape[0] // self.v.rows, 1, 1],
            block=[self.v.threads, self.v.rows, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        dy: cute.Tensor,
        total: cute.Tensor,
        weight: cute.Tensor,
        mean: cute.Tensor,
        rstd: cute.Tensor,
        dtotal: cute.Tensor,
        dx: cute.Tensor,
        weight_parts: cute.Tensor,
        bias_parts: cute.Tensor,
    ):
        threads, width, vectors = self.v.threads, self.width, self.vectors
        shared = cutlass.memory.SmemAllocator().allocate_tensor(
            Float32, cute.make_layout(max(1, threads // WARP))
        )
        t, group, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        first = block * self.v.rows + group
        m, n = dy.shape[0], dy.shape[1]
        groups = weight_parts.shape[0]
        count = Float32(n)
        # A row as it is stored: half the registers of its float32 form.
        gradients = cute.make_rmem_tensor((width, self.kept), self.dtype)
        inputs = cute.make_rmem_tensor((width, self.kept), self.dtype)
        along = cute.make_rmem_tensor((width,), self.dtype)
        factor = cute.make_rmem_tensor((width,), self.parameters)
        weight_sums = cute.make_rmem_tensor((width, vectors), Float32)
        bias_sums = cute.make_rmem_tensor((width, vectors), Float32)
        weight_sums.fill(0.0)
        bias_sums.fill(0.0)
        # Rows of one group of threads: whole warps take every step of this loop together.
        for row in cutlass.range(first, m, groups, unroll=1):
            centre = Float32(0)
            if const_expr(self.v.centred):
                centre = mean[row]
            scale = rstd[row]
            gradient_sum = Float32(0)
            slope_sum = Float32(0)
            if const_expr(not self.v.reload):
                for v in cutlass.range_constexpr(vectors):
                    column = (v * threads + t) * width
                    if column < n:
                        cute.autovec_copy(piece(dy, row, column, width), gradients[None, v])
                        cute.autovec_copy(piece(total, row, column, width), inputs[None, v])
            for v in cutlass.range_constexpr(vectors):
                column = (v * threads + t) * width
                k = v % self.kept
                if column < n:
                    if const_expr(self.v.reload):
                        cute.autovec_copy(piece(dy, row, column, width), gradients[None, k])
                        cute.autovec_copy(piece(total, row, column, width), inputs[None, k])
                    g = cute.make_rmem_tensor((width,), Float32)
                    g.store(gradients[None, k].load().to(Float32))
                    xhat = (inputs[None, k].load().to(Float32) - centre) * scale
                    weight_sums[None, v].store(weight_sums[None, v].load() + g.load() * xhat)
                    if const_expr(self.v.centred):
                        bias_sums[None, v].store(bias_sums[None, v].load() + g.load())
                    if present(weight):
                        cute.autovec_copy(piece_of_vector(weight, column, width), factor)
                        g.store(g.load() * factor.load().to(Float32))
                    slope_sum += (g.load() * xhat).reduce(cute.ReductionOp.ADD, Float32(0), 0)
                    if const_expr(self.v.centred):
                        gradient_sum += g.load().reduce(cute.ReductionOp.ADD, Float32(0), 0)
            slope = row_sum(slope_sum, shared, threads) / count
            constant = Float32(0)
            if const_expr(self.v.centred):
                constant = row_sum(gradient_sum, shared, threads) / count
            for v in cutlass.range_constexpr(vectors):
                column = (v * threads + t) * width
                k = v % self.kept
                if column < n:
                    if const_expr(self.v.reload):
                        cute.autovec_copy(piece(dy, row, column, width), gradients[None, k])
                        cute.autovec_copy(piece(total, row, column, width), inputs[None, k])
                    g = cute.make_rmem_tensor((width,), Float32)
                    g.store(gradients[None, k].load().to(Float32))
                    if present(weight):
                        cute.autovec_copy(piece_of_vector(weight, column, width), factor)
                        g.store(g.load() * factor.load().to(Float32))
                    xhat = (inputs[None, k].load().to(Float32) - centre) * scale
                    g.store((g.load() - constant - xhat * slope) * scale)
                    if present(dtotal):
                        cute.autovec_copy(piece(dtotal, row, column, width), along)
                        g.store(g.load() + along.load().to(Float32))
                    along.store(g.load().to(self.dtype))
                    cute.autovec_copy(along, piece(dx, row, column, width))
        # Groups without a row write zeros: every row of the parts is summed.
        for v in cutlass.range_constexpr(vectors):
            column = (v * threads + t) * width
            if column < n:
                if present(weight_parts):
                    cute.autovec_copy(
                        weight_sums[None, v], piece(weight_parts, first, column, width)
                    )
                if present(bias_parts):
                    cute.autovec_copy(bias_sums[None, v], piece(bias_parts, first, column, width))


def reference(dy, total, rstd, mean=None, weight=None, dtotal=None):
    """dx, dweight, dbias in float64, from the forward's statistics."""
    import numpy as np

    dy, total = np.asarray(dy, np.float64), np.asarray(total, np.float64)
    centre = 0.0 if mean is None else np.asarray(mean, np.float64)[:, None]
    xhat = (total - centre) * np.asarray(rstd, np.float64)[:, None]
    g = dy if weight is None else dy * np.asarray(weight, np.float64)
    constant = 0.0 if mean is None else g.mean(-1, keepdims=True)
    slope = (g * xhat).mean(-1, keepdims=True)
    dx = np.asarray(rstd, np.float64)[:, None] * (g - constant - xhat * slope)
    if dtotal is not None:
        dx = dx + np.asarray(dtotal, np.float64)
    return {"dx": dx, "dweight": (dy * xhat).sum(0), "dbias": dy.sum(0)}


LAYER_NORM_BACKWARD = register(
    Kernel(
        name="layer_norm_backward",
        doc="Input gradient of LayerNorm rows, and parts of the weight's and the bias's.",
        variants=backward_variants(True),
        contract=contract,
        make=NormBackward,
        reference=reference,
    )
)
RMS_NORM_BACKWARD = register(
    Kernel(
        name="rms_norm_backward",
        doc="Input gradient of RMSNorm rows, and parts of the weight's.",
        variants=backward_variants(False),
        contract=contract,
        make=NormBackward,
        reference=reference,
    )
)
