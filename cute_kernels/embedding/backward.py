"""The gradient of an embedding table, in a fixed order: no atomic additions.

The indices come sorted (`keys`, stable), each with the position it had (`order`). The blocks of the
first of several equal keys sum their rows of `dy` in float32, in the order of their positions, and
write the table's row; the others end at once. Rows no key names are not written.
"""

from dataclasses import dataclass

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import DTYPES, CUstream, Float32, Int64, cute
from ..registry import Kernel, register
from ..rows import piece

DTYPE_CODES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class EmbeddingVariant:
    """dtype, and threads of a block, each with 16 bytes of a row."""

    dtype: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.dtype}_{self.threads}"

    @property
    def width(self) -> int:
        return 4 if self.dtype == "f32" else 8


VARIANTS = tuple(EmbeddingVariant(d, t) for d in ("bf16", "f16", "f32") for t in (32, 128))


def contract(v: EmbeddingVariant) -> Contract:
    dtype = DTYPE_CODES[v.dtype]
    return Contract(
        extents=(
            Extent("positions"),
            Extent("words"),
            # A grid's y ends at 65535 blocks.
            Extent("d", divisible_by=8, minimum=8, maximum=65535 * v.threads * v.width),
        ),
        tensors=(
            Tensor("dy", dtype, ("positions", "d")),
            Tensor("keys", "int32", ("positions",), align=4),
            Tensor("order", "int32", ("positions",), align=4),
            Tensor("table", dtype, ("words", "d"), "write"),
        ),
        scalars=(Scalar("padding_idx", "int64"),),
    )


class EmbeddingBackward:
    def __init__(self, variant: EmbeddingVariant):
        self.v = variant
        self.dtype = DTYPES[DTYPE_CODES[variant.dtype]]

    @cute.jit
    def __call__(
        self,
        dy: cute.Tensor,
        keys: cute.Tensor,
        order: cute.Tensor,
        table: cute.Tensor,
        padding_idx: Int64,
        stream: CUstream,
    ):
        self.kernel(dy, keys, order, table, padding_idx).launch(
            grid=[
                dy.shape[0],
                cute.ceil_div(dy.shape[1], self.v.threads * self.v.width),
                1,
            ],
            block=[self.v.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        dy: cute.Tensor,
        keys: cute.Tensor,
        order: cute.Tensor,
        table: cute.Tensor,
        padding_idx: Int64,
    ):
        width = self.v.width
        t, _, _ = cute.arch.thread_idx()
        position, strip, _ = cute.arch.block_idx()
        column = (strip * self.v.threads + t) * width
        count, d = dy.shape[0], dy.shape[1]
        key = keys[position]
        first = key + 1
        if position > 0:
            first = keys[position - 1]
        if first != key and Int64(key) != padding_idx and column < d:
            stored = cute.make_rmem_tensor((width,), self.dtype)
            sums = cute.make_rmem_tensor((width,), Float32)
            sums.fill(0.0)
            at = position
            same = key
            while same == key:
                cute.autovec_copy(piece(dy, order[at], column, width), stored)
                sums.store(sums.load() + stored.load().to(Float32))
                at += 1
                same = key + 1
                if at < count:
                    same = keys[at]
            stored.store(sums.load().to(self.dtype))
            cute.autovec_copy(stored, piece(table, key, column, width))


def reference(dy, keys, order, table, padding_idx=-1):
    """The table's gradient in float64; rows without a key keep what `table` holds."""
    import numpy as np

    out = np.array(table, np.float64)
    dy = np.asarray(dy, np.float64)
    for key in np.unique(keys):
        if key != padding_idx:
            out[key] = dy[order[keys == key]].sum(0)
    return {"table": out}


register(
    Kernel(
        name="embedding_backward",
        doc="Sums rows of dy into the rows of a table, in the order of sorted indices.",
        variants=VARIANTS,
        contract=contract,
        make=EmbeddingBackward,
        reference=reference,
    )
)
