"""Cross entropy of rows, in three kernels that share their parts.

cross_entropy_forward reads the logits once, for a running maximum and sum (online softmax), and
writes a row's loss and log-sum-exp. cross_entropy_backward writes
    dx = (softmax(x) - smoothing / classes - (1 - smoothing) * onehot) * grad / total_weight
from the logits and log-sum-exp, in place where asked. cross_entropy_in_place does both while a row
is near: its second reading comes from the L2 cache.

A row whose target is `ignore_index` has loss, weight, log-sum-exp and gradient 0. A target out of
range stops the kernel with a record, as the library's kernel does.
"""

import math
from dataclasses import dataclass

from ..contract import Contract, Extent, Scalar, Tensor
from ..dsl import DTYPES, CUstream, Float32, Int64, const_expr, cute, cutlass
from ..failure import CROSS_ENTROPY, stop_kernel
from ..registry import Kernel, register
from ..rows import WARP, load_ragged, present, row_max, row_sum, store_ragged

DTYPE_CODES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
LOG2E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class CrossEntropyVariant:
    """dtype of the logits, elements of an access, threads of a row, rows of a block, and the most
    classes it is meant for."""

    dtype: str
    width: int
    threads: int
    rows: int
    most: int

    @property
    def name(self) -> str:
        return f"{self.dtype}_v{self.width}_{self.threads}"


SHAPES = ((32, 4, 1024), (256, 1, 16384), (1024, 1, 2**24))
VARIANTS = tuple(
    CrossEntropyVariant(dtype, width, *shape)
    for dtype, wide in (("bf16", 8), ("f16", 8), ("f32", 4))
    for shape in SHAPES
    for width in (wide, 1)
)


def _contract(v: CrossEntropyVariant, forward: bool, backward: bool) -> Contract:
    dtype = DTYPE_CODES[v.dtype]
    item = 4 if v.dtype == "f32" else 2

    def rows(name: str, access: str, alias: tuple[str, ...] = ()) -> Tensor:
        return Tensor(
            name,
            dtype,
            ("m", "n"),
            access,
            align=v.width * item,
            stride_divisible_by=v.width,
            may_alias=alias,
        )

    def column(name: str, access: str, extent: str = "m", optional: bool = False) -> Tensor:
        return Tensor(name, "float32", (extent,), access, align=4, optional=optional)

    tensors = [rows("logits", "read"), Tensor("targets", "int64", ("m",), align=8)]
    if forward:
        tensors += [column("losses", "write"), column("weights", "write", optional=True)]
        tensors += [column("lse", "write")]
        tensors += [Tensor("record", "int64", ("words",), "update", align=8)]
    else:
        tensors += [column("lse", "read")]
    if backward:
        tensors += [
            column("grad", "read", "grads"),
            column("total_weight", "read", "one", optional=True),
            rows("dx", "write", ("logits",)),
        ]
    extents = [Extent("m"), Extent("n", maximum=v.most)]
    if forward:
        extents.append(Extent("words", minimum=3, maximum=3))
    if backward:
        extents += [Extent("grads"), Extent("one", maximum=1)]
    return Contract(
        tuple(extents),
        tuple(tensors),
        (Scalar("ignore_index", "int64"), Scalar("smoothing", "float32")),
    )


