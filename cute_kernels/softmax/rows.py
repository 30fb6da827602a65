"""softmax and log_softmax along rows that stay in registers, and their gradients.

forward   y = exp(x - max) / sum, or with `logarithm` x - max - log(sum)
backward  dx = (dy - sum(dy * y)) * y, or with `logarithm` dy - exp(y) * sum(dy)
"""

import math
from dataclasses import dataclass

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import DTYPES, CUstream, Float32, Int32, cute, cutlass
from ..registry import Kernel, register
from ..rows import WARP, RowShape, piece, row_max, row_shapes, row_sum

DTYPE_CODES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
LOG2E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class SoftmaxVariant:
    """dtype of the rows and how one is spread."""

    dtype: str
    capacity: int
    threads: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.dtype}_{self.capacity}x{self.threads}"

    @property
    def width(self) -> int:
        return 4 if self.dtype == "f32" else 8


VARIANTS = tuple(
    SoftmaxVariant(dtype, s.capacity, s.threads, s.rows)
    for dtype, width in (("bf16", 8), ("f16", 8), ("f32", 4))
    for s in row_shapes(width, 256, 16384, elements=8)
)


def _rows(v: SoftmaxVariant, name: str, access: str, alias: tuple[str, ...] = ()) -> Tensor:
    return Tensor(name, DTYPE_CODES[v.dtype], ("m", "n"), access, may_alias=alias)


def _extents(v: SoftmaxVariant) -> tuple[Extent, ...]:
    return (Extent("m"), Extent("n", divisible_by=8, minimum=8, maximum=v.capacity))


def forward_contract(v: SoftmaxVariant) -> Contract:
    return Contract(
        _extents(v),
        (_rows(v, "x", "read"), _rows(v, "y", "write", ("x",))),
        (Scalar("logarithm", "int32"),),
    )


def backward_contract(v: SoftmaxVariant) -> Contract:
    return Contract(
        _extents(v),
        (_rows(v, "dy", "read"), _rows(v, "y", "read"), _rows(v, "dx", "write", ("dy", "y"))),
        (Scalar("logarithm", "int32"),),
    )


