"""Normalised rows: y = (v - mean) * rstd * weight + bias of v = x + residual.

One pass over memory: a row stays in registers between its statistics and its result. The statistics
are two-pass there, so a large mean costs no accuracy. v is rounded to the storage dtype before
anything else, as the separate add would leave it, and written to `total` where that is wanted.
"""

from dataclasses import dataclass
from functools import partial

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import DTYPES, CUstream, Float32, const_expr, cute, cutlass
from ..registry import Kernel, register
from ..rows import WARP, RowShape, piece, piece_of_vector, present, row_shapes, row_sum

DTYPE_CODES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class NormVariant:
    """dtype of rows, dtype of weight and bias, whether the mean is taken off, and the shape."""

    dtype: str
    parameters: str
    centred: bool
    capacity: int
    threads: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.dtype}_{self.parameters}_{self.capacity}x{self.threads}"

    @property
    def shape(self) -> RowShape:
        return RowShape(self.capacity, self.threads, self.rows)

    @property
    def width(self) -> int:
        return 4 if self.dtype == "f32" else 8


def norm_variants(centred: bool, elements: int, longest: int = 16384) -> tuple[NormVariant, ...]:
    """All dtypes, capacities from 256 to `longest`, `elements` a thread."""
    pairs = (("bf16", "bf16"), ("bf16", "f32"), ("f16", "f16"), ("f16", "f32"), ("f32", "f32"))
    return tuple(
        NormVariant(dtype, parameters, centred, s.capacity, s.threads, s.rows)
        for dtype, parameters in pairs
        for s in row_shapes(4 if dtype == "f32" else 8, 256, longest, elements)
    )


def contract(v: NormVariant) -> Contract:
    dtype, parameters = DTYPE_CODES[v.dtype], DTYPE_CODES[v.parameters]

    def rows(name: str, access: str, optional: bool = False, alias: tuple[str, ...] = ()) -> Tensor:
        return Tensor(name, dtype, ("m", "n"), access, optional=optional,
                      may_alias=alias)  # fmt: skip

    return Contract(
        extents=(Extent("m"), Extent("n", divisible_by=8, minimum=8, maximum=v.capacity)),
        tensors=(
            rows("x", "read"),
            rows("residual", "read", optional=True),
            Tensor("weight", parameters, ("n",), optional=True),
            Tensor("bias", parameters, ("n",), optional=True),
            rows("y", "write", alias=("x", "residual")),
            rows("total", "write", optional=True, alias=("x", "residual")),
            Tensor("mean", "float32", ("m",), "write", align=4, optional=True),
            Tensor("rstd", "float32", ("m",), "write", align=4, optional=True),
        ),
        scalars=(Scalar("eps", "float32"),),
    )


class NormForward:
    def __init__(self, variant: NormVariant):
        self.v = variant
        self.dtype = DTYPES[DTYPE_CODES[variant.dtype]]
        self.parameters = DTYPES[DTYPE_CODES[variant.parameters]]
        self.width = variant.width
        self.vectors = variant.shape.vectors(variant.width)

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        residual: cute.Tensor,
        weight: cute.Tensor,
        bias: cute.Tensor,
        y: cute.Tensor,
        total: cute.Tensor,
        mean: cute.Tensor,
        rstd: cute.Tensor,
        eps: Float32,
        stream: CUstream,
    ):
        self.kernel(x, residual, weight, bias, y, total, mean, rstd, eps).launch(
            grid=[cute.ceil_div(x.shape[0], self.v.rows), 1, 1],
            block=[self.v.threads, self.v.rows, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        residual: cute.Tensor,
        weight: cute.Tensor,
        bias: cute.Tensor,
        y: cute.Tensor,
        total: cute.Tensor,
        mean: cute.Tensor,
        rstd: cute.Tensor,
        eps: Float32,
    ):
        threads, width, vectors = self.v.threads, self.width, self.vectors
        shared = cutlass.memory.SmemAllocator().allocate_tensor(
            Float32, cute.make_layout(max(1, threads // WARP))
        )
        t, group, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row = block * self.v.rows + group
        if row < x.shape[0]:
            n = x.shape[1]
            values = cute.make_rmem_tensor((width, vectors), Float32)
            stored = cute.make_rmem_tensor((width,), self.dtype)
            addend = cute.make_rmem_tensor((width,), self.dtype)
            values.fill(0.0)
            for v in cutlass.range_constexpr(vectors):
                column = (v * threads + t) * width
                if column < n:
                    cute.autovec_copy(piece(x, row, column, width), stored)
                    if present(residual):
                        cute.autovec_copy(piece(residual, row, column, width), addend)
                        added = stored.load().to(Float32) + addend.load().to(Float32)
                        stored.store(added.to(self.dtype))
                    if present(total):
                        cute.autovec_copy(stored, piece(total, row, column, width))
                    values[None, v].store(stored.load().to(Float32))
            count = Float32(n)
            centre = Float32(0)
            if const_expr(self.v.centred):
                part = values.load().reduce(cute.ReductionOp.ADD, Float32(0), 0)
                centre = row_sum(part, shared, threads) / count
            squares = Float32(0)
            for v in cutlass.range_constexpr(vectors):
                if (v * threads + t) * width < n:
                    offset = values[None, v].load() - centre
                    squares += (offset * offset).reduce(cute.ReductionOp.ADD, Float32(0), 0)
            scale = cute.math.rsqrt(row_sum(squares, shared, threads) / count + eps)
            if t == 0:
                if present(mean):
                    mean[row] = centre
                if present(rstd):
                    rstd[row] = scale
            factor = cute.make_rmem_tensor((width,), self.parameters)
            for v in cutlass.range_constexpr(vectors):
                column = (v * threads + t) * width
                if column < n:
                    normed = values[None, v]
                    normed.store((normed.load() - centre) * scale)
                    if present(weight):
                        cute.autovec_copy(piece_of_vector(weight, column, width), factor)
                        normed.store(normed.load() * factor.load().to(Float32))
                    if present(bias):
                        cute.autovec_copy(piece_of_vector(bias, column, width), factor)
                        normed.store(normed.load() + factor.load().to(Float32))
                    stored.store(normed.load().to(self.dtype))
                    cute.autovec_copy(stored, piece(y, row, column, width))


def reference(x, eps, residual=None, weight=None, bias=None, centred=True, round_to=None):
    """y, total, mean, rstd in float64; `round_to` rounds the sum as its storage would."""
    import numpy as np

    total = np.asarray(x, np.float64)
    if residual is not None:
        total = total + np.asarray(residual, np.float64)
        if round_to is not None:
            total = np.asarray(round_to(total), np.float64)
    mean = total.mean(-1) if centred else np.zeros(total.shape[:-1])
    offset = total - mean[..., None]
    rstd = 1 / np.sqrt((offset**2).mean(-1) + eps)
    y = offset * rstd[..., None]
    if weight is not None:
        y = y * np.asarray(weight, np.float64)
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    return {"y": y, "total": total, "mean": mean, "rstd": rstd}


LAYER_NORM_FORWARD = register(
    Kernel(
        name="layer_norm_forward",
        doc="LayerNorm of rows after an optional residual add; sum and statistics out.",
        variants=norm_variants(True, elements=16),
        contract=contract,
        make=NormForward,
        reference=reference,
    )
)
RMS_NORM_FORWARD = register(
    Kernel(
        name="rms_norm_forward",
        doc="RMSNorm of rows after an optional residual add; sum and statistics out.",
        variants=norm_variants(False, elements=16),
        contract=contract,
        make=NormForward,
        reference=partial(reference, centred=False),
    )
)