class CrossEntropy:
    """The parts; each kernel is a subclass with its own arguments."""

    def __init__(self, variant: CrossEntropyVariant):
        self.v = variant
        self.dtype = DTYPES[DTYPE_CODES[variant.dtype]]

    def grid(self, m):
        return [cute.ceil_div(m, self.v.rows), 1, 1]

    def block(self):
        return [self.v.threads, self.v.rows, 1]

    def shared(self):
        return cutlass.memory.SmemAllocator().allocate_tensor(
            Float32, cute.make_layout(max(1, self.v.threads // WARP))
        )

    @cute.jit
    def log_sum_exp(self, logits: cute.Tensor, row, t, shared: cute.Tensor):
        """The row's log-sum-exp and the sum of its logits, for all its threads."""
        width, threads = self.v.width, self.v.threads
        n = logits.shape[1]
        stored = cute.make_rmem_tensor((width,), self.dtype)
        values = cute.make_rmem_tensor((width,), Float32)
        top = -Float32.inf
        total = Float32(0)
        along = Float32(0)
        for column in cutlass.range(t * width, n, threads * width, unroll=4):
            load_ragged(logits, row, column, stored, width, -math.inf)
            values.store(stored.load().to(Float32))
            largest = top
            for k in cutlass.range_constexpr(width):
                largest = cute.arch.fmax(largest, values[k])
                if column + k < n:
                    along += values[k]
            # What is subtracted stays finite while everything seen is -inf.
            shift = largest
            if largest == -Float32.inf:
                shift = Float32(0)
            scaled = cute.math.exp2((values.load() - shift) * LOG2E)
            total = total * cute.math.exp2((top - shift) * LOG2E) + scaled.reduce(
                cute.ReductionOp.ADD, Float32(0), 0
            )
            top = largest
        largest = row_max(top, shared, threads)
        shift = largest
        if largest == -Float32.inf:
            shift = Float32(0)
        total = row_sum(total * cute.math.exp2((top - shift) * LOG2E), shared, threads)
        return shift + cute.math.log(total), row_sum(along, shared, threads)

    @cute.jit
    def write_loss(
        self,
        logits: cute.Tensor,
        row,
        target,
        lse: Float32,
        along: Float32,
        smoothing: Float32,
        losses: cute.Tensor,
    ):
        loss = (Float32(1) - smoothing) * (lse - logits[row, target].to(Float32))
        if smoothing != Float32(0):
            loss += smoothing * (lse - along / Float32(logits.shape[1]))
        losses[row] = loss

    @cute.jit
    def write_gradients(
        self,
        logits: cute.Tensor,
        row,
        t,
        target,
        lse: Float32,
        scale: Float32,
        smoothing: Float32,
        dx: cute.Tensor,
    ):
        width, threads = self.v.width, self.v.threads
        n = logits.shape[1]
        stored = cute.make_rmem_tensor((width,), self.dtype)
        values = cute.make_rmem_tensor((width,), Float32)
        elsewhere = smoothing / Float32(n) * scale
        on_target = (Float32(1) - smoothing) * scale
        for column in cutlass.range(t * width, n, threads * width, unroll=4):
            load_ragged(logits, row, column, stored, width, 0.0)
            shifted = (stored.load().to(Float32) - lse) * LOG2E
            values.store(cute.math.exp2(shifted) * scale - elsewhere)
            for k in cutlass.range_constexpr(width):
                if Int64(column + k) == target:
                    values[k] = values[k] - on_target
            stored.store(values.load().to(self.dtype))
            store_ragged(dx, row, column, stored, width)

    @cute.jit
    def write_zeros(self, row, t, dx: cute.Tensor):
        width, threads = self.v.width, self.v.threads
        stored = cute.make_rmem_tensor((width,), self.dtype)
        stored.fill(0.0)
        for column in cutlass.range(t * width, dx.shape[1], threads * width, unroll=4):
            store_ragged(dx, row, column, stored, width)

    @cute.jit
    def gradient_scale(self, row, grad: cute.Tensor, total_weight: cute.Tensor):
        """grad holds one number for all rows or one a row."""
        scale = grad[0]
        if grad.shape[0] > 1:
            scale = grad[row]
        if present(total_weight):
            scale = scale / total_weight[0]
        return scale

    @cute.jit
    def check_target(self, target, n, record: cute.Tensor):
        if target < Int64(0) or target >= Int64(n):
            stop_kernel(record, Int64(CROSS_ENTROPY), target, Int64(n))

    @cute.jit
    def write_ignored(self, row, losses: cute.Tensor, weights: cute.Tensor, lse: cute.Tensor):
        losses[row] = Float32(0)
        lse[row] = Float32(0)
        if present(weights):
            weights[row] = Float32(0)


class Forward(CrossEntropy):
    @cute.jit
    def __call__(
        self,
        logits: cute.Tensor,
        targets: cute.Tensor,
        losses: cute.Tensor,
        weights: cute.Tensor,
        lse: cute.Tensor,
        record: cute.Tensor,
        ignore_index: Int64,
        smoothing: Float32,
        stream: CUstream,
    ):
        self.kernel(logits, targets, losses, weights, lse, record, ignore_index, smoothing).launch(
            grid=self.grid(logits.shape[0]), block=self.block(), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        logits: cute.Tensor,
        targets: cute.Tensor,
        losses: cute.Tensor,
        weights: cute.Tensor,
        lse: cute.Tensor,
        record: cute.Tensor,
        ignore_index: Int64,
        smoothing: Float32,
    ):
        shared = self.shared()
        t, group, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row = block * self.v.rows + group
        if row < logits.shape[0]:
            target = targets[row]
            if target == ignore_index:
                if t == 0:
                    self.write_ignored(row, losses, weights, lse)
            else:
                self.check_target(target, logits.shape[1], record)
                value, along = self.log_sum_exp(logits, row, t, shared)
                if t == 0:
                    self.write_loss(logits, row, target, value, along, smoothing, losses)
                    lse[row] = value
                    if present(weights):
                        weights[row] = Float32(1)


class Backward(CrossEntropy):
    @cute.jit
    def __call__(
        self,
        logits: cute.Tensor,
        targets: cute.Tensor,
        lse: cute.Tensor,
        grad: cute.Tensor,
        total_weight: cute.Tensor,
        dx: cute.Tensor,
        ignore_index: Int64,
        smoothing: Float32,
        stream: CUstream,
    ):
        self.kernel(logits, targets, lse, grad, total_weight, dx, ignore_index, smoothing).launch(
            grid=self.grid(logits.shape[0]), block=self.block(), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        logits: cute.Tensor,
        targets: cute.Tensor,
        lse: cute.Tensor,
        grad: cute.Tensor,
        total_weight: cute.Tensor,
        dx: cute.Tensor,
        ignore_index: Int64,
        smoothing: Float32,
    ):
        t, group, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row = block * self.v.rows + group
        if row < logits.shape[0]:
            target = targets[row]
            if target == ignore_index:
                self.write_zeros(row, t, dx)
            else:
                scale = self.gradient_scale(row, grad, total_weight)
                self.write_gradients(logits, row, t, target, lse[row], scale, smoothing, dx)


class InPlace(CrossEntropy):
    @cute.jit
    def __call__(
        self,
        logits: cute.Tensor,
        targets: cute.Tensor,
        losses: cute.Tensor,
        weights: cute.Tensor,
        lse: cute.Tensor,
        record: cute.Tensor,
        grad: cute.Tensor,
        total_weight: cute.Tensor,
        dx: cute.Tensor,
        ignore_index: Int64,
        smoothing: Float32,
        stream: CUstream,
    ):
        self.kernel(
            logits,
            targets,
            losses,
            weights,
            lse,
            record,
            grad,
            total_weight,
            dx,
            ignore_index,
            smoothing,
        ).launch(grid=self.grid(logits.shape[0]), block=self.block(), stream=stream)

    @cute.kernel
    def kernel(
        self,
        logits: cute.Tensor,
        targets: cute.Tensor,
        losses: cute.Tensor,
        weights: cute.Tensor,
        lse: cute.Tensor,
        record: cute.Tensor,
        grad: cute.Tensor,
        total_weight: cute.Tensor,
        dx: cute.Tensor,
        ignore_index: Int64,
        smoothing: Float32,
    ):
        shared = self.shared()
        t, group, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row = block * self.v.rows + group
        if row < logits.shape[0]:
            target = targets[row]
            if target == ignore_index:
                if t == 0:
                    self.write_ignored(row, losses, weights, lse)
                self.write_zeros(row, t, dx)
            else:
                self.check_target(target, logits.shape[1], record)
                value, along = self.log_sum_exp(logits, row, t, shared)
                if t == 0:
                    self.write_loss(logits, row, target, value, along, smoothing, losses)
                    lse[row] = value
                    if present(weights):
                        weights[row] = Float32(1)
                # The target's logit has been read before anything is written over it.
                if const_expr(self.v.threads > WARP):
                    cute.arch.barrier()
                else:
                    cute.arch.sync_warp()
                scale = self.gradient_scale(row, grad, total_weight)
                self.write_gradients(logits, row, t, target, value, scale, smoothing, dx)


def reference(
    logits, targets, ignore_index=-100, smoothing=0.0, grad=1.0, total_weight=None, lse=None
):
    """losses, weights, lse and dx in float64."""
    import numpy as np

    x = np.asarray(logits, np.float64)
    m, n = x.shape
    kept = np.asarray(targets) != ignore_index
    at = np.where(kept, targets, 0)
    top = x.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        value = (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[:, 0]
    losses = (1 - smoothing) * (value - x[np.arange(m), at])
    if smoothing:
        losses = losses + smoothing * (value - x.mean(-1))
    used = value if lse is None else np.asarray(lse, np.float64)
    scale = np.broadcast_to(np.asarray(grad, np.float64), (m,))
    if total_weight is not None:
        scale = scale / float(total_weight)
    dx = np.exp(x - used[:, None]) - smoothing / n
    dx[np.arange(m), at] -= 1 - smoothing
    return {
        "losses": np.where(kept, losses, 0),
        "weights": kept.astype(np.float64),
        "lse": np.where(kept, value, 0),
        "dx": np.where(kept[:, None], dx * scale[:, None], 0),
    }


def forward_contract(v: CrossEntropyVariant) -> Contract:
    return _contract(v, forward=True, backward=False)


def backward_contract(v: CrossEntropyVariant) -> Contract:
    return _contract(v, forward=False, backward=True)


def in_place_contract(v: CrossEntropyVariant) -> Contract:
    return _contract(v, forward=True, backward=True)


register(
    Kernel(
        name="cross_entropy_forward",
        doc="Losses and log-sum-exp of rows of logits with class indices.",
        variants=VARIANTS,
        contract=forward_contract,
        make=Forward,
        reference=reference,
    )
)
register(
    Kernel(
        name="cross_entropy_backward",
        doc="Gradients of logits from their log-sum-exp; may be written over the logits.",
        variants=VARIANTS,
        contract=backward_contract,
        make=Backward,
        reference=reference,
    )
)
register(
    Kernel(
        name="cross_entropy_in_place",
        doc="Losses and gradients of rows of logits in one launch.",
        variants=VARIANTS,
        contract=in_place_contract,
        make=InPlace,
        reference=reference,
    )
)