class _Softmax:
    def __init__(self, variant: SoftmaxVariant):
        self.v = variant
        self.dtype = DTYPES[DTYPE_CODES[variant.dtype]]
        shape = RowShape(variant.capacity, variant.threads, variant.rows)
        self.vectors = shape.vectors(variant.width)

    def shared(self):
        return cutlass.memory.SmemAllocator().allocate_tensor(
            Float32, cute.make_layout(max(1, self.v.threads // WARP))
        )


class SoftmaxForward(_Softmax):
    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, logarithm: Int32, stream: CUstream):
        self.kernel(x, y, logarithm).launch(
            grid=[cute.ceil_div(x.shape[0], self.v.rows), 1, 1],
            block=[self.v.threads, self.v.rows, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor, logarithm: Int32):
        threads, width, vectors = self.v.threads, self.v.width, self.vectors
        shared = self.shared()
        t, group, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row = block * self.v.rows + group
        if row < x.shape[0]:
            n = x.shape[1]
            values = cute.make_rmem_tensor((width, vectors), Float32)
            stored = cute.make_rmem_tensor((width,), self.dtype)
            values.fill(-math.inf)
            for v in cutlass.range_constexpr(vectors):
                column = (v * threads + t) * width
                if column < n:
                    cute.autovec_copy(piece(x, row, column, width), stored)
                    values[None, v].store(stored.load().to(Float32))
            top = values.load().reduce(cute.ReductionOp.MAX, -Float32.inf, 0)
            top = row_max(top, shared, threads)
            total = Float32(0)
            for v in cutlass.range_constexpr(vectors):
                if (v * threads + t) * width < n:
                    scaled = cute.math.exp2((values[None, v].load() - top) * LOG2E)
                    total += scaled.reduce(cute.ReductionOp.ADD, Float32(0), 0)
            total = row_sum(total, shared, threads)
            scale = Float32(1) / total
            shift = top + cute.math.log(total)
            for v in cutlass.range_constexpr(vectors):
                column = (v * threads + t) * width
                if column < n:
                    if logarithm != 0:
                        stored.store((values[None, v].load() - shift).to(self.dtype))
                    else:
                        scaled = cute.math.exp2((values[None, v].load() - top) * LOG2E)
                        stored.store((scaled * scale).to(self.dtype))
                    cute.autovec_copy(stored, piece(y, row, column, width))


class SoftmaxBackward(_Softmax):
    @cute.jit
    def __call__(
        self,
        dy: cute.Tensor,
        y: cute.Tensor,
        dx: cute.Tensor,
        logarithm: Int32,
        stream: CUstream,
    ):
        self.kernel(dy, y, dx, logarithm).launch(
            grid=[cute.ceil_div(dy.shape[0], self.v.rows), 1, 1],
            block=[self.v.threads, self.v.rows, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, dy: cute.Tensor, y: cute.Tensor, dx: cute.Tensor, logarithm: Int32):
        threads, width, vectors = self.v.threads, self.v.width, self.vectors
        shared = self.shared()
        t, group, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row = block * self.v.rows + group
        if row < dy.shape[0]:
            n = dy.shape[1]
            gradients = cute.make_rmem_tensor((width, vectors), self.dtype)
            outputs = cute.make_rmem_tensor((width, vectors), self.dtype)
            stored = cute.make_rmem_tensor((width,), self.dtype)
            total = Float32(0)
            for v in cutlass.range_constexpr(vectors):
                column = (v * threads + t) * width
                if column < n:
                    cute.autovec_copy(piece(dy, row, column, width), gradients[None, v])
                    cute.autovec_copy(piece(y, row, column, width), outputs[None, v])
                    g = gradients[None, v].load().to(Float32)
                    part = g.reduce(cute.ReductionOp.ADD, Float32(0), 0)
                    if logarithm == 0:
                        part = (g * outputs[None, v].load().to(Float32)).reduce(
                            cute.ReductionOp.ADD, Float32(0), 0
                        )
                    total += part
            total = row_sum(total, shared, threads)
            for v in cutlass.range_constexpr(vectors):
                column = (v * threads + t) * width
                if column < n:
                    g = gradients[None, v].load().to(Float32)
                    out = outputs[None, v].load().to(Float32)
                    if logarithm != 0:
                        stored.store((g - cute.math.exp2(out * LOG2E) * total).to(self.dtype))
                    else:
                        stored.store(((g - total) * out).to(self.dtype))
                    cute.autovec_copy(stored, piece(dx, row, column, width))


def forward_reference(x, logarithm=0):
    """y in float64."""
    import numpy as np

    x = np.asarray(x, np.float64)
    shifted = x - x.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True)
    return {"y": shifted - np.log(total) if logarithm else np.exp(shifted) / total}


def backward_reference(dy, y, logarithm=0):
    """dx in float64, from the output as it was stored."""
    import numpy as np

    dy, y = np.asarray(dy, np.float64), np.asarray(y, np.float64)
    if logarithm:
        return {"dx": dy - np.exp(y) * dy.sum(-1, keepdims=True)}
    return {"dx": (dy - (dy * y).sum(-1, keepdims=True)) * y}


register(
    Kernel(
        name="softmax_forward",
        doc="softmax or log_softmax of rows.",
        variants=VARIANTS,
        contract=forward_contract,
        make=SoftmaxForward,
        reference=forward_reference,
    )
)
register(
    Kernel(
        name="softmax_backward",
        doc="Gradient of softmax or log_softmax of rows, from its output.",
        variants=VARIANTS,
        contract=backward_contract,
        make=SoftmaxBackward,
        reference=backward_reference,
    )
)
