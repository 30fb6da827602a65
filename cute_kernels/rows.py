"""What kernels over rows share: how a row is spread over threads, 16-byte pieces, reductions.

Device functions here are called from kernels. A row belongs to `threads` threads, a warp or several
whole ones; a block has `rows` such groups. Thread t of a row holds piece v of `width` elements at
column (v * threads + t) * width, so neighbouring threads touch neighbouring memory.
"""

from dataclasses import dataclass

from .dsl import Float32, Int32, const_expr, cute, cutlass

WARP = 32


@dataclass(frozen=True)
class RowShape:
    """How rows of up to `capacity` elements are spread."""

    capacity: int
    threads: int
    rows: int  # of a block; more than one only where a row is a warp's

    def __post_init__(self) -> None:
        if self.threads % WARP or (self.rows > 1 and self.threads != WARP):
            raise ValueError(f"rows of {self.threads} threads, {self.rows} in a block")

    def vectors(self, width: int) -> int:
        if self.capacity % (self.threads * width):
            raise ValueError(f"{self.capacity} is no multiple of {self.threads} * {width}")
        return self.capacity // (self.threads * width)


def row_shapes(width: int, least: int, most: int, elements: int) -> tuple[RowShape, ...]:
    """A shape for every power of two from `least` to `most` columns, of at most `elements` a
    thread where 1024 threads allow it."""
    shapes = []
    capacity = least
    while capacity <= most:
        threads = min(1024, max(WARP, capacity // elements))
        threads = min(threads, max(WARP, capacity // width))
        rows = 4 if threads == WARP else 1
        shapes.append(RowShape(max(capacity, threads * width), threads, rows))
        capacity *= 2
    return tuple(dict.fromkeys(shapes))


@cute.jit
def present(tensor: cute.Tensor):
    """Whether an optional tensor was given."""
    return tensor.iterator.toint() != 0


@cute.jit
def piece(tensor: cute.Tensor, row: Int32, column: Int32, width: cutlass.Constexpr):
    """`width` neighbouring elements of a row, as a tensor over the memory."""
    start = cute.domain_offset((row, column), tensor).iterator
    # The contract promises it: bases, strides and extents are multiples of 16 bytes.
    return cute.make_tensor(start.align(16), cute.make_layout(width))


@cute.jit
def piece_of_vector(tensor: cute.Tensor, column: Int32, width: cutlass.Constexpr):
    start = cute.domain_offset((column,), tensor).iterator
    return cute.make_tensor(start.align(16), cute.make_layout(width))


@cute.jit
def row_sum(value: Float32, shared: cute.Tensor, threads: cutlass.Constexpr):
    """The sum over a row's threads, in a fixed order; all of them get it. `shared`: one Float32 a
    warp, not read by anyone before the barrier here."""
    value = cute.arch.warp_reduction_sum(value)
    if const_expr(threads > WARP):
        lane = cute.arch.lane_idx()
        warp = cute.arch.warp_idx()
        cute.arch.barrier()  # an earlier reduction's results have been read
        if lane == 0:
            shared[warp] = value
        cute.arch.barrier()
        value = Float32(0)
        if lane < threads // WARP:
            value = shared[lane]
        value = cute.arch.warp_reduction_sum(value)
    return value


@cute.jit
def row_max(value: Float32, shared: cute.Tensor, threads: cutlass.Constexpr):
    """The largest over a row's threads, as row_sum."""
    value = cute.arch.warp_reduction_max(value)
    if const_expr(threads > WARP):
        lane = cute.arch.lane_idx()
        warp = cute.arch.warp_idx()
        cute.arch.barrier()
        if lane == 0:
            shared[warp] = value
        cute.arch.barrier()
        value = -Float32.inf
        if lane < threads // WARP:
            value = shared[lane]
        value = cute.arch.warp_reduction_max(value)
    return value


@cute.jit
def load_ragged(
    tensor: cute.Tensor,
    row: Int32,
    column: Int32,
    stored: cute.Tensor,
    width: cutlass.Constexpr,
    fill: cutlass.Constexpr,
):
    """`width` elements of a row into `stored`; those past its end are `fill`. One access where all
    are there and `width` > 1."""
    n = tensor.shape[1]
    if column + width <= n:
        if const_expr(width > 1):
            cute.autovec_copy(piece(tensor, row, column, width), stored)
        else:
            stored[0] = tensor[row, column]
    else:
        for k in cutlass.range_constexpr(width):
            stored[k] = tensor.element_type(fill)
            if column + k < n:
                stored[k] = tensor[row, column + k]


@cute.jit
def store_ragged(
    tensor: cute.Tensor,
    row: Int32,
    column: Int32,
    stored: cute.Tensor,
    width: cutlass.Constexpr,
):
    """The other way; what is past the row's end is not written."""
    n = tensor.shape[1]
    if column + width <= n:
        if const_expr(width > 1):
            cute.autovec_copy(stored, piece(tensor, row, column, width))
        else:
            tensor[row, column] = stored[0]
    else:
        for k in cutlass.range_constexpr(width):
            if column + k < n:
                tensor[row, column + k] = stored[k]
